"""What a valid image is, for schemathesis: a schema can only say that it is a string of bytes."""

import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image

FORMATS = ("png", "jpeg", "bmp", "tiff", "gif", "webp")


def _encode(image_format: str, mode: str, width: int, height: int, level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (width, height), level).convert(mode).save(stream, image_format)
    return stream.getvalue()


def _images(*formats: str) -> st.SearchStrategy[bytes]:
    sides = st.integers(1, 40)
    return st.builds(
        _encode, st.sampled_from(formats), st.sampled_from(["L", "RGB"]), sides, sides, st.integers(0, 255)
    )


for image_format in FORMATS:
    schemathesis.openapi.media_type(f"image/{image_format}", _images(image_format))
schemathesis.openapi.media_type("image/*", _images(*FORMATS))
schemathesis.openapi.media_type("application/octet-stream", _images(*FORMATS))
