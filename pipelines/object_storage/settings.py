"""How to reach an S3-compatible store: `PERCH_S3_` and the field's name, the same for every process of Perch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipelines.environment import read_environment


class S3Settings(BaseSettings):
    """Where the store is and how long to wait for it; credentials are those that boto3 finds."""

    model_config = SettingsConfigDict(env_prefix="PERCH_S3_", frozen=True, extra="ignore", env_ignore_empty=True)

    endpoint_url: str = Field("", description="Endpoint of an S3-compatible store; empty is AWS.")
    region: str = Field("", description="Region of the store; empty is what boto3 finds.")
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto",
        description="Where a bucket's name stands in a URL: in the `path`, in the host name (`virtual`), or `auto`: in "
        "the path where an endpoint is given.",
    )
    ca_bundle: Path | None = Field(
        None, description="PEM file of the authorities that vouch for the endpoint; empty takes the public ones."
    )
    timeout_s: float = Field(30.0, gt=0, description="Seconds without a byte until a request is given up.")
    attempts: int = Field(4, ge=1, description="Times that a request is sent until somebody is told.")

    @property
    def endpoint(self) -> str:
        """The endpoint that boto3 will use; empty is AWS, or what a profile says."""
        return self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3", "") or os.environ.get("AWS_ENDPOINT_URL", "")


def read_s3_settings(endpoint_url: str = "") -> S3Settings:
    """The settings of this process's environment.

    Args:
        endpoint_url: goes before the environment's where it is given.

    Raises:
        Refusal: a variable holds what it cannot mean.
    """
    settings = read_environment(S3Settings)
    return settings.model_copy(update={"endpoint_url": endpoint_url}) if endpoint_url else settings
