"""`python -m serving RELEASE`: fetch a release, verify it, unpack it, and become the server of what is in it.

Until digest and signature are verified, nothing of the release is unpacked, imported or read.

`python -m serving --fetch-only FOLDER` ends after that, with the release in the folder: a pod's first container does
so, and the second serves what is there without asking the store, and verifies it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from pipelines.core.release_signing import find_public_keys, verify_file
from pipelines.errors import EXIT_TRY_LATER, PerchError, Refusal
from serving.fetching import FetchedRelease, fetch_release
from serving.settings import ServingSettings, get_serving_settings
from serving.unpacking import unpack_release

# glibc keeps freed blocks of up to 32 MiB for itself once it has seen some; images come and go in such blocks, and what
# a few large ones took would never be given back (measured over a corpus of odd images: 90 MiB, else 15).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**21), "MALLOC_TRIM_THRESHOLD_": str(2**24)}

# As serving/metrics.py reads it, which is not imported here: it may be another version's, from the release.
STARTED_VARIABLE = "PERCH_SERVICE_STARTED"

_OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Start the server, or say why not and exit: 65 for what is refused, 75 for a store that is away or a full disk."""
    options = _parse(arguments)
    try:
        settings = get_serving_settings()
        release, digest = options.release or settings.release_url, options.digest or settings.release_digest
        public_keys = options.public_key or settings.public_key_places
        if options.fetch_only:
            fetch_verified(settings, release, options.fetch_only, digest=digest, public_keys=public_keys)
            sys.exit(0)
        folder = prepare(settings, release, digest=digest, public_keys=public_keys)
    except PerchError as error:
        _say(f"{'refused' if isinstance(error, Refusal) else 'failed'}: {error}")
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written: nothing against the release
        _say(
            f"failed: {error}\n  what to do: see that there is room, and that the folder may be written; then try again"
        )
        sys.exit(EXIT_TRY_LATER)
    host, port = options.host or settings.host, options.port or settings.port
    command = [sys.executable, "-m", "bentoml", "serve", str(folder), "--host", host, "--port", str(port)]
    os.execve(sys.executable, command, server_environment(settings, folder))  # noqa: S606


def prepare(settings: ServingSettings, release: str, *, digest: str, public_keys: list[Path]) -> Path:
    """Fetch, verify and unpack a release.

    Returns:
        Folder of the Bento.

    Raises:
        Refusal: it is not there, or was not signed by a trusted key, or is not what was signed.
        TryLater: the store does not answer.
    """
    cache = settings.cache_dir.expanduser().absolute()
    fetched = fetch_verified(settings, release, cache / "releases", digest=digest, public_keys=public_keys)
    started = time.perf_counter()
    folder = unpack_release(fetched.file, cache / "unpacked", name=fetched.digest[:12])
    _say(f"release {fetched.digest[:12]}: unpacked in {1000 * (time.perf_counter() - started):.0f} ms")
    return folder


def fetch_verified(
    settings: ServingSettings, release: str, folder: Path, *, digest: str, public_keys: list[Path]
) -> FetchedRelease:
    """Fetch a release and its signature into a folder, and verify both; nothing is unpacked.

    A release that is refused stays there for whoever looks into it: what serves it verifies it again.

    Raises:
        Refusal: it is not there, or was not signed by a trusted key, or is not what was signed.
        TryLater: the store does not answer.
    """
    if not release:
        raise Refusal(
            "the release",
            "none is named",
            limit="a file, a folder or s3://bucket/prefix",
            way_out="python -m serving RELEASE, or PERCH_SERVING_RELEASE_URL",
        )
    started = time.perf_counter()
    keys = find_public_keys(public_keys)
    fetched = fetch_release(release, folder, digest=digest, s3_endpoint_url=settings.s3_endpoint_url)
    at_fetched = time.perf_counter()
    signer = verify_file(fetched.file, fetched.digest, fetched.signature, keys)
    _say(
        f"release {fetched.digest[:12]} signed by {signer}: fetched in {1000 * (at_fetched - started):.0f} ms, "
        f"verified in {1000 * (time.perf_counter() - at_fetched):.0f} ms"
    )
    return fetched


def server_environment(settings: ServingSettings, bento: Path) -> dict[str, str]:
    """The environment of the server: this one's, with what BentoML and the libraries below it should know."""
    environment = dict(os.environ)
    # Of this server alone: workers keep their counters there, and two servers must not add theirs up.
    environment["BENTOML_HOME"] = str(bento / ".bentoml")
    environment["BENTOML_DO_NOT_TRACK"] = "True"
    environment[STARTED_VARIABLE] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    for name, value in ALLOCATOR.items():
        environment.setdefault(name, value)
    environment.setdefault("OMP_NUM_THREADS", str(settings.model_threads))
    if not any(environment.get(name) for name in _OTLP_ENDPOINTS):
        environment["OTEL_SDK_DISABLED"] = "true"  # spans are made even where nobody takes them
    if settings.s3_endpoint_url:
        # For releases whose code still asks boto3; of S3 alone, for a role's credentials come from elsewhere.
        environment["AWS_ENDPOINT_URL_S3"] = settings.s3_endpoint_url
    # BentoML changes into the Bento's folder, where a relative path would mean something else.
    for name in ("spool_dir", "api_keys_file", "rate_limits_dir"):
        path = getattr(settings, name)
        if path is not None:
            environment[f"PERCH_SERVING_{name.upper()}"] = str(path.expanduser().absolute())
    for name in ("predictions_url", "jwt_jwks"):
        place = getattr(settings, name)
        if place and "://" not in place:
            environment[f"PERCH_SERVING_{name.upper()}"] = str(Path(place).expanduser().absolute())
    return environment


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - nobody has set up a log yet


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "release", nargs="?", default="", help="file, folder or s3:// address; PERCH_SERVING_RELEASE_URL by default"
    )
    parser.add_argument(
        "--digest", default="", metavar="SHA256", help="which release of a folder, or which bytes to expect"
    )
    parser.add_argument(
        "--public-key",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="trusted keys, or folders of *.pub; PERCH_SERVING_PUBLIC_KEYS by default",
    )
    parser.add_argument(
        "--fetch-only", type=Path, metavar="FOLDER", help="fetch and verify the release into this folder, and end"
    )
    parser.add_argument("--host", default="", help="address to listen at; PERCH_SERVING_HOST by default")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; PERCH_SERVING_PORT by default")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
