"""`perch predictions`: questions to kept predictions; `perch why`: what stands behind one of them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.predictions.provenance import Provenance
    from pipelines.predictions.queries import Answer, Filter, Predictions
    from pipelines.settings import Settings

_TITLE_WIDTH = 13
_SHIPPING_S = 120  # within that, a missing prediction may still be on its way


class Format(StrEnum):
    """How an answer is written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


class CountedBy(StrEnum):
    """What predictions are counted by."""

    LABEL = "label"
    DAY = "day"
    MODEL = "model"
    CALLER = "caller"
    ENDPOINT = "endpoint"


class Origin(StrEnum):
    """Whose requests."""

    CLIENT = "client"
    MIRROR = "mirror"
    PROBE = "probe"
    ALL = "all"


def list_predictions(
    last: Annotated[int, typer.Option("--last", min=1, help="How many of the newest to list.")] = 20,
    model: Annotated[str, typer.Option("--model", help="Only this model's.")] = "",
    version: Annotated[str, typer.Option("--version", help="Only this version's, e.g. 3 or v3.")] = "",
    label: Annotated[str, typer.Option("--label", help="Only where this was predicted.")] = "",
    caller: Annotated[str, typer.Option("--caller", help="Only where this key or subject asked.")] = "",
    since: Annotated[str, typer.Option("--since", help="A date or time (UTC), or how long ago: 90m, 12h, 7d.")] = "",
    max_confidence: Annotated[
        float | None, typer.Option("--max-confidence", min=0, max=1, help="Only where the model was at most this sure.")
    ] = None,
    origin: Annotated[
        Origin,
        typer.Option("--origin", help="Only what clients asked, copies of it that a canary got, probes, or all."),
    ] = Origin.CLIENT,
    count: Annotated[CountedBy | None, typer.Option("--count", help="Count them by this instead of listing.")] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="Hold them against the feedback instead of listing.")
    ] = False,
    sql: Annotated[
        str, typer.Option("--sql", help="Answer this query over the tables predictions and feedback instead.")
    ] = "",
    format_: Annotated[
        Format | None, typer.Option("--format", help="How to write the answer; by the name of --out, else a table.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write into this file; Parquet needs it.")] = None,
) -> None:
    """List the newest kept predictions, count them, hold them against feedback, or answer a query."""
    from datetime import UTC, datetime

    from pipelines.errors import Refusal
    from pipelines.predictions.queries import Filter, Predictions, parse_since
    from pipelines.predictions.stores import open_store
    from pipelines.settings import get_settings

    if (count is not None) + accuracy + bool(sql) > 1:
        raise Refusal("--count, --accuracy and --sql", "given together", limit="one of them")
    if sql and (label or caller or max_confidence is not None):
        raise Refusal("--label, --caller and --max-confidence", "do not go with --sql", way_out="write them as `where`")
    format_ = format_ or _format_of(out)
    if format_ is Format.PARQUET and out is None:
        raise Refusal("--format parquet", "needs a file", way_out="name one with --out")
    now = datetime.now(UTC).replace(tzinfo=None)
    wanted = Filter(
        model=model,
        version=version.removeprefix("v"),
        label=label,
        caller=caller,
        since=parse_since(since, now) if since else None,
        max_confidence=max_confidence,
        origin="" if origin is Origin.ALL else origin.value,
    )
    store = open_store(get_settings())
    with Predictions(store) as predictions:
        answer = _answer(predictions, wanted, last=last, count=count, accuracy=accuracy, sql=sql)
    if not answer.rows and format_ is Format.TABLE:
        typer.echo(f"No such prediction in {store.name}.")
        return
    _write(answer, format_, out, listed=not (count or accuracy or sql))


def why(
    prediction_id: Annotated[str, typer.Argument(help="As the answer gave it.", metavar="ID")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print what stands behind a prediction, from model to approval; exit 1 where something does not fit."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from pipelines.predictions.queries import as_json as simplify
    from pipelines.settings import get_settings

    provenance = _trace(get_settings(), prediction_id.strip().upper())
    if as_json:
        typer.echo(json.dumps(asdict(provenance), default=simplify, indent=2))
    else:
        _print_chain(provenance, Console(highlight=False))
    if provenance.problems:
        raise typer.Exit(1)


def _answer(
    predictions: Predictions, wanted: Filter, *, last: int, count: CountedBy | None, accuracy: bool, sql: str
) -> Answer:
    if count is not None:
        return predictions.count(wanted, count.value)
    if accuracy:
        return predictions.accuracy(wanted)
    if sql:
        return predictions.ask(sql, wanted.selection)
    return predictions.latest(wanted, last)


def _format_of(out: Path | None) -> Format:
    """What a file's name promises; a table where it promises nothing."""
    suffix = out.suffix.removeprefix(".").casefold() if out else ""
    return Format(suffix) if suffix in set(Format) else Format.TABLE


def _trace(settings: Settings, prediction_id: str) -> Provenance:
    """Find the prediction, and put together what the ledger and the run's folder know about its model."""
    from datetime import UTC, datetime, timedelta

    from pipelines.core.prediction_ids import time_of
    from pipelines.core.workspace import Workspace
    from pipelines.errors import Refusal, TryLater
    from pipelines.predictions.provenance import RunFacts, explain, find_registration, read_run_facts
    from pipelines.predictions.queries import Predictions
    from pipelines.predictions.stores import open_store
    from pipelines.registry.ledger import Ledger

    try:
        made = time_of(prediction_id)
    except ValueError as error:
        raise Refusal(
            "the prediction's id", repr(prediction_id), limit=str(error), way_out="copy `prediction_id` of the answer"
        ) from error
    store = open_store(settings)
    with Predictions(store) as predictions:
        row = predictions.find(prediction_id)
        if row is None:
            if timedelta(0) <= datetime.now(UTC) - made < timedelta(seconds=_SHIPPING_S):
                raise TryLater(
                    f"prediction {prediction_id} is not in {store.name} yet; the service ships what it keeps every "
                    "PERCH_SERVING_FLUSH_INTERVAL_S seconds (10 on one machine, 60 where nobody says otherwise)\n"
                    "  what to do: ask again after that"
                )
            raise Refusal(
                f"prediction {prediction_id}",
                f"made {made:%Y-%m-%d %H:%M:%S} UTC, is not in {store.name}",
                way_out="check PERCH_PREDICTIONS_URL, and whether the service kept predictions then",
            )
        feedback = predictions.feedback(prediction_id)
    ledger = Ledger(settings.ledger_url)
    try:
        records = ledger.entries()
    finally:
        ledger.close()
    registered = find_registration(row, records)
    run_id = str(registered.get("run_id", "")) if registered else ""
    run = read_run_facts(Workspace(settings.runs_dir / run_id), registered) if registered and run_id else RunFacts()
    return explain(row, feedback, records, run)


def _print_chain(provenance: Provenance, console: Console) -> None:
    from pipelines.predictions.provenance import describe

    for title, facts in describe(provenance):
        for number, line in enumerate(_fill(facts, console.width - _TITLE_WIDTH)):
            console.print(f"{title if number == 0 else '':{_TITLE_WIDTH}}", style="bold", end="")
            console.print(line, markup=False, soft_wrap=True)
    for problem in provenance.problems:
        console.print(f"✗ {problem}", style="red", markup=False, soft_wrap=True)


def _fill(facts: list[str], width: int) -> list[str]:
    """Facts in lines, none broken in two."""
    lines: list[str] = []
    for fact in facts:
        if lines and len(lines[-1]) + len(fact) + 3 <= width:
            lines[-1] += f" · {fact}"
        else:
            lines.append(fact)
    return lines


def _write(answer: Answer, format_: Format, out: Path | None, *, listed: bool) -> None:
    import csv
    import io

    from pipelines.predictions.queries import as_json, dump_json

    if format_ is Format.PARQUET:
        import pyarrow as pa
        from pyarrow import parquet

        assert out is not None  # noqa: S101 - checked before anything was read
        columns = zip(*answer.rows, strict=True) if answer.rows else [()] * len(answer.columns)
        by_label = pa.map_(pa.string(), pa.float32())
        table = {
            name: pa.array(column, by_label if name == "probabilities" else None)
            for name, column in zip(answer.columns, map(_with_pairs, columns), strict=True)
        }
        parquet.write_table(pa.table(table), out, compression="zstd")
        return
    if format_ is Format.JSON:
        text = dump_json(answer.records())
    elif format_ is Format.CSV:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows([as_json(value) for value in row] for row in answer.rows)
        text = stream.getvalue().removesuffix("\n")
    else:
        text = _as_table(answer, listed=listed)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    else:
        typer.echo(text)


def _with_pairs(column: Iterable[object]) -> list[object]:
    """A column's values, mappings as Arrow takes them: lists of pairs."""
    return [list(value.items()) if isinstance(value, dict) else value for value in column]


def _as_table(answer: Answer, *, listed: bool) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    console = Console(highlight=False)
    if listed:
        # What fits into 80 columns; --format has them all.
        table.add_column("id", no_wrap=True, min_width=26, style="bold")
        table.add_column("time (UTC)", no_wrap=True, min_width=14)
        table.add_column("label", overflow="ellipsis", no_wrap=True, min_width=8)
        table.add_column("sure", justify="right", no_wrap=True, min_width=4)
        table.add_column("version", no_wrap=True, min_width=7)
        table.add_column("caller", overflow="ellipsis", no_wrap=True)
        for row in answer.records():
            table.add_row(
                row["prediction_id"],
                f"{row['time']:%m-%d %H:%M:%S}",
                _plain(row["label"]),
                f"{row['confidence']:.2f}",
                f"v{row['model_version']}",
                _plain(row["caller"]),
            )
    else:
        for name in answer.columns:
            table.add_column(name, overflow="fold")
        for cells in answer.rows:
            table.add_row(*(_plain(cell) for cell in cells))
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").splitlines())


def _plain(cell: object) -> str:
    return "" if cell is None else str(cell).replace("[", "\\[")
