"""The two tables that expectations look at: one row per image, and one row of facts about the whole data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.core.shift import jensen_shannon_distance, population_stability_index
from pipelines.core.splitting import SplitShares, assign_splits
from pipelines.data.near_duplicates import near_across_splits
from pipelines.data.shards import METADATA_COLUMNS, read_manifest
from pipelines.errors import Refusal
from pipelines.params import Params

FACTS: Mapping[str, str] = {
    "rows": "readable images",
    "labels": "classes",
    "quarantined_share": "unreadable images, of all that were found",
    "freshness_days": "from the newest image's arrival to the run's date",
    "rows_vs_previous": "readable images, over those of the version it is compared with",
    "smallest_class_images": "images of the rarest class",
    "smallest_class_share": "images of the rarest class, of all images",
    "smallest_to_largest_class": "images of the rarest class, over those of the commonest",
    "groups_across_splits": "groups, e.g. patients, whose images lie in more than one split",
    "new_images_share": "images that the version it is compared with had not seen",
    "psi_mean": "shift of the intensity (population stability index) against that version's training images",
    "psi_std": "likewise of the contrast",
    "psi_p01": "likewise of the darkest percentile",
    "psi_p99": "likewise of the brightest percentile",
    "psi_width_px": "likewise of the width",
    "psi_height_px": "likewise of the height",
    "psi_n_bytes": "likewise of the encoded size",
    "js_label": "distance of the class shares (Jensen-Shannon) from that version's training images",
    "js_mode": "likewise of the colour modes",
    "new_psi_mean": "shift of the intensity of the new images alone",
    "new_psi_std": "likewise of their contrast",
}
_SHIFTING = ("mean", "std", "p01", "p99", "width_px", "height_px", "n_bytes")


@dataclass(frozen=True)
class Reference:
    """The version that a run is compared with: its training images' measurements, and all that it had ingested."""

    version: str
    rows: int
    sha256: frozenset[str]
    training: pd.DataFrame


@dataclass(frozen=True)
class ValidationTables:
    """What suites are held against: `images`, one row each, and `facts` of the data set, None where not known."""

    images: pd.DataFrame
    facts: Mapping[str, float | None]

    def by_name(self) -> dict[str, pd.DataFrame]:
        """Each table under the name of its suite; facts are one row of float64, where NaN is what is not known."""
        facts = {name: [np.nan if value is None else float(value)] for name, value in self.facts.items()}
        return {"images": self.images, "dataset": pd.DataFrame(facts)}


def build_tables(params: Params, raw: Path, quarantine_file: Path, reference: Reference | None) -> ValidationTables:
    """Read what was ingested, give each image its split, and compute all that suites may ask about.

    Args:
        params: shares of the splits, the near-duplicates' distance and the run's date are taken from it.
        raw: the folder of shards.
        quarantine_file: the table of unreadable files.
        reference: the version to compare with.

    Raises:
        Refusal: as `read_measurements`.
    """
    measurements = read_measurements(raw)
    shares = SplitShares(params.data_preprocessing.train_share, params.data_preprocessing.val_share)
    splits = assign_splits(
        measurements["sha256"].tolist(), measurements["group"].tolist(), measurements["given_split"].tolist(), shares
    )
    images = describe_images(measurements, splits, params.data_validation.near_duplicate_bits)
    quarantined = pq.read_metadata(quarantine_file).num_rows
    facts = measure_data_set(images, quarantined=quarantined, as_of=params.data_ingestion.as_of, reference=reference)
    return ValidationTables(images, facts)


def read_measurements(raw: Path) -> pd.DataFrame:
    """Read the measured columns of `data/raw`, without the encoded images.

    Args:
        raw: folder with `manifest.json` and the shards that it names.

    Returns:
        One row per image in the order of `key`, and whatever further columns the shards have.

    Raises:
        Refusal: a shard lacks a column of the contract, or there is no image at all.
    """
    tables = []
    for shard in read_manifest(raw).shards:
        names = pq.read_schema(raw / shard.name).names
        missing = [name for name in METADATA_COLUMNS if name not in names]
        if missing:
            raise Refusal(
                f"the shard {shard.name} of data/raw",
                f"lacks the columns {', '.join(missing)}",
                limit="the columns that docs/reference/workspace.md lists",
                way_out="run data_ingestion again",
            )
        tables.append(pq.read_table(raw / shard.name, columns=[name for name in names if name != "image"]))
    if sum(len(table) for table in tables) == 0:
        raise Refusal(
            "data/raw", "holds no image", limit="at least one", way_out="`perch quarantine` lists what was put aside"
        )
    measurements: pd.DataFrame = pa.concat_tables(tables).to_pandas()
    return measurements


def read_reference(folder: Path, dataset: str) -> Reference | None:
    """Read what a run is compared with; None where there is nothing, or it was trained on another data set."""
    record = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    if record["kind"] == "none":
        return None
    manifest = read_manifest(folder)
    if manifest.dataset != dataset:
        return None
    images = pq.read_table(folder / "images.parquet").to_pandas()
    return Reference(
        version=f"{record['kind']} v{record['version']}",
        rows=manifest.rows,
        sha256=frozenset(images["sha256"]),
        training=images[images["used_split"] == "train"],
    )


def describe_images(measurements: pd.DataFrame, splits: Sequence[str], near_duplicate_bits: int) -> pd.DataFrame:
    """Add to each image's measurements what only the other images can tell.

    Args:
        measurements: as `read_measurements` returns them.
        splits: the split of each image.
        near_duplicate_bits: largest distance between perceptual hashes of near-duplicates.

    Returns:
        The measurements with `split` and five bool columns: `is_duplicate` (an earlier image has the same bytes),
        `label_conflict` (the same bytes have another label too), `leaks` (the same bytes lie in another split too),
        `leaks_into_test` (the test split is one of them), `near_leaks` (a near-duplicate lies in another split).
    """
    images = measurements.assign(split=list(splits))
    same_bytes = images.groupby("sha256", sort=False)
    images["is_duplicate"] = images.duplicated("sha256")
    images["label_conflict"] = same_bytes["label"].transform("nunique") > 1
    images["leaks"] = same_bytes["split"].transform("nunique") > 1
    in_test = (images["split"] == "test").groupby(images["sha256"], sort=False).transform("any")
    images["leaks_into_test"] = images["leaks"] & in_test
    images["near_leaks"] = near_across_splits(
        images["phash"].to_numpy(dtype=np.int64),
        pd.factorize(images["sha256"])[0],
        pd.factorize(images["split"])[0],
        near_duplicate_bits,
    )
    return images


def measure_data_set(
    images: pd.DataFrame, *, quarantined: int, as_of: date | None, reference: Reference | None
) -> dict[str, float | None]:
    """Compute every fact of `FACTS`; None where it cannot be known, e.g. a shift without a reference.

    Args:
        images: as `describe_images` returns them, not empty.
        quarantined: how many files could not be read.
        as_of: the run's date.
        reference: the version to compare with.
    """
    counts = images["label"].value_counts()
    arrived = images["arrived"].dropna()
    groups = images[images["group"] != ""].groupby("group")["split"].nunique()
    facts: dict[str, float | None] = dict.fromkeys(FACTS)
    facts |= {
        "rows": len(images),
        "labels": len(counts),
        "quarantined_share": quarantined / (len(images) + quarantined),
        "freshness_days": (as_of - arrived.max()).days if as_of is not None and len(arrived) else None,
        "smallest_class_images": int(counts.min()),
        "smallest_class_share": float(counts.min() / len(images)),
        "smallest_to_largest_class": float(counts.min() / counts.max()),
        "groups_across_splits": int((groups > 1).sum()),
    }
    if reference is not None:
        facts |= _compare(images, reference)
    return facts


def _compare(images: pd.DataFrame, reference: Reference) -> dict[str, float | None]:
    new = images[~images["sha256"].isin(reference.sha256)]
    facts: dict[str, float | None] = {
        "rows_vs_previous": len(images) / reference.rows if reference.rows else None,
        "new_images_share": len(new) / len(images),
    }
    training = reference.training
    if len(training):
        for name in _SHIFTING:
            facts[f"psi_{name}"] = population_stability_index(training[name], images[name])
        for name in ("label", "mode"):
            facts[f"js_{name}"] = jensen_shannon_distance(
                training[name].value_counts().to_dict(), images[name].value_counts().to_dict()
            )
        if len(new):
            for name in ("mean", "std"):
                facts[f"new_psi_{name}"] = population_stability_index(training[name], new[name])
    return facts
