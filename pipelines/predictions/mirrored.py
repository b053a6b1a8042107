"""What two versions answered to the same requests, from kept predictions: a request and its copy share an id."""

from __future__ import annotations

from datetime import datetime, timedelta

from pipelines.core.canary_observations import MirrorWindow
from pipelines.predictions.queries import Predictions
from pipelines.predictions.stores import Store
from pipelines.predictions.tree import Selection

# An image may stand twice in one request: the n-th of one side belongs to the n-th of the other.
_PAIRS = """
WITH numbered AS (
  SELECT model_version, request_id, image_sha256, label, probabilities,
    row_number() OVER (PARTITION BY model_version, request_id, image_sha256 ORDER BY prediction_id) AS n
  FROM predictions
  WHERE time >= TIMESTAMPTZ '{since}' AND model_version IN ('{champion}', '{canary}')
), pairs AS (
  SELECT a.label AS champion_label, b.label AS canary_label, map_keys(a.probabilities) AS labels,
    list_sum(list_transform(map_keys(a.probabilities),
      lambda k: abs(a.probabilities[k] - coalesce(b.probabilities[k], 0)))) / 2 AS difference
  FROM numbered a JOIN numbered b USING (request_id, image_sha256, n)
  WHERE a.model_version = '{champion}' AND b.model_version = '{canary}'
)
SELECT champion_label, canary_label, count(*) AS n_pairs, sum(difference) AS difference, any_value(labels) AS labels
FROM pairs GROUP BY ALL ORDER BY ALL
"""


def compare_answers(store: Store, model: str, champion: str, canary: str, since: datetime) -> MirrorWindow:
    """Count the pairs of labels, and add up how far the probabilities lie apart.

    Args:
        store: keeps the predictions.
        model: name of the registered model.
        champion: the version whose answers clients got.
        canary: the version that got copies.
        since: when the copies began, with a zone.

    Raises:
        Refusal: a version is no number.
        TryLater: the store does not answer.
    """
    values = {"champion": str(int(champion)), "canary": str(int(canary)), "since": since.isoformat()}
    selection = Selection(model=model, since=(since - timedelta(minutes=5)).date())
    with Predictions(store) as predictions:
        rows = predictions.ask(_PAIRS.format(**values), selection).records()
    labels = sorted({label for row in rows for label in row["labels"]} | {row["canary_label"] for row in rows})
    return MirrorWindow(
        labels=labels,
        pairs={(row["champion_label"], row["canary_label"]): row["n_pairs"] for row in rows},
        score_difference=sum(row["difference"] for row in rows),
    )
