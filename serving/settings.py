"""The service's environment: limits, credentials and where things go; `PERCH_SERVING_` and the field's name."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from pydantic import Field

from pipelines.core.image_limits import ImageLimits
from pipelines.environment import read_environment

MIB = 2**20


class ServingSettings(ImageLimits):
    """What a service process is started with, `ImageLimits` among it; the defaults suit one machine."""

    release_url: str = Field("", description="The release to serve: a file, a folder or s3://bucket/prefix.")
    release_digest: str = Field("", description="SHA-256 of the release; needed where the address does not end in it.")
    public_keys: str = Field("", description="Trusted public keys: files, or folders of *.pub, separated by colons.")
    cache_dir: Path = Field(Path("~/.cache/perch"), description="Local folder for fetched and unpacked releases.")
    s3_endpoint_url: str = Field("", description="Endpoint of an S3-compatible store; empty is AWS.")
    host: str = Field("0.0.0.0", description="IP address to listen at.")  # noqa: S104
    port: int = Field(3000, ge=1, le=65535, description="Port to listen on.")
    workers: int = Field(0, ge=0, description="Worker processes; 0 takes one per core.")

    max_batch_bytes: int = Field(64 * MIB, gt=0, description="Most bytes of a batch's body.")
    max_batch_items: int = Field(64, gt=0, description="Most images in one batch.")
    request_timeout_s: float = Field(
        10.0, gt=0, description="Seconds for a request to arrive, and again to be answered."
    )
    connection_age_s: float = Field(
        60.0,
        gt=0,
        description="Age in seconds, give or take a fifth, at which a connection gets its last answer.",
    )
    # A virtual machine stands still for some tenths of a second now and then, and at hundreds of requests a second
    # those who came meanwhile arrive at once: the bound is for a load that stays too high.
    max_concurrent: int = Field(256, gt=0, description="Requests that one worker handles at once; more get 503.")
    max_buffered_bytes: int = Field(256 * MIB, gt=0, description="Most bytes of bodies that one worker holds at once.")
    model_threads: int = Field(
        1, gt=0, description="Threads of one call to the model; 1 is best with a worker per core."
    )
    explain_budget_s: float = Field(2.0, gt=0, description="Seconds that an explanation may compute.")

    authentication: str = Field(
        "required", pattern="^(required|off)$", description="`off` lets everybody in: for a test on one machine."
    )
    api_keys_file: Path | None = Field(None, description="JSON file of API keys' hashes, scopes and rates.")
    jwt_issuer: str = Field("", description="Issuer whose tokens are taken; empty takes none.")
    jwt_audience: str = Field("", description="Audience that a token must name.")
    jwt_jwks: str = Field(
        "", description="URL or file of the issuer's keys; empty asks the issuer's discovery document."
    )
    jwt_rate_per_s: float = Field(50.0, gt=0, description="Requests per second for each subject of a token.")
    rate_limits_dir: Path | None = Field(
        None, description="Local folder where workers share the rates; empty takes BentoML's for their metrics."
    )

    predictions_url: str = Field(
        "", description="Folder or s3://bucket/prefix that keeps predictions; empty keeps none."
    )
    spool_dir: Path = Field(Path("spool"), description="Local folder where predictions wait to be shipped.")
    spool_max_bytes: int = Field(1024 * MIB, gt=0, description="Most bytes that wait there; older ones give way.")
    flush_rows: int = Field(5_000, gt=0, description="Predictions that are shipped together at most.")
    flush_interval_s: float = Field(60.0, gt=0, description="Seconds after which they are shipped, however few.")

    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of /metrics alone; 0 serves it beside the API, to keys with the scope `metrics`.",
    )
    metrics_host: str = Field("0.0.0.0", description="Address of that port; all by default, for Prometheus elsewhere.")  # noqa: S104
    log_requests: bool = Field(True, description="One JSON line per request; errors are logged in any case.")

    @property
    def public_key_places(self) -> list[Path]:
        """Files and folders of `public_keys`."""
        return [Path(place).expanduser() for place in self.public_keys.split(os.pathsep) if place]


@cache
def get_serving_settings() -> ServingSettings:
    """The settings of this process, read once, at the first call.

    Raises:
        Refusal: a variable holds what it cannot.
    """
    return read_environment(ServingSettings)
