import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.core.jpeg_markers import MAX_MARKERS, MalformedJpegError, read_jpeg_markers


def encode(mode: str = "RGB", size: tuple[int, int] = (60, 40), **options: object) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def test_read_jpeg_markers__baseline__is_one_sequential_scan():
    markers = read_jpeg_markers(encode(), max_scans=100)
    assert (markers.scans, markers.width_px, markers.height_px, markers.sequential) == (1, 60, 40, True)


def test_read_jpeg_markers__progressive__counts_the_scans_up_to_one_too_many():
    data = encode(progressive=True)
    assert read_jpeg_markers(data, max_scans=100).scans == 10
    assert not read_jpeg_markers(data, max_scans=100).sequential
    assert read_jpeg_markers(data, max_scans=4).scans == 5


def test_read_jpeg_markers__markers_in_a_comment_or_after_the_end__do_not_count():
    data = encode(comment=b"\xff\xda" * 500) + b"\xff\xda" * 500
    assert read_jpeg_markers(data, max_scans=100).scans == 1


def test_read_jpeg_markers__restart_markers__do_not_count():
    data = encode(size=(400, 400), restart_marker_rows=1)
    assert b"\xff\xd0" in data
    assert read_jpeg_markers(data, max_scans=100).scans == 1


def test_read_jpeg_markers__too_many_segments__is_malformed():
    data = encode()
    with pytest.raises(MalformedJpegError, match="10,000 markers"):
        read_jpeg_markers(data[:2] + b"\xff\xfe\x00\x02" * MAX_MARKERS + data[2:], max_scans=100)


@given(st.binary(max_size=200))
def test_read_jpeg_markers__any_bytes__end_somewhere(data: bytes):
    assert read_jpeg_markers(b"\xff\xd8" + data, max_scans=3).scans <= 4
