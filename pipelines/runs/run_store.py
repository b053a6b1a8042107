"""A run's folder in an S3 bucket: small objects, each put whole, and replaced only by who knows what it replaces."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.errors import Refusal, TryLater
from pipelines.object_storage.client import connect, explained, is_missing
from pipelines.object_storage.settings import read_s3_settings
from pipelines.object_storage.transfers import download, list_objects, receive
from pipelines.settings import Settings

_S3 = "s3://"
# What stores answer to a condition that does not hold; two writers at the very same moment give the second.
_CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict", "412"}
_LEASE_S = 30.0
_LOOKS_PER_LEASE = 3
_PAUSE_S = 0.5


class Conflict(Exception):
    """Somebody else has put the object in the meantime."""


@dataclass(frozen=True)
class Stored:
    """An object's bytes and the tag that says which bytes they are."""

    content: bytes
    tag: str


class RunStore:
    """The objects of one run, below `<PERCH_RUNS_URL>/runs/<folder>/`.

    Conditional writes (`If-None-Match`, `If-Match`) are what keeps two writers apart; AWS and MinIO know them.

    Args:
        settings: name the bucket, and where it is.
        folder: the run's, as it is named on a disk.

    Raises:
        Refusal: `PERCH_RUNS_URL` is no `s3://bucket/prefix`, or there are no credentials.
    """

    def __init__(self, settings: Settings, folder: str) -> None:
        parts = urlsplit(settings.runs_url)
        if parts.scheme != "s3" or not parts.netloc:
            raise Refusal(
                "PERCH_RUNS_URL",
                settings.runs_url or "is empty",
                limit="s3://bucket/prefix",
                way_out="set it so; where it is unset, runs stay in the home, and nothing of them is shared",
            )
        self._bucket = parts.netloc
        prefix = parts.path.strip("/")
        self._prefix = f"{prefix}/runs/{folder}/" if prefix else f"runs/{folder}/"
        self._name = f"the run's folder {_S3}{self._bucket}/{self._prefix}"
        self._settings = read_s3_settings(settings.s3_endpoint_url)
        self._client = connect(self._settings)

    def read(self, name: str) -> Stored | None:
        """An object, or None where there is none of this name."""
        from botocore.exceptions import ClientError

        key = self._prefix + name
        with explained(self._name):
            while True:  # until nobody has put another one between the two requests
                try:
                    tag = self._client.head_object(Bucket=self._bucket, Key=key)["ETag"]
                    content = receive(
                        self._client,
                        self._settings,
                        lambda answer: b"".join(answer.chunks),
                        Bucket=self._bucket,
                        Key=key,
                        IfMatch=tag,
                    )
                    return Stored(content, tag)
                except ClientError as error:
                    if is_missing(error):
                        return None
                    if error.response["Error"].get("Code") not in _CONFLICTS:
                        raise

    def put(self, name: str, content: bytes, *, replaces: str | None) -> str:
        """Put an object in the place of one with this tag, or, with None, where there is none.

        Returns:
            The new object's tag.

        Raises:
            Conflict: something else is there.
        """
        from botocore.exceptions import ClientError

        condition: dict[str, Any] = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}
        with explained(self._name):
            try:
                answer = self._client.put_object(
                    Bucket=self._bucket, Key=self._prefix + name, Body=content, **condition
                )
                return str(answer["ETag"])
            except ClientError as error:
                if error.response["Error"].get("Code") not in _CONFLICTS and not is_missing(error):
                    raise
                refused = error
        found = self.read(name)
        if found is not None and found.content == content:
            return found.tag  # it was put, the answer was lost, and the request sent again
        raise Conflict(name) from refused

    def replace(self, name: str, content: bytes) -> None:
        """Put an object, whatever is there."""
        with explained(self._name):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=content)

    def upload(self, name: str, file: Path) -> None:
        """Put a file of any size as it is now; readers see the old object until all of it is there.

        Raises:
            FileNotFoundError: it is gone.
        """
        # Not by its name: boto3 opens that anew for each part, and a file replaced meanwhile would be put mixed.
        with explained(self._name), file.open("rb") as stream:
            self._client.upload_fileobj(stream, self._bucket, self._prefix + name)

    def download(self, name: str, file: Path) -> None:
        """Get a file of any size."""
        with explained(self._name):
            download(self._client, self._settings, self._bucket, self._prefix + name, file)

    def names(self, prefix: str) -> list[str]:
        """Names of the objects that begin so, in order."""
        with explained(self._name):
            pages = list_objects(self._client, self._settings, self._bucket, self._prefix + prefix)
            return [entry["Key"].removeprefix(self._prefix) for page in pages for entry in page.get("Contents", [])]

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with explained(self._name):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)

    def age_s(self, name: str) -> float:
        """Seconds since an object was put, by the store's own clock; infinite where there is none."""
        from botocore.exceptions import ClientError

        with explained(self._name):
            try:
                head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
            except ClientError as error:
                if is_missing(error):
                    return float("inf")
                raise
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return (now - head["LastModified"]).total_seconds()

    def refuse_without_conditions(self) -> None:
        """Refuse a store that ignores the conditions of a write, on which everything here rests.

        Raises:
            Refusal: it put an object that it should have refused.
        """
        name = "conditional-writes"
        with contextlib.suppress(Conflict):
            self.put(name, b"first", replaces=None)
        try:
            self.put(name, b"second", replaces=None)
        except Conflict:
            return
        self.remove(name)  # found again, it would speak against the store also once that has learnt it
        raise Refusal(
            f"the store {_S3}{self._bucket}",
            "replaces an object although the request says If-None-Match: *",
            limit="conditional writes, without which two machines could work on one run",
            way_out="use a store that has them (AWS, MinIO), or a newer version of yours",
        )


class Lease:
    """The right to work on a run, which ends by itself when its holder no longer renews it.

    The store's clock counts its age, so that the clocks of the machines need not agree.  A holder that is held up for
    longer than the lease may come back to find another at work: what it then puts is refused (`RunStore.put`).

    Args:
        store: of the run.
        holder: who asks, for whoever has to wait.
        lease_s: seconds after the last renewal from which on another may take it.
    """

    _NAME = "lease.json"

    def __init__(self, store: RunStore, holder: str, *, lease_s: float = _LEASE_S) -> None:
        self._store, self._holder, self._lease_s = store, holder, lease_s
        # A pod that is started again may have the same name, and its process the same number.
        self._id = secrets.token_hex(8)
        self._tag = ""
        self._renewals = 0

    @contextlib.contextmanager
    def held(self, *, wait_s: float) -> Iterator[None]:
        """Hold the lease for the block.

        Raises:
            TryLater: another one still held it after `wait_s`.
        """
        self._take(wait_s)
        over = threading.Event()
        keeper = threading.Thread(target=self._renew, args=(over,), name="lease", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()
            with contextlib.suppress(Conflict, TryLater, Refusal):  # it ends by itself
                self._put_over_own("")

    def require(self) -> None:
        """Ask the store whether the lease is still this holder's; one that has ended is, until another takes it.

        Raises:
            TryLater: another one has it.
        """
        found = self._store.read(self._NAME)
        note = json.loads(found.content) if found else {}
        if note.get("lease") != self._id:
            raise TryLater(
                f"{self._holder} was held up, and {note.get('holder') or 'another one'} has taken the run over\n"
                "  what to do: try again; what that one did is kept"
            )

    def _take(self, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while True:
            found = self._store.read(self._NAME)
            other = str(json.loads(found.content)["holder"]) if found else ""
            if not other or self._store.age_s(self._NAME) >= self._lease_s:
                with contextlib.suppress(Conflict):
                    self._tag = self._store.put(
                        self._NAME, self._note(self._holder), replaces=found.tag if found else None
                    )
                    return
            elif time.monotonic() >= deadline:
                raise TryLater(
                    f"the run is worked on by {other}, and was for {wait_s:.0f} s (limit: one at a time)\n"
                    "  what to do: wait for it, or end it, then try again"
                )
            time.sleep(_PAUSE_S)

    def _renew(self, over: threading.Event) -> None:
        while not over.wait(self._lease_s / _LOOKS_PER_LEASE):
            try:
                self._put_over_own(self._holder)
            except Conflict:
                return  # taken by another; what this holder puts from now on is refused
            except (TryLater, Refusal):
                continue  # the store may be back before the lease has ended

    def _put_over_own(self, holder: str) -> None:
        """Put the lease anew in the place of this one's, also where the answer to the time before was lost.

        Raises:
            Conflict: another one has it.
        """
        try:
            self._tag = self._store.put(self._NAME, self._note(holder), replaces=self._tag)
        except Conflict:
            found = self._store.read(self._NAME)
            if found is None or json.loads(found.content).get("lease") != self._id:
                raise
            self._tag = self._store.put(self._NAME, self._note(holder), replaces=found.tag)

    def _note(self, holder: str) -> bytes:
        self._renewals += 1  # other bytes each time, and so another tag
        return json.dumps({"holder": holder, "lease": self._id, "renewals": self._renewals}).encode()


def keep_in_step(action: Callable[[], None], over: threading.Event, pause_s: float) -> threading.Thread:
    """Call something again and again until told that it is over; what it raises is for the last call to say."""

    def repeat() -> None:
        while not over.wait(pause_s):
            with contextlib.suppress(TryLater, Refusal, OSError):
                action()

    thread = threading.Thread(target=repeat, name="keep in step", daemon=True)
    thread.start()
    return thread
