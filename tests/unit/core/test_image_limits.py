import pytest
from pydantic import ValidationError

from pipelines.core.image_limits import ImageLimits
from serving.settings import ServingSettings


def test_image_limits__set_for_the_service__hold_for_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCH_SERVING_MAX_PIXELS", "640000")
    monkeypatch.setenv("PERCH_SERVING_MAX_BODY_BYTES", "12345")
    batch, service = ImageLimits(), ServingSettings()
    assert (batch.max_pixels, batch.max_body_bytes) == (640_000, 12_345)
    assert (service.max_pixels, service.max_body_bytes) == (640_000, 12_345)


def test_image_limits__a_limit_of_nothing__is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCH_SERVING_MAX_PIXELS", "0")
    with pytest.raises(ValidationError, match="max_pixels"):
        ImageLimits()
