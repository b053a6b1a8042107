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


def interleaved_apart(data: bytes) -> bytes:
    """A grey baseline JPEG whose frame names a second component, so that one scan is not all of it."""
    frame = data.index(b"\xff\xc0")
    length = int.from_bytes(data[frame + 2 : frame + 4])
    segment = (length + 3).to_bytes(2) + data[frame + 4 : frame + 9] + b"\2" + data[frame + 10 : frame + 2 + length]
    return data[: frame + 2] + segment + b"\2\x11\0" + data[frame + 2 + length :]


def scan_of(data: bytes) -> bytes:
    return data[data.index(b"\xff\xda") : -2]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_read_jpeg_markers__baseline__is_one_sequential_scan(mode: str):
    markers = read_jpeg_markers(encode(mode), max_scans=100)
    assert (markers.scans, markers.width_px, markers.height_px, markers.sequential) == (1, 60, 40, True)


def test_read_jpeg_markers__baseline_with_a_scan_repeated__counts_those_that_a_decoder_comes_to():
    data = encode("L")
    repeated = data[:-2] + scan_of(data) * 500 + data[-2:]
    assert read_jpeg_markers(repeated, max_scans=100).scans == 1
    assert read_jpeg_markers(interleaved_apart(repeated), max_scans=100).scans == 101


def test_read_jpeg_markers__progressive__counts_up_to_one_too_many():
    data = encode(progressive=True)
    assert read_jpeg_markers(data, max_scans=100).scans == 10
    assert read_jpeg_markers(data, max_scans=4).scans == 5
    assert not read_jpeg_markers(data, max_scans=100).sequential


def test_read_jpeg_markers__progressive_with_all_components_in_its_first_scan__goes_on_counting():
    data = encode("L", progressive=True)
    assert read_jpeg_markers(data, max_scans=100).scans > 1


def test_read_jpeg_markers__markers_in_a_comment_or_after_the_end__do_not_count():
    data = encode(progressive=True, comment=b"\xff\xda" * 500) + b"\xff\xda" * 500
    assert read_jpeg_markers(data, max_scans=100).scans == 10


def test_read_jpeg_markers__restart_markers__do_not_count():
    data = encode(size=(400, 400), progressive=True, restart_marker_rows=1)
    assert b"\xff\xd0" in data
    assert read_jpeg_markers(data, max_scans=100).scans == 10


def test_read_jpeg_markers__too_many_segments__is_malformed():
    data = encode()
    with pytest.raises(MalformedJpegError, match="10,000 markers"):
        read_jpeg_markers(data[:2] + b"\xff\xfe\x00\x02" * MAX_MARKERS + data[2:], max_scans=100)


@given(st.binary(max_size=200))
def test_read_jpeg_markers__any_bytes__end_somewhere(data: bytes):
    assert read_jpeg_markers(b"\xff\xd8" + data, max_scans=3).scans <= 4
