"""Where rollouts are kept between two calls of the release engine: one row each, beside the ledger.

A row is a document with three guards, each a condition of the one UPDATE that writes it, so that it holds on SQLite and
PostgreSQL alike:

- `revision` counts the writes: whoever writes over a row that changed since it was read is refused (compare and set);
- the **lease** says who may move the rollout forward now, and until when; taking it gives a higher **token**, and what
  comes with an older token is refused, so that a holder who slept through its lease cannot write any more;
- `open_model` is unique: a model has one unfinished rollout at a time.

Unlike the ledger, a row changes.  What must not be forgotten is in the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.core.hash_chain import canonical_json
from pipelines.core.patience import be_patient
from pipelines.core.rollout_rows import RolloutRow, StaleRolloutError
from pipelines.errors import Refusal, TryLater
from pipelines.registry.database import SQLITE_WAIT_S, Database
from pipelines.registry.schema import ROLLOUTS, metadata
from pipelines.registry.transactions import reading, writing

if TYPE_CHECKING:
    from sqlalchemy import Connection, RowMapping

T = TypeVar("T")


class RolloutTable:
    """The rollouts behind one SQLAlchemy URL, the ledger's.

    Args:
        url: SQLAlchemy's.
        patient: wait for a database that is away, for up to a minute; a watchdog cannot.

    Raises:
        Refusal: the URL names another kind of database than SQLite or PostgreSQL.
    """

    def __init__(self, url: str, *, patient: bool = True) -> None:
        self._patient = patient
        self._database = Database(url, wait_s=SQLITE_WAIT_S if patient else 0.5)
        self._table = metadata().tables[ROLLOUTS]

    def create(self, rollout_id: str, model: str, document: Mapping[str, Any], *, now: float) -> RolloutRow:
        """Begin a rollout; one that exists is returned as it is.

        Raises:
            Refusal: the model has another rollout that has not ended.
            TryLater: the database did not answer.
        """
        from sqlalchemy import func, select

        columns = self._table.c

        def write(connection: Connection) -> RolloutRow:
            known = self._find(connection, columns.rollout_id == rollout_id)
            if known is not None:
                return known
            other = self._find(connection, columns.open_model == model)
            if other is not None:
                raise Refusal(
                    f"a release of {model}",
                    f"is under way already ({other.rollout_id})",
                    limit="one at a time",
                    way_out=f"wait for it (`perch releases watch`), or end it: `perch rollback {model} --reason …`",
                )
            last = connection.execute(select(func.max(columns.sequence))).scalar()
            connection.execute(
                self._table.insert().values(
                    rollout_id=rollout_id,
                    model=model,
                    open_model=model,
                    sequence=(last or 0) + 1,
                    revision=1,
                    document=canonical_json(document),
                    lease_owner="",
                    lease_expires_at=0.0,
                    token=0,
                    renewals=0,
                    renewed_at=now,
                )
            )
            return self._required(connection, rollout_id)

        return self._write(write)

    def take_lease(self, rollout_id: str, owner: str, *, lease_s: float, now: float) -> RolloutRow:
        """Take or renew the right to move a rollout.

        Args:
            rollout_id: names it.
            owner: the same for every call of one process, another for every other.
            lease_s: how long it holds.
            now: seconds since the epoch.

        Raises:
            TryLater: somebody else holds it, or the database did not answer.
        """
        columns = self._table.c

        def write(connection: Connection) -> RolloutRow:
            row = self._required(connection, rollout_id)
            left_s = row.lease_expires_at - now
            # No lease ends later than lease_s from now; one that does was taken by a clock that was set back since.
            if row.lease_owner not in ("", owner) and 0 < left_s <= lease_s:
                raise TryLater(
                    f"{rollout_id}: {row.lease_owner} moves this release, for {left_s:.0f} s more unless it goes on "
                    "(limit: one at a time)\n  what to do: nothing; the next call finds out"
                )
            connection.execute(
                self._table.update()
                .where(columns.rollout_id == rollout_id)
                .values(
                    lease_owner=owner,
                    lease_expires_at=now + lease_s,
                    token=columns.token + (0 if row.lease_owner == owner and left_s > 0 else 1),
                    renewals=columns.renewals + 1,
                    renewed_at=now,
                )
            )
            return self._required(connection, rollout_id)

        return self._write(write)

    def release_lease(self, rollout_id: str, token: int) -> None:
        """Let the next one move the rollout at once; nothing happens where the lease is somebody else's by now."""
        columns = self._table.c
        self._write(
            lambda connection: connection.execute(
                self._table.update()
                .where(columns.rollout_id == rollout_id, columns.token == token)
                .values(lease_owner="", lease_expires_at=0.0)
            )
        )

    def save(self, row: RolloutRow, document: Mapping[str, Any], *, is_open: bool, force: bool = False) -> RolloutRow:
        """Write a document over the row as it was read.

        Args:
            row: as it was read; its token and revision must still be the row's.
            document: the new one.
            is_open: whether the rollout still has a step to go.
            force: take the right to move it from whoever holds it: a rollback waits for nobody.

        Raises:
            StaleRolloutError: the row was written, or its lease taken, since; with `force` only the former counts.
            TryLater: the database did not answer.
        """
        columns = self._table.c
        condition = [columns.rollout_id == row.rollout_id, columns.revision == row.revision]
        taken: dict[str, Any] = {}
        if force:
            taken = {"token": columns.token + 1, "lease_owner": "", "lease_expires_at": 0.0}
        else:
            condition.append(columns.token == row.token)

        text = canonical_json(document)
        attempts = 0

        def write(connection: Connection) -> RolloutRow:
            nonlocal attempts
            attempts += 1
            written = connection.execute(
                self._table.update()
                .where(*condition)
                .values(
                    document=text,
                    open_model=row.model if is_open else None,
                    revision=columns.revision + 1,
                    **taken,
                )
            )
            if written.rowcount != 1:
                # The connection may have been lost between an earlier attempt's commit and the answer to it.
                found = self._find(connection, columns.rollout_id == row.rollout_id) if attempts > 1 else None
                expected = (row.revision + 1, row.token + (1 if force else 0), is_open)
                if (
                    found is not None
                    and (found.revision, found.token, found.is_open) == expected
                    and canonical_json(found.document) == text
                ):
                    return found
                raise StaleRolloutError(f"{row.rollout_id}: somebody else moved this release meanwhile")
            return self._required(connection, row.rollout_id)

        return self._write(write)

    def read(self, rollout_id: str) -> RolloutRow | None:
        """One rollout."""
        found = self._select(self._table.c.rollout_id == rollout_id)
        return found[0] if found else None

    def list_rollouts(self, model: str = "") -> list[RolloutRow]:
        """All rollouts, or those of one model, in the order of their beginnings.

        Raises:
            TryLater: the database did not answer.
        """
        return self._select(self._table.c.model == model) if model else self._select()

    def list_current(self) -> list[RolloutRow]:
        """Of each model the unfinished rollout and the last one: all that a watchdog has to look at.

        Raises:
            TryLater: the database did not answer.
        """
        from sqlalchemy import func, or_, select

        columns = self._table.c
        last = select(func.max(columns.sequence)).group_by(columns.model)
        return self._select(or_(columns.open_model.is_not(None), columns.sequence.in_(last)))

    def _select(self, *conditions: Any) -> list[RolloutRow]:
        def read() -> list[RolloutRow]:
            from sqlalchemy import select

            query = select(self._table).where(*conditions).order_by(self._table.c.sequence)
            with reading(self._database, self._table) as connection:
                if connection is None:
                    return []
                return [_to_row(values) for values in connection.execute(query).mappings()]

        return self._call(read)

    def close(self) -> None:
        """Give the connections back."""
        self._database.close()

    def _write(self, operation: Callable[[Connection], T]) -> T:
        def attempt() -> T:
            with writing(self._database, self._table, _ADVISORY_LOCK) as connection:
                return operation(connection)

        return self._call(attempt)

    def _find(self, connection: Connection, *conditions: Any) -> RolloutRow | None:
        from sqlalchemy import select

        values = connection.execute(select(self._table).where(*conditions)).mappings().one_or_none()
        return _to_row(values) if values else None

    def _required(self, connection: Connection, rollout_id: str) -> RolloutRow:
        row = self._find(connection, self._table.c.rollout_id == rollout_id)
        if row is None:
            raise Refusal(f"the release {rollout_id}", "is not there", way_out="`perch releases` lists them")
        return row

    def _call(self, operation: Callable[[], T]) -> T:
        from sqlalchemy.exc import OperationalError

        name = f"the ledger's database {self._database.shown_url}"
        if self._patient:
            return be_patient(operation, transient=lambda error: isinstance(error, OperationalError), name=name)
        try:
            return operation()
        except OperationalError as error:
            cause = str(error).strip().splitlines()[0]
            raise TryLater(
                f"{name}: {cause}\n  what to do: see that it is up (`perch status`), then try again"
            ) from error


_ADVISORY_LOCK = 0x7065726369  # the number after the ledger's: the two tables are written independently


def _to_row(values: RowMapping) -> RolloutRow:
    return RolloutRow(
        rollout_id=values["rollout_id"],
        model=values["model"],
        is_open=values["open_model"] is not None,
        sequence=values["sequence"],
        revision=values["revision"],
        document=json.loads(values["document"]),
        lease_owner=values["lease_owner"],
        lease_expires_at=values["lease_expires_at"],
        token=values["token"],
        renewals=values["renewals"],
        renewed_at=values["renewed_at"],
    )
