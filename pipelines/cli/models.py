"""`perch models`: the registered versions, and the model card of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from pipelines.params import Params
    from pipelines.registry.models import RegisteredVersion

app = typer.Typer(help="List registered versions, or show the model card of one.", no_args_is_help=False)

ModelOption = Annotated[str, typer.Option("--model", help="Registered model; the one of params.yaml by default.")]


@app.callback(invoke_without_command=True)
def list_models(context: typer.Context, model: ModelOption = "") -> None:
    """List a model's versions: aliases, test accuracy, images, when, from which run, and the release made of each."""
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from pipelines.registry.models import list_versions
    from pipelines.registry.released_version import packaged_digests
    from pipelines.settings import get_settings

    console = wide_console()
    name = model or default_params().model_name
    versions = list_versions(get_settings(), name)
    if not versions:
        console.print(f"{name} has no registered version yet; `perch run` makes one.", highlight=False)
        return
    releases = packaged_digests(get_settings(), name)
    table = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("version", style="bold", no_wrap=True)
    table.add_column("aliases", style="green")
    table.add_column("test accuracy", no_wrap=True)
    table.add_column("images", justify="right")
    table.add_column("registered (UTC)", no_wrap=True)
    table.add_column("release", no_wrap=True)
    table.add_column("run", overflow="fold")
    for version in versions:
        table.add_row(
            f"v{version.version}",
            ", ".join(version.aliases),
            format_accuracy(version),
            f"{version.data_rows:,}" if version.data_rows is not None else "",
            f"{version.registered_at:%Y-%m-%d %H:%M}",
            releases.get(version.version, "")[:12],
            version.run_id,
        )
    console.print(table)


@app.command("show")
def show_card(
    version: Annotated[str, typer.Argument(help="Number of the version, e.g. 3 or v3.", metavar="VERSION")],
    model: ModelOption = "",
) -> None:
    """Print the model card of a version, and which release was made of it."""
    from rich.markdown import Markdown

    from pipelines.registry.models import get_version, read_card
    from pipelines.registry.released_version import packaged_digests
    from pipelines.settings import get_settings

    settings = get_settings()
    found = get_version(settings, model or default_params().model_name, parse_version(version))
    Console().print(Markdown(read_card(settings, found)))
    release = packaged_digests(settings, found.model).get(found.version)
    made = f"release {release}" if release else f"no release yet; `perch package {found.version}` makes it"
    Console(soft_wrap=True, highlight=False).print(f"\n{made}")


def parse_version(text: str) -> int:
    """The number in `3` or `v3`.

    Raises:
        Refusal: there is none.
    """
    from pipelines.errors import Refusal

    digits = text.removeprefix("v")
    if not digits.isdecimal():
        raise Refusal("the version", repr(text), limit="a number, e.g. 3", way_out="`perch models` lists them")
    return int(digits)


def format_accuracy(version: RegisteredVersion) -> str:
    """`0.963 [0.926, 0.985]`, or nothing for a version that was registered by other means."""
    if version.accuracy is None:
        return ""
    value, low, high = version.accuracy
    return f"{value:.3f} \\[{low:.3f}, {high:.3f}]"  # the backslash keeps rich from reading the bracket as markup


def wide_console() -> Console:
    """A console for tables: of the terminal's width, or wide enough for a run id where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 140))


def default_params() -> Params:
    """The project's `params.yaml`, which names the model.

    Raises:
        Refusal: the file is missing or wrong.
    """
    from pipelines.params import load_params
    from pipelines.settings import get_settings

    return load_params(get_settings().project_dir / "params.yaml")
