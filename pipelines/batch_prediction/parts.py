"""The work of a batch prediction that is done so far: parts beside the output, bound to one model and one listing.

Layout, for an output `predictions.parquet`: `predictions.parquet.parts/` holds `manifest.json`, what the parts depend
on; `part-000000.parquet` and so on, each complete or not there; and `lock`.  The folder is gone when the output is
there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.batch_prediction.rows import FORMAT_KEY
from pipelines.core.image_decoding import Reason
from pipelines.core.locking import hold
from pipelines.core.results import write_json
from pipelines.errors import Refusal, TryLater

_LOCK_WAIT_S = 2.0  # for a process that was killed a moment ago
_ROW_GROUP_ROWS = 65_536
_OURS = re.compile(r"manifest\.json|lock|part-\d{6,}\.parquet|\.(manifest\.json|part|output)\.\d+")


class Parts:
    """The parts of one output; use `locked` around all else.

    Args:
        out: the predictions file they will become.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._folder = out.with_name(f"{out.name}.parts")
        self._manifest = self._folder / "manifest.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of this output.

        Raises:
            TryLater: another process is at it, or the disk became full.
            Refusal: the output is named like another format, or it or its parts folder holds something else.
        """
        self._refuse_what_is_not_ours()
        lock = self._folder / "lock"
        with hold(lock, wait_s=_LOCK_WAIT_S):
            # Whoever held it before may have finished, and removed the very file that is locked now.
            if not lock.is_file() or lock.read_text(encoding="utf-8") != str(os.getpid()):
                raise TryLater(f"{self._out} was written by another process just now\n  what to do: look, or try again")
            try:
                yield
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                way_out = "free some space; the same command goes on from there"
                raise TryLater(f"{self._folder}: the disk is full\n  what to do: {way_out}") from error
            finally:
                if not self._manifest.exists() and self._folder.exists():
                    self.remove()

    def begin(self, binding: dict[str, Any]) -> str:
        """Keep the parts that depend on the same things; drop all of them if anything else was given.

        Returns:
            What changed since the parts were made, for a person; empty if nothing did.
        """
        self._remove(*self._folder.glob(".*"))  # what a kill left half written
        before = self._read_manifest()
        if before == binding:
            return ""
        self._remove(*self._folder.glob("part-*.parquet"))
        write_json(self._manifest, binding)
        return "" if before is None else ", ".join(key for key in binding if before.get(key) != binding[key])

    def find(self, number: int, rows: int) -> pa.Table | None:
        """A part that is done, or None.

        One in which an image could not be read counts as not done: it may be readable now.
        """
        try:
            part = pq.read_table(self._path(number), page_checksum_verification=True, memory_map=False)
        except (OSError, pa.ArrowException):
            return None
        lasting = str(Reason.UNREADABLE) not in part["error"].unique().to_pylist()
        return part if part.num_rows == rows and lasting else None

    def write(self, number: int, part: pa.Table) -> None:
        """Write a part; it is there complete or not at all."""
        temporary = self._folder / f".part.{os.getpid()}"
        pq.write_table(part, temporary, compression="zstd", write_page_checksum=True)
        temporary.replace(self._path(number))

    def assemble(self, count: int, schema: pa.Schema) -> None:
        """Join all parts into the output, which appears complete, and remove them."""
        temporary = self._folder / f".output.{os.getpid()}"
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            waiting: list[pa.Table] = []
            for number in range(count):
                waiting.append(pq.read_table(self._path(number), page_checksum_verification=True))
                if sum(part.num_rows for part in waiting) >= _ROW_GROUP_ROWS or number == count - 1:
                    joined = pa.concat_tables(waiting).combine_chunks()
                    writer.write_table(joined, row_group_size=joined.num_rows)
                    waiting.clear()
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(self._out)
        self.remove()

    def remove(self) -> None:
        """Remove the folder with everything that a prediction has put into it."""
        mine = [entry for entry in self._folder.iterdir() if _OURS.fullmatch(entry.name)]
        # The lock goes last: what follows it must find either everything or nothing.
        self._remove(*sorted(mine, key=lambda entry: entry.name == "lock"))
        self._folder.rmdir()

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.parquet"

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            tree = json.loads(self._manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return tree if isinstance(tree, dict) else {}

    def _refuse_what_is_not_ours(self) -> None:
        if self._out.suffix.casefold() not in ("", ".parquet"):
            raise Refusal(
                f"--out {self._out}",
                "would be a Parquet file under another name",
                limit="a name that ends in .parquet",
                way_out=f"--out {self._out.with_suffix('.parquet')}; for a CSV file, give that to pandas: "
                "pandas.read_parquet(…).to_csv(…)",
            )
        way_out = "name another file with --out, or move that one away"
        if not self._out.parent.is_dir():
            raise Refusal("the folder of --out", f"there is no {self._out.parent}", way_out="make it first")
        if self._out.exists():
            try:
                ours = FORMAT_KEY in (pq.read_schema(self._out).metadata or {})
            except (OSError, pa.ArrowException):
                ours = False
            if not ours:
                raise Refusal(f"--out {self._out}", "is there and holds no predictions of Perch", way_out=way_out)
        if self._folder.is_dir():
            if others := sorted(entry.name for entry in self._folder.iterdir() if not _OURS.fullmatch(entry.name)):
                raise Refusal(f"the folder {self._folder}", f"holds {others[0]}, which is no part", way_out=way_out)
        elif self._folder.exists():
            raise Refusal(f"the folder {self._folder}", "is a file", way_out=way_out)

    @staticmethod
    def _remove(*files: Path) -> None:
        for file in files:
            file.unlink(missing_ok=True)
