"""How large an image may be that a model is asked about: the same for a request and for a batch of files."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_MAX_BODY_BYTES = 10 * 2**20
DEFAULT_MAX_PIXELS = 25_000_000


class ImageLimits(BaseSettings):
    """The limits of `decode_image`, from the environment of the service.

    Batch prediction reads the same variables as the service, so that one image is either taken by both or by neither.
    """

    model_config = SettingsConfigDict(env_prefix="PERCH_SERVING_", frozen=True, extra="ignore", env_ignore_empty=True)

    max_body_bytes: int = Field(
        DEFAULT_MAX_BODY_BYTES, gt=0, description="Most bytes of one image or of a feedback's body."
    )
    max_pixels: int = Field(DEFAULT_MAX_PIXELS, gt=0, description="Largest width times height of an image.")
