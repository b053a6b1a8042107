"""`perch approvals`, `perch approve` and `perch reject`: what waits for an answer in Airflow, and giving it there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from pipelines.release.airflow_approvals import Ask
    from pipelines.settings import Settings

app = typer.Typer(help="List what waits for an approval, or show the page that is to be read.", no_args_is_help=False)

VersionArgument = Annotated[str, typer.Argument(help="Number of the version, e.g. 3 or v3.", metavar="VERSION")]
ModelOption = Annotated[str, typer.Option("--model", help="Registered model; the one of params.yaml by default.")]
AsOption = Annotated[
    str, typer.Option("--as", metavar="USER", help="Airflow user to answer as; the first approver by default.")
]


@app.callback(invoke_without_command=True)
def list_approvals(context: typer.Context) -> None:
    """List what waits for an approval: which version, since when, who may answer, and where."""
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from pipelines.cli.models import wide_console
    from pipelines.release.airflow_approvals import AirflowApprovals
    from pipelines.services.airflow_access import find_airflow_uri, open_airflow
    from pipelines.settings import get_settings

    settings, console = get_settings(), wide_console()
    asks = _undecided(settings, AirflowApprovals(open_airflow(settings)).open_asks())
    if not asks:
        console.print("Nothing waits for an approval.")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("asked (UTC)", "what", "who may answer", "evidence"):
        table.add_column(title, no_wrap=title != "what")
    for ask in asks:
        who = ", ".join(ask.assigned)
        table.add_row(f"{ask.asked_at:%Y-%m-%d %H:%M}", ask.subject, who, ask.evidence_sha256[:12])
    console.print(table)
    for ask in asks:
        console.print(f"{find_airflow_uri(settings)}{ask.page}", highlight=False)


@app.command("page")
def show_page(
    rollout: Annotated[str, typer.Argument(help="Id of the release; what is under way by default.")] = "",
) -> None:
    """Print what an approver reads: numbers beside the champion's, staging, what the rollout will need, the card."""
    from rich.markdown import Markdown

    from pipelines.services.rollouts import find_rollout, write_approval_page
    from pipelines.settings import get_settings

    settings = get_settings()
    page = write_approval_page(settings, find_rollout(settings, rollout))
    Console().print(Markdown(f"# {page.subject}\n\n{page.body}"))


@app.command("note")
def leave_note(
    run: Annotated[str, typer.Argument(help="Run of model_release.")],
    task: Annotated[str, typer.Argument(help="Its task that asks.")],
    text: Annotated[str, typer.Argument(help="Replaces the note before it.")],
    map_index: Annotated[int, typer.Option("--map-index", min=-1, help="Of a mapped task.")] = -1,
) -> None:
    """Write a note beside a request in Airflow, such as why an answer to it does not count."""
    from pipelines.release.airflow_approvals import AirflowApprovals
    from pipelines.services.airflow_access import open_airflow
    from pipelines.settings import get_settings

    AirflowApprovals(open_airflow(get_settings())).leave_note(run, task, map_index, text)


def approve(
    version: VersionArgument,
    comment: Annotated[str, typer.Option("--comment", help="Why, for the ledger.")] = "",
    model: ModelOption = "",
    user: AsOption = "",
) -> None:
    """Approve the release of a version, as a user of Airflow who was asked; the answer is recorded there."""
    settings, name, number = _subject(version, model)
    ask = _open_asks(settings, name, number)[0]
    _refuse_what_would_not_count(settings, ask, _choose_user(settings, user), comment)
    _answer(settings, ask, _choose_user(settings, user), approve=True, comment=comment)
    typer.echo("The engine weighs it by the promotion policy at its next look; `perch releases` shows what it did.")


def reject(
    version: VersionArgument,
    comment: Annotated[str, typer.Option("--comment", help="Why; without it a rejection does not count.")],
    model: ModelOption = "",
    user: AsOption = "",
) -> None:
    """Reject the release of a version, as a user of Airflow who was asked; nothing of it will go live."""
    from pipelines.errors import Refusal

    if not comment.strip():
        raise Refusal("--comment", "is empty", limit="why it is rejected", way_out="say it in a sentence")
    settings, name, number = _subject(version, model)
    for ask in _open_asks(settings, name, number):
        _answer(settings, ask, _choose_user(settings, user), approve=False, comment=comment)


def _subject(version: str, model: str) -> tuple[Settings, str, int]:
    from pipelines.cli.models import default_params, parse_version
    from pipelines.settings import get_settings

    return get_settings(), model or default_params().model_name, parse_version(version)


def _choose_user(settings: Settings, user: str) -> str:
    return user or settings.airflow_user or next(iter(settings.approvers.split()), "")


def _open_asks(settings: Settings, model: str, version: int) -> list[Ask]:
    from pipelines.errors import Refusal
    from pipelines.release.airflow_approvals import AirflowApprovals
    from pipelines.services.airflow_access import how_to_release, open_airflow

    asks = _undecided(settings, AirflowApprovals(open_airflow(settings)).open_asks(model, str(version)))
    if not asks:
        raise Refusal(
            f"the release of {model} v{version}",
            "waits for no answer",
            way_out="`perch approvals` lists what does, `perch releases` what became of it; to have it asked for, "
            + how_to_release(settings, str(version)),
        )
    return asks


def _refuse_what_would_not_count(settings: Settings, ask: Ask, user: str, comment: str) -> None:
    """An answer can be given once: one that the policy denies is refused before it is recorded."""
    from datetime import UTC, datetime

    from pipelines.errors import Refusal
    from pipelines.release.approvals import Response
    from pipelines.services.rollouts import open_engine

    answer = Response(user, datetime.now(UTC), True, ask.evidence_sha256, comment)
    decision = open_engine(settings).weigh(ask.rollout_id, answer)
    denial = next((denial for denial in reversed(decision.denials) if denial.responder == user), None)
    if denial is not None and answer not in decision.approvals:
        raise Refusal(
            f"the approval by {user}",
            f"would not count: {denial.reason}",
            limit=f"the promotion policy, rule {denial.rule}",
            way_out="`perch approvals page` shows what is asked; `--as USER` answers as another",
        )


def _undecided(settings: Settings, asks: list[Ask]) -> list[Ask]:
    """Without the requests of releases that ended meanwhile: an answer to one of these would change nothing."""
    from pipelines.services.rollouts import list_rollouts

    ended = {state.rollout_id for state in list_rollouts(settings) if state.is_finished}
    return [ask for ask in asks if ask.rollout_id not in ended]


def _answer(settings: Settings, ask: Ask, user: str, *, approve: bool, comment: str) -> None:
    from pipelines.release.airflow_approvals import AirflowApprovals
    from pipelines.services.airflow_access import open_airflow

    AirflowApprovals(open_airflow(settings, user)).answer(ask, approve=approve, comment=comment)
    word = "approved" if approve else "rejected"
    typer.echo(f"{word} as {user}: {ask.subject} (evidence {ask.evidence_sha256[:12]})")
