"""The gate on data: healthy weeks pass, and each kind of bad data fails its expectation and no other."""

import json
import re
import shutil
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.core.results import write_json
from pipelines.core.splitting import SplitShares, assign_splits
from pipelines.core.workspace import Workspace
from pipelines.data.shards import METADATA_SCHEMA
from pipelines.data.validation_tables import read_measurements
from pipelines.errors import Refusal
from pipelines.params import Params, check_params, override
from pipelines.settings import get_settings
from pipelines.stages import data_ingestion, data_validation

PROJECT = Path(__file__).parents[3]
AS_OF = date(2026, 11, 1)


def make_params(**overrides: object) -> Params:
    tree = yaml.safe_load((PROJECT / "params.yaml").read_text())
    return check_params(override(tree, {"data_ingestion.as_of": AS_OF, **overrides}))


def healthy_images() -> pd.DataFrame:
    """900 images that resemble the digits, without look-alikes."""
    generator = np.random.default_rng(1)
    count = 900
    return pd.DataFrame(
        {
            "key": [f"{n:04}.png" for n in range(count)],
            "label": [str(n % 10) for n in range(count)],
            "given_split": "",
            "group": "",
            "arrived": AS_OF,
            "sha256": [f"{n:064x}" for n in generator.permutation(count)],
            "format": "PNG",
            "mode": "L",
            "width_px": 8,
            "height_px": 8,
            "n_bytes": 135,
            "mean": generator.normal(80, 7, count).clip(60, 107),
            "std": generator.normal(95, 5, count).clip(78, 112),
            "p01": 0.0,
            "p99": generator.uniform(240, 255, count),
            "phash": generator.integers(-(2**63), 2**63, count),
        }
    )


def open_workspace(
    root: Path, images: pd.DataFrame, *, quarantined: int = 0, dataset: str = "digits", previous_rows: int = 0
) -> Workspace:
    """A workspace as ingestion leaves it; with `previous_rows` there is a reference with the healthy images' shares."""
    workspace = Workspace(root)
    workspace.raw.mkdir(parents=True)
    schema = METADATA_SCHEMA
    for extra in [name for name in images.columns if name not in schema.names]:
        schema = schema.append(pa.field(extra, pa.string()))
    pq.write_table(pa.Table.from_pandas(images, schema=schema, preserve_index=False), workspace.raw / "0.parquet")
    manifest = {
        "schema": 1, "dataset": dataset, "source": dataset, "as_of": None, "labels": {}, "rows": len(images),
        "quarantined": quarantined, "data_sha256": "",
        "shards": [{"name": "0.parquet", "rows": len(images), "sha256": ""}],
    }  # fmt: skip
    write_json(workspace.raw / "manifest.json", manifest)
    pd.DataFrame({"key": [f"bad{n}" for n in range(quarantined)]}).to_parquet(workspace.quarantine_file)
    shutil.copytree(PROJECT / "expectations", workspace.expectations)
    write_json(workspace.reference / "reference.json", {"kind": "none", "version": None})
    if previous_rows:
        write_json(workspace.reference / "reference.json", {"kind": "champion", "version": "1"})
        write_json(workspace.reference / "manifest.json", {**manifest, "rows": previous_rows})
        healthy_images().assign(used_split="train").to_parquet(workspace.reference / "images.parquet")
    return workspace


def failures(workspace: Workspace) -> set[tuple[str, str]]:
    """Suite and column (or type) of each critical expectation that the evidence says was not met."""
    evidence = json.loads((workspace.validation / "validation.json").read_text())
    return {
        (suite["name"], each["column"] or each["type"])
        for suite in evidence["suites"]
        for each in suite["expectations"]
        if each["severity"] == "critical" and not each["success"]
    }


def test_run__healthy_images__meets_everything_and_leaves_the_evidence(tmp_path: Path) -> None:
    workspace = open_workspace(tmp_path, healthy_images(), previous_rows=900)
    result = data_validation.run(make_params(), workspace)
    assert failures(workspace) == set()
    total = int(result.metrics["data/expectations_total"])
    assert total >= 30
    assert result.summary == f"{total} of {total} expectations met"
    assert result.metrics["data/expectations_met"] == total
    assert result.metrics["data/rows_vs_previous"] == 1
    index = (workspace.root / result.reports["Data Docs"]).read_text()
    assert f"{total} of {total} expectations met" in index
    assert set(re.findall(r'href="([^"]+)"', index)) == {"images.html", "dataset.html"}
    assert all((workspace.validation / "data_docs" / name).is_file() for name in ("images.html", "dataset.html"))


def with_values(column: str, values: object, rows: slice = slice(0, 3)) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(images: pd.DataFrame) -> pd.DataFrame:
        images = images.copy()
        images.loc[images.index[rows], column] = values
        return images

    return change


def without_class(images: pd.DataFrame) -> pd.DataFrame:
    return images[images["label"] != "9"]


def with_unknown_class(images: pd.DataFrame) -> pd.DataFrame:
    return with_values("label", "ten", slice(0, 90))(images)


def with_rare_class(images: pd.DataFrame) -> pd.DataFrame:
    nines = images.index[images["label"] == "9"]
    return images.drop(nines[20:])


def with_duplicates(images: pd.DataFrame) -> pd.DataFrame:
    copies = images[:20].assign(key=[f"copy{n}.png" for n in range(20)])
    return pd.concat([images, copies], ignore_index=True)


def with_label_conflict(images: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([images, images[:1].assign(key="copy.png", label="7")], ignore_index=True)


def with_leak(images: pd.DataFrame, into: str) -> pd.DataFrame:
    images = images.assign(given_split=["train", "val", "test"] * 300)
    return pd.concat([images, images[:1].assign(key="copy.png", given_split=into)], ignore_index=True)


def with_near_leaks(images: pd.DataFrame) -> pd.DataFrame:
    images = images.assign(given_split=["train", "val", "test"] * 300)
    hashes = images["phash"].to_numpy().copy()
    hashes[2::3][:20] = hashes[0::3][:20] ^ 0b101
    return images.assign(phash=hashes)


def with_groups_across_splits(images: pd.DataFrame) -> pd.DataFrame:
    return images.assign(given_split=["train", "val", "test"] * 300, group=["writer-1"] * 2 + [""] * 898)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(with_values("surprise", "x"), {("images", "expect_table_columns_to_match_set")}, id="schema"),
        pytest.param(with_values("key", "0003.png"), {("images", "key")}, id="key-twice"),
        pytest.param(with_values("sha256", "none", slice(0, 1)), {("images", "sha256")}, id="no-digest"),
        pytest.param(with_values("mode", "RGB"), {("images", "mode")}, id="mode"),
        pytest.param(with_values("format", "JPEG"), {("images", "format")}, id="format"),
        pytest.param(with_values("width_px", 4), {("images", "width_px")}, id="tiny"),
        pytest.param(with_values("height_px", 4000), {("images", "height_px")}, id="huge"),
        pytest.param(with_values("mean", 180.0), {("images", "mean")}, id="inverted"),
        pytest.param(with_values("std", 2.0), {("images", "std")}, id="blank"),
        pytest.param(with_values("p01", 60.0), {("images", "p01")}, id="grey-background"),
        pytest.param(with_values("p99", 120.0), {("images", "p99")}, id="washed-out"),
        pytest.param(without_class, {("images", "label")}, id="class-missing"),
        pytest.param(with_unknown_class, {("images", "label")}, id="class-unknown"),
        pytest.param(with_rare_class, {("dataset", "smallest_class_share")}, id="imbalance"),
        pytest.param(with_duplicates, {("images", "is_duplicate")}, id="duplicates"),
        pytest.param(with_label_conflict, {("images", "label_conflict")}, id="label-conflict"),
        pytest.param(lambda images: with_leak(images, "val"), {("images", "leaks")}, id="leak-into-val"),
        pytest.param(
            lambda images: with_leak(images, "test"),
            {("images", "leaks"), ("images", "leaks_into_test")},
            id="leak-into-test",
        ),
        pytest.param(with_near_leaks, {("images", "near_leaks")}, id="near-leaks"),
        pytest.param(with_groups_across_splits, {("dataset", "groups_across_splits")}, id="group-across-splits"),
        pytest.param(lambda images: images[:600], {("dataset", "rows")}, id="half-a-delivery"),
        pytest.param(
            with_values("arrived", AS_OF - timedelta(days=800), slice(None)),
            {("dataset", "freshness_days")},
            id="stale",
        ),
    ],
)
def test_run__bad_data__fails_its_expectation_and_no_other(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], expected: set[tuple[str, str]]
) -> None:
    workspace = open_workspace(tmp_path, change(healthy_images()))
    with pytest.raises(Refusal) as refusal:
        data_validation.run(make_params(), workspace)
    assert failures(workspace) == expected
    named = set(re.findall(r"^    (\w+)\.json, (\w+): observed .+; limit .+$", refusal.value.value, re.MULTILINE))
    assert named == expected
    assert "Not met" in (workspace.validation / "data_docs" / "index.html").read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda images: images.assign(mean=images["mean"] + 6), {"psi_mean"}, id="brighter"),
        pytest.param(lambda images: images.assign(std=images["std"] - 4), {"psi_std"}, id="flatter"),
        pytest.param(lambda images: images.assign(p99=images["p99"] - 8), {"psi_p99"}, id="darker-strokes"),
        pytest.param(
            lambda images: images[(images["label"] > "4") | (images.index % 3 == 0)],
            {"js_label", "smallest_class_share"},
            id="other-class-shares",
        ),
    ],
)
def test_run__shift_against_the_champion__fails_its_expectation_and_no_other(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], expected: set[str]
) -> None:
    images = change(pd.concat([healthy_images(), copies_of_healthy_images()], ignore_index=True))
    workspace = open_workspace(tmp_path, images, previous_rows=900)
    with pytest.raises(Refusal):
        data_validation.run(make_params(), workspace)
    assert failures(workspace) == {("dataset", fact) for fact in expected}


def copies_of_healthy_images() -> pd.DataFrame:
    """As many images again, with names, bytes and hashes of their own."""
    images = healthy_images()
    generator = np.random.default_rng(2)
    return images.assign(
        key="b" + images["key"],
        sha256=[f"{n:064x}" for n in range(1000, 1900)],
        phash=generator.integers(-(2**63), 2**63, len(images)),
    )


def test_run__too_many_quarantined__is_refused_with_observed_value_and_limit(tmp_path: Path) -> None:
    workspace = open_workspace(tmp_path, healthy_images(), quarantined=20)
    with pytest.raises(Refusal) as refusal:
        data_validation.run(make_params(), workspace)
    assert str(refusal.value).splitlines()[1] == (
        "    dataset.json, quarantined_share: observed 0.02174; limit at most 0.01"
    )
    assert f"look at {workspace.validation / 'data_docs' / 'index.html'}" in refusal.value.way_out
    assert "expectations/digits" in refusal.value.way_out


def test_run__rows_lost_since_the_champion__is_refused(tmp_path: Path) -> None:
    workspace = open_workspace(tmp_path, healthy_images(), previous_rows=3000)
    with pytest.raises(Refusal, match=r"rows_vs_previous: observed 0\.3; limit at least 0\.45"):
        data_validation.run(make_params(), workspace)
    assert failures(workspace) == {("dataset", "rows_vs_previous")}


def test_run__warning__goes_on_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = healthy_images().assign(arrived=AS_OF - timedelta(days=20))
    workspace = open_workspace(tmp_path, images)
    result = data_validation.run(make_params(), workspace)
    assert result.metrics["data/expectations_met"] == result.metrics["data/expectations_total"] - 1
    assert "freshness_days: observed 20, limit at most 14" in caplog.text


def test_run__twice__gives_the_same_bytes_without_times_and_paths(tmp_path: Path) -> None:
    trees = []
    for name in ("a", "b"):
        workspace = open_workspace(tmp_path / name, with_leak(healthy_images(), "test"), previous_rows=900)
        for _ in range(2):  # the second try after a kill finds the first one's files
            with pytest.raises(Refusal):
                data_validation.run(make_params(), workspace)
        files = sorted(file for file in workspace.validation.rglob("*") if file.is_file())
        trees.append({str(file.relative_to(workspace.root)): file.read_bytes() for file in files})
    assert trees[0] == trees[1]
    assert len(trees[0]) == 4
    assert not any(str(tmp_path).encode() in content for content in trees[0].values())


def test_run__data_set_without_suites__uses_the_default_ones_and_says_how_to_draft_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = np.random.default_rng(1)
    images = healthy_images().assign(
        arrived=None,
        label=["cat"] * 800 + ["dog"] * 90 + ["eel"] * 10,
        mode=generator.choice(["RGB", "L", "RGBA", "P"], 900),
        format=generator.choice(["JPEG", "BMP", "TIFF"], 900),
        width_px=generator.integers(20, 900, 900),
        height_px=generator.integers(20, 900, 900),
        mean=generator.uniform(5, 250, 900),
        std=generator.uniform(0, 120, 900),
    )
    workspace = open_workspace(tmp_path, with_duplicates(images), quarantined=40, dataset="animals")
    data_validation.run(make_params(dataset="animals"), workspace)
    assert "perch expectations init animals" in caplog.text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda images: images.assign(label="cat"), ("dataset", "labels"), id="one-class"),
        pytest.param(lambda images: with_leak(images, "test"), ("images", "leaks_into_test"), id="leak-into-test"),
        pytest.param(lambda images: images[:10], ("dataset", "rows"), id="hardly-any"),
        pytest.param(with_values("width_px", 3, slice(0, 200)), ("images", "width_px"), id="tiny"),
    ],
)
def test_run__data_that_no_one_can_train_on__fails_the_default_suites(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], expected: tuple[str, str]
) -> None:
    workspace = open_workspace(tmp_path, change(healthy_images()), dataset="animals")
    with pytest.raises(Refusal):
        data_validation.run(make_params(dataset="animals"), workspace)
    assert failures(workspace) == {expected}


def test_run__weeks_of_the_real_digits__pass_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCH_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    previous = None
    for number, as_of in enumerate((AS_OF, AS_OF + timedelta(weeks=1), AS_OF + timedelta(weeks=3), AS_OF)):
        workspace = Workspace(tmp_path / str(number))
        params = make_params(**{"data_ingestion.as_of": as_of})
        data_ingestion.run(params, workspace)
        shutil.copytree(PROJECT / "expectations", workspace.expectations)
        write_json(workspace.reference / "reference.json", {"kind": "none", "version": None})
        if previous is not None:
            write_json(workspace.reference / "reference.json", {"kind": "candidate", "version": str(number)})
            shutil.copy(previous.raw / "manifest.json", workspace.reference)
            images = read_measurements(previous.raw)
            columns = (images[name].tolist() for name in ("sha256", "group", "given_split"))
            used_split = assign_splits(*columns, SplitShares(0.7, 0.15))
            images.assign(used_split=used_split).to_parquet(workspace.reference / "images.parquet")
        result = data_validation.run(params, workspace)
        assert failures(workspace) == set()
        unmet = result.metrics["data/expectations_total"] - result.metrics["data/expectations_met"]
        assert unmet == (1 if as_of == AS_OF and previous else 0), "going back in time has fewer images, a warning"
        previous = workspace
    get_settings.cache_clear()
