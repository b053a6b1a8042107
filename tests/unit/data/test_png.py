import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pipelines.data.png import encode_png

shapes = st.tuples(st.integers(1, 20), st.integers(1, 20)) | st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))


@settings(deadline=None)
@given(arrays.arrays(np.uint8, shapes))
def test_encode_png__any_pixels__decodes_to_them(pixels):
    image = Image.open(io.BytesIO(encode_png(pixels)))
    assert image.mode == ("L" if pixels.ndim == 2 else "RGB")
    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("shape", [(300, 301), (224, 224, 3)])
def test_encode_png__more_than_one_block__decodes_to_the_pixels(shape):
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)


def test_encode_png__known_pixels__has_the_bytes_it_has_always_had():
    # An image's split follows from its bytes: they must not change with a version of any library.
    digest = hashlib.sha256(encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8))).hexdigest()
    assert digest == "b0eb4945328da0f6a155a9246905713af8277632e60ed7ee9bca9bcdf82977de"
