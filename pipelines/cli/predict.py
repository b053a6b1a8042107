"""`perch predict`: many images through a registered model into one Parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.batch_prediction.rows import ModelIdentity
    from pipelines.settings import Settings


def predict(
    location: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="A folder, flat or nested; an image; a .csv or .parquet table of paths; an .npz; an s3:// address of "
            "one; or `digits`.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write; a row per image.")] = Path(
        "predictions.parquet"
    ),
    model: Annotated[str, typer.Option("--model", help="Registered model; the one of params.yaml by default.")] = "",
    version: Annotated[
        str, typer.Option("--version", help="Its version; by default the champion, else the latest candidate.")
    ] = "",
    release: Annotated[
        Path | None, typer.Option("--release", help="A packaged release, <sha256>.bento, to predict with its model.")
    ] = None,
    public_key: Annotated[
        list[Path] | None,
        typer.Option("--public-key", help="Trusted key of a release, or folder of *.pub; the home's keys by default."),
    ] = None,
    path_column: Annotated[str, typer.Option("--path-column", help="Column of a table that holds the paths.")] = "path",
) -> None:
    """Predict every image of a folder, table or bucket; killed and given again, it goes on where it was."""
    import tempfile

    from pipelines.batch_prediction.locations import open_location
    from pipelines.batch_prediction.prediction import predict_source
    from pipelines.batch_prediction.released_model import take_released_model
    from pipelines.core.image_limits import ImageLimits
    from pipelines.data.sources.opening import without_secrets
    from pipelines.environment import read_environment
    from pipelines.errors import Refusal
    from pipelines.settings import get_settings

    if release is not None and (model or version):
        raise Refusal(
            "--release", f"{release} beside --model or --version", limit="one of them", way_out="a release says itself"
        )
    settings = get_settings()
    source = open_location(location, settings, path_column=path_column, out=out)
    with tempfile.TemporaryDirectory(prefix="perch-model-") as folder:
        if release is None:
            model_file, identity = _fetch(settings, model, version, Path(folder))
        else:
            model_file, identity = take_released_model(release, public_key or [settings.keys_dir], Path(folder))
        typer.echo(f"{identity.name} v{identity.version} · onnx sha256:{identity.onnx_sha256[:12]}…", err=True)
        try:
            predicted = predict_source(
                source,
                model_file,
                identity,
                out,
                limits=read_environment(ImageLimits),
                threads=settings.decode_workers,
                name=f"the images of {without_secrets(location)}",
                say=lambda line: typer.echo(f"  {line}", err=True),
            )
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on from there", err=True)
            raise typer.Exit(130) from None
    typer.echo(f"{predicted.summary} → {out}")


def _fetch(settings: Settings, model: str, version: str, into: Path) -> tuple[Path, ModelIdentity]:
    """The model's file, held against registry and ledger, and its name."""
    from pipelines.batch_prediction.rows import ModelIdentity
    from pipelines.cli.models import default_params, parse_version
    from pipelines.registry.model_files import fetch_model_file

    params = default_params()
    fetched = fetch_model_file(
        settings,
        model or params.model_name,
        parse_version(version) if version else None,
        into,
        candidate_alias=params.model_registration.candidate_alias,
    )
    found = fetched.version
    return fetched.path, ModelIdentity(found.model, str(found.version), fetched.onnx_sha256)
