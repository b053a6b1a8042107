from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.sources.stores import LocalStore
from pipelines.data.sources.table import TableSource
from pipelines.errors import Refusal
from pipelines.params import TableParams

ALL = TableParams(split_column="fold", group_column="patient", arrived_column="day")


def table(root: Path, text: str, columns: TableParams | None = None, name: str = "images.csv") -> TableSource:
    for file in ("a.png", "sub/b.png"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"x")
    (root / name).write_text(text, encoding="utf-8")
    return TableSource(LocalStore(root), name, columns or TableParams(), root / "cache")


def test_list_items__csv_with_every_column__takes_them_all(tmp_path):
    text = "path,label,fold,patient,day,more\na.png, cat ,train,p1,2026-11-01,1\n./sub/b.png,dog,Valid,,,2\n"
    first, second = table(tmp_path, text, ALL).list_items()
    assert (first.key, first.label, first.given_split, first.group, first.arrived) == (
        "a.png",
        "cat",
        "train",
        "p1",
        date(2026, 11, 1),
    )
    assert (second.key, second.given_split, second.group, second.arrived) == ("sub/b.png", "val", "", None)
    assert first.fingerprint
    assert not first.fault


def test_list_items__parquet__is_the_same(tmp_path):
    table(tmp_path, "")
    columns = {
        "path": ["a.png", "sub/b.png"],
        "label": [0, 1],
        "fold": ["train", None],
        "patient": [7, 8],
        "day": [datetime(2026, 11, 1, 12, tzinfo=UTC), None],
    }
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    source = TableSource(LocalStore(tmp_path), "images.parquet", ALL, tmp_path / "cache")
    assert [(i.label, i.given_split, i.group, i.arrived) for i in source.list_items()] == [
        ("0", "train", "7", date(2026, 11, 1)),
        ("1", "", "8", None),
    ]


def test_list_items__byte_order_mark_and_quotes__are_understood(tmp_path):
    source = table(tmp_path, '\ufeffpath,label\n"a.png","cat, tabby"\n')
    assert source.list_items()[0].label == "cat, tabby"


def test_list_items__windows_and_absolute_paths__find_the_files(tmp_path):
    source = table(tmp_path, f"path,label\nsub\\b.png,cat\n{tmp_path}/a.png,dog\n")
    items = source.list_items()
    assert [item.key for item in items] == ["sub/b.png", "a.png"]
    assert [source.read(item, 10) for item in items] == [b"x", b"x"]


@pytest.mark.parametrize("name", ["images.csv", "images.parquet"])
def test_list_items__missing_column__names_it_and_those_present(tmp_path, name):
    source = table(tmp_path, "file,label\na.png,cat\n")
    pq.write_table(pa.table({"file": ["a.png"], "label": ["cat"]}), tmp_path / "images.parquet")
    source = TableSource(LocalStore(tmp_path), name, TableParams(), tmp_path / "cache")
    with pytest.raises(Refusal, match="no column path; it has file, label"):
        source.list_items()


def test_list_items__unknown_split__names_row_and_value(tmp_path):
    source = table(tmp_path, "path,label,fold\na.png,cat,dev\n", TableParams(split_column="fold"))
    with pytest.raises(Refusal, match=r"row 1 of images.csv: names the split 'dev'"):
        source.list_items()


def test_list_items__bad_date__names_row_and_value(tmp_path):
    source = table(tmp_path, "path,label,day\na.png,cat,yesterday\n", TableParams(arrived_column="day"))
    with pytest.raises(Refusal, match=r"row 1 of images.csv: gives the date 'yesterday'"):
        source.list_items()


def test_list_items__empty_path__is_refused(tmp_path):
    with pytest.raises(Refusal, match="row 2"):
        table(tmp_path, "path,label\na.png,cat\n,dog\n").list_items()


def test_list_items__no_file_there_at_all__is_refused_as_that(tmp_path):
    with pytest.raises(Refusal, match=r"none of them can be opened, e\.g\. x\.png: .*No such file") as caught:
        table(tmp_path, "path,label\nx.png,cat\ny.png,cat\n").list_items()
    assert "the column path" in caught.value.way_out


def test_list_items__no_label_or_no_file__has_a_fault(tmp_path):
    faults = [item.fault for item in table(tmp_path, "path,label\na.png,\ngone.png,cat\n").list_items()]
    assert faults == ["the column label is empty", "cannot be opened: No such file or directory"]


@pytest.mark.parametrize(("name", "kind"), [("images.csv", "CSV"), ("images.parquet", "Parquet")])
def test_list_items__file_of_another_kind__is_refused(tmp_path, name, kind):
    table(tmp_path, "")
    (tmp_path / name).write_bytes(b"PK\x03\x04\xff\xfe\x00")
    source = TableSource(LocalStore(tmp_path), name, TableParams(), tmp_path / "cache")
    with pytest.raises(Refusal, match=rf"no readable {kind}|no column"):
        source.list_items()


def test_ingest__table_names_an_image_twice__is_refused(tmp_path, make_folder, ingest_to):
    make_folder("", {"cat": 2, "dog": 2})
    (tmp_path / "images.csv").write_text("path,label\ncat/000.png,cat\n./cat/000.png,dog\ndog/000.png,dog\n")
    with pytest.raises(Refusal, match=r"1 images more than once: cat/000\.png"):
        ingest_to("images.csv")


def test_ingest__table_with_dates__respects_as_of(tmp_path, make_folder, ingest_to):
    make_folder("", {"cat": 2, "dog": 2})
    (tmp_path / "images.csv").write_text(
        "path,label,day\ncat/000.png,cat,2026-11-01\ncat/001.png,cat,2026-11-09\ndog/000.png,dog,\n"
    )
    manifest = ingest_to("images.csv", table=TableParams(arrived_column="day"), as_of=date(2026, 11, 8)).manifest
    assert manifest.labels == {"cat": 1, "dog": 1}
