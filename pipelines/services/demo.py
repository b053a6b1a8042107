"""The demo: two consecutive weeks of digits through the real training DAG, shown as they happen."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pipelines.core.locking import hold
from pipelines.core.own_command import own_command
from pipelines.core.stage_graph import STEPS_AFTER_DVC, read_stage_graph
from pipelines.errors import PerchError, Refusal, TryLater
from pipelines.release.airflow_approvals import DAG_ID as RELEASE_DAG_ID
from pipelines.release.targets import Slot
from pipelines.services.airflow_client import AirflowClient, TaskState
from pipelines.services.demo_release import APPROVER, LIMITS, follow_release
from pipelines.services.programs import Ports, common_environment, tool
from pipelines.services.rollouts import read_champions
from pipelines.services.secrets import ensure_demo_key, ensure_passwords, passwords_file
from pipelines.services.stack import Stack
from pipelines.settings import Settings

DAG_ID = "ml_training_pipeline"
WEEKS = (date(2026, 11, 1), date(2026, 11, 8))
_FINISHED = {"success", "failed"}
_KEPT_LIMIT_S = 60.0


@dataclass
class WeekView:
    """What is known of one week's DAG run so far."""

    title: str
    run_id: str
    steps: tuple[str, ...]
    tasks: dict[str, TaskState] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def render(self) -> RenderableType:
        """The table of the week's tasks."""
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(width=2)
        table.add_column(width=20)
        table.add_column(ratio=1, overflow="fold", min_width=30)
        table.add_column(justify="right", no_wrap=True, min_width=9)
        for step in self.steps:
            task = self.tasks.get(step)
            state = task.state if task else ""
            summary = self.results.get(step, {}).get("summary", "" if state == "success" else state.replace("_", " "))
            seconds = f"{task.duration_s:.1f} s" if task and task.duration_s is not None else ""
            table.add_row(_mark(state), step, Text(summary, style="" if state == "success" else "dim"), seconds)
        return Group(Text(self.title, style="bold"), table)


def run_demo(settings: Settings, *, stay: bool) -> None:
    """Start the services, run the weeks that have not been run, print what came of them, stay up until Ctrl-C.

    Raises:
        Refusal: the environment would have it run or release elsewhere than on this machine.
        TryLater: another demo is at work in the home.
        PerchError: a service did not start, or a week's run failed; the message holds the task's last lines.
    """
    _refuse_elsewhere(settings)
    with _alone(settings.home / "demo.lock"):
        _run_demo(settings, stay=stay)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keep two demos apart: the second's requests would count for the first's canary, whose end would end both."""
    with ExitStack() as held:
        try:
            held.enter_context(hold(lock, wait_s=0))
        except TryLater:
            raise TryLater(
                f"another demo is at work here (process {lock.read_text(encoding='utf-8') or 'unknown'})\n"
                "  what to do: wait for its end, or end it by Ctrl-C where it runs"
            ) from None
        yield


def _run_demo(settings: Settings, *, stay: bool) -> None:
    console = Console(highlight=False)
    home = (
        settings.home.relative_to(settings.project_dir)
        if settings.home.is_relative_to(settings.project_dir)
        else settings.home
    )
    console.print(
        f"[bold]Perch demo[/bold] · everything stays in {home}/ and ends with {'Ctrl-C' if stay else 'the demo'}"
    )
    stack = Stack(settings)
    was_up = bool(stack.status())
    # `kill` must end the services as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        ports = _start(stack, console)
        passwords = ensure_passwords(settings)
        client = AirflowClient(ports.airflow_uri, "admin", passwords["admin"])
        client.wait_for_dag(DAG_ID)
        steps = (*(node.name for node in read_stage_graph(settings.project_dir / "dvc.yaml")), *STEPS_AFTER_DVC)
        approver = AirflowClient(ports.airflow_uri, APPROVER, passwords[APPROVER])
        client.wait_for_dag(RELEASE_DAG_ID)
        weeks = []
        for number, day in enumerate(WEEKS, start=1):
            week = _run_week(client, console, number, day, steps)
            version = str(week.results["model_packaging"]["version"])
            follow_release(settings, console, client, approver, ports.serving_uri, version)
            console.print()
            weeks.append(week)
        ending = not stay and not was_up and stack.has_started
        _print_outcome(console, settings, client, weeks, ports, ending=ending)
        _show_predictions(stack, console, ports)
        if stay:
            console.print("\nAll of it stays up until Ctrl-C.")
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        console.print()
    finally:
        stays_up = was_up or not stack.has_started  # somebody else's, who may be starting them at the same time
        if not stays_up:
            with console.status("ending the services"):
                stack.down()
    perch = own_command()
    if stays_up:
        console.print(f"The services were up before, and stay so; [bold]{perch} down[/bold] ends them.")
    else:
        console.print(f"Services ended; [bold]{perch} up[/bold] starts them again with everything in place.")


def _refuse_elsewhere(settings: Settings) -> None:
    """Refuse to train in a cluster's pods, or to release digits to its clients, because somebody has exported that."""
    for variable, value in (("PERCH_RUNNER", settings.runner), ("PERCH_TARGET", settings.target)):
        if value != "local":
            raise Refusal(variable, value, limit="local: the demo keeps to this machine", way_out=f"unset {variable}")


def _start(stack: Stack, console: Console) -> Ports:
    started = time.monotonic()
    with console.status("starting services") as spinner:
        ports = stack.up(spinner.update)
    console.print(
        f"  services   MLflow {ports.mlflow_uri} · Airflow {ports.airflow_uri}"
        f" (admin / see {passwords_file(stack.settings).name}) · up in {time.monotonic() - started:.0f} s\n"
    )
    return ports


def _run_week(client: AirflowClient, console: Console, number: int, day: date, steps: tuple[str, ...]) -> WeekView:
    run_id, state = _choose_run(client, day)
    week = WeekView(f"Week {number} · {day}" + (" · done before" if state == "success" else ""), run_id, steps)
    if state is None:
        client.trigger(DAG_ID, run_id, {"as_of": day.isoformat(), "source": "digits", "release": LIMITS})
    with Live(console=console, refresh_per_second=8, get_renderable=week.render) as live:
        while True:
            state = client.dag_run_state(DAG_ID, run_id)
            _refresh(client, week)
            live.refresh()
            if state in _FINISHED:
                break
            time.sleep(1)
    console.print()
    if state == "failed":
        raise PerchError(_explain_failure(client, week))
    return week


def _choose_run(client: AirflowClient, day: date) -> tuple[str, str | None]:
    """The week's run to show or to start: the first that has not failed."""
    attempt = 1
    while True:
        run_id = f"demo__{day}" + (f"__{attempt}" if attempt > 1 else "")
        state = client.dag_run_state(DAG_ID, run_id)
        if state != "failed":
            return run_id, state
        attempt += 1


def _refresh(client: AirflowClient, week: WeekView) -> None:
    week.tasks = client.tasks(DAG_ID, week.run_id)
    for step in week.steps:
        task = week.tasks.get(step)
        if task and task.state == "success" and step not in week.results:
            result = client.result(DAG_ID, week.run_id, step)
            if result is not None:
                week.results[step] = result


def _explain_failure(client: AirflowClient, week: WeekView) -> str:
    failed = next((task for task in week.tasks.values() if task.state == "failed"), None)
    if failed is None:
        return f"run {week.run_id} failed before any task did; look at it in Airflow"
    lines = "\n".join(f"    {line}" for line in client.log_tail(DAG_ID, week.run_id, failed))
    return (
        f"{failed.task_id} of run {week.run_id} failed; the end of its log:\n{lines}\n"
        "  what to do: mend that, then `make demo` again"
    )


def render_outcome(weeks: list[WeekView], aliases: Mapping[str, str | None]) -> Table:
    """A row for each week's version.

    Args:
        weeks: that are done.
        aliases: alias to version, as they are in the end.
    """
    table = Table("version", "images", "test accuracy", "95 % interval", "took", box=None, padding=(0, 2, 0, 0))
    for week in weeks:
        staged, metrics = week.results["deploy_to_staging"], week.results["model_evaluation"]["metrics"]
        images = week.results["data_ingestion"]["metrics"]["data/images"]
        took = sum(task.duration_s or 0.0 for task in week.tasks.values())
        name = f"{staged['model']} v{staged['version']}"
        table.add_row(
            ", ".join([name, *(alias for alias, version in aliases.items() if version == staged["version"])]),
            f"{images:,.0f}",
            f"{metrics['test/accuracy']:.3f}",
            f"[{metrics['test/accuracy_low']:.3f}, {metrics['test/accuracy_high']:.3f}]".replace("[", r"\["),
            f"{took:.0f} s",
        )
    return table


def print_addresses(console: Console, settings: Settings, ports: Ports, card: str, *, ending: bool) -> None:
    """Print where each web page is.

    Args:
        console: where to.
        settings: whose home has the passwords.
        ports: of the services.
        card: address of the last model card; empty where there is none.
        ending: whether the services end with the demo, and their addresses with them.
    """
    console.print()
    if ending:
        up = f"[bold]{own_command()} up[/bold]"
        console.print(f"The services end with this demo; what is below holds again after {up}.", soft_wrap=True)
    console.print(f"MLflow   {ports.mlflow_uri}")
    log_in = f"log in as admin, passwords in {passwords_file(settings)}"
    console.print(f"Airflow  {ports.airflow_uri}   {log_in}", soft_wrap=True)
    if card:
        console.print(f"Card     {card}", soft_wrap=True)


def _print_outcome(
    console: Console, settings: Settings, client: AirflowClient, weeks: list[WeekView], ports: Ports, *, ending: bool
) -> None:
    champions = read_champions(settings, weeks[-1].results["deploy_to_staging"]["model"])
    console.print(render_outcome(weeks, champions.as_aliases()))
    card = client.links(DAG_ID, weeks[-1].run_id, "model_evaluation").get("Model card", "")
    print_addresses(console, settings, ports, card, ending=ending)
    perch = own_command()
    looks = " · ".join(f"{perch} {words}" for words in ("models", "models show 2", "runs", "ledger verify"))
    console.print(f"Look at  {looks}", soft_wrap=True)


def _show_predictions(stack: Stack, console: Console, ports: Ports) -> None:
    """Ask the champion about a real digit, as a client would, and show how `perch why` explains the answer."""
    served = stack.target.state().slots[Slot.STABLE]
    key = ensure_demo_key(stack.settings)
    image = stack.settings.project_dir / "docs" / "seven.png"
    console.print(f"\nServed   {served.model} v{served.version} at {ports.serving_uri}")
    headers = {"X-API-Key": key, "Content-Type": "image/png"}
    response = httpx.post(f"{ports.serving_uri}/v1/predict", content=image.read_bytes(), headers=headers)
    answer = response.raise_for_status().json()
    probability = answer["probabilities"][answer["label"]]
    shown = image.relative_to(stack.settings.project_dir)
    console.print(f"         {shown} is a {answer['label']}, says v{answer['model']['version']} ({probability:.3f})")
    command = f'curl -F image=@{shown} {ports.serving_uri}/v1/predict -H "X-API-Key: {key}"'
    console.print(f"Try it   {command}", soft_wrap=True)
    console.print(f"Ask why  {own_command()} why {answer['prediction_id']}")
    _print_why(stack.settings, console, answer["prediction_id"])
    console.print("Break it make demo-faults")


def _print_why(settings: Settings, console: Console, prediction_id: str) -> None:
    """Print `perch why`; an answer is kept some seconds after it was given."""
    environment = {**os.environ, **common_environment(settings, Stack(settings).ports()), "COLUMNS": "100"}
    command = [tool("perch"), "why", prediction_id]
    deadline = time.monotonic() + _KEPT_LIMIT_S
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0 or time.monotonic() > deadline:
            break
        time.sleep(2)
    console.print(Text("\n".join(f"  {line}" for line in (done.stdout or done.stderr).splitlines())))


def _mark(state: str) -> RenderableType:
    if state == "success":
        return Text("✓", style="green")
    if state in {"failed", "upstream_failed"}:
        return Text("✗", style="red")
    if state in {"running", "queued"}:
        return Spinner("dots", style="cyan")
    return Text("↻", style="yellow") if state == "up_for_retry" else Text("·", style="dim")
