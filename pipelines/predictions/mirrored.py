"""What two versions answered to the same requests, from kept predictions: a request and its copy share an id."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from pipelines.core.canary_observations import MirrorWindow
from pipelines.core.request_origins import PROBE
from pipelines.predictions.queries import Predictions
from pipelines.predictions.stores import Store
from pipelines.predictions.tree import Selection

# An image may stand twice in one request: the n-th of one side belongs to the n-th of the other.
_PAIRS = """
WITH numbered AS (
  SELECT model_version, request_id, image_sha256, label, probabilities, origin, prediction_id,
    row_number() OVER (PARTITION BY model_version, request_id, image_sha256 ORDER BY prediction_id) AS n
  FROM predictions
  WHERE time >= TIMESTAMPTZ '{since}' AND model_version IN ('{champion}', '{canary}') AND {counts}
), pairs AS (
  SELECT a.label AS champion_label, b.label AS canary_label, map_keys(a.probabilities) AS labels,
    list_sum(list_transform(map_keys(a.probabilities),
      lambda k: abs(a.probabilities[k] - coalesce(b.probabilities[k], 0)))) / 2 AS difference
  FROM numbered a JOIN numbered b USING (request_id, image_sha256, n)
  WHERE a.model_version = '{champion}' AND b.model_version = '{canary}'
  -- The prober sends its images again and again; what a model says of one is known after the first time.
  QUALIFY a.origin <> '{probe}' OR row_number() OVER (PARTITION BY a.origin, image_sha256 ORDER BY a.prediction_id) = 1
)
SELECT champion_label, canary_label, count(*) AS n_pairs, sum(difference) AS difference, any_value(labels) AS labels
FROM pairs GROUP BY ALL ORDER BY ALL
"""


def compare_answers(
    store: Store, model: str, champion: str, canary: str, since: datetime, *, count_probes: bool = True
) -> MirrorWindow:
    """Count the pairs of labels, and add up how far the probabilities lie apart.

    Of the prober's requests each image counts once, however often it was sent.

    Args:
        store: keeps the predictions.
        model: name of the registered model.
        champion: the version whose answers clients got.
        canary: the version that got copies.
        since: when the copies began, with a zone.
        count_probes: whether the prober's requests are evidence, too.

    Raises:
        Refusal: a version is no number.
        TryLater: the store does not answer.
    """
    values = {
        "champion": str(int(champion)),
        "canary": str(int(canary)),
        "since": since.isoformat(),
        "counts": "true" if count_probes else f"origin <> '{PROBE}'",
        "probe": PROBE,
    }
    # An id is made a moment before or after its prediction's time is taken.
    begin = (since - timedelta(minutes=5)).astimezone(UTC)
    selection = Selection(model=model, since=begin.date(), begin=begin)
    with Predictions(store) as predictions:
        rows = predictions.ask(_PAIRS.format(**values), selection, with_feedback=False).records()
    labels = sorted({label for row in rows for label in row["labels"]} | {row["canary_label"] for row in rows})
    return MirrorWindow(
        labels=labels,
        pairs={(row["champion_label"], row["canary_label"]): row["n_pairs"] for row in rows},
        score_difference=sum(row["difference"] for row in rows),
    )
