import contextlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.core.contract import InputContract
from pipelines.core.image_decoding import DecodingError, Reason, decode_image, read_model_input, to_model_input

LIMITS = {"max_pixels": 10_000_000, "max_bytes": 10_000_000}


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def gradient(height: int = 40, width: int = 60) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray((rows * 3 + columns * 2).astype(np.uint8))


def colour(height: int = 40, width: int = 60) -> Image.Image:
    grey = np.asarray(gradient(height, width))
    return Image.fromarray(np.stack([grey, 255 - grey, grey // 2], axis=-1))


def reason_of(data: bytes, **limits: int) -> Reason:
    with pytest.raises(DecodingError) as caught:
        decode_image(data, **LIMITS | limits)
    return caught.value.reason


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF"])
def test_decode_image__lossless_grey__returns_the_pixels(file_format):
    decoded = decode_image(encode(gradient(), file_format), **LIMITS)
    assert np.array_equal(np.asarray(decoded.pixels.convert("L")), np.asarray(gradient()))
    assert (decoded.format, decoded.width_px, decoded.height_px) == (file_format, 60, 40)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_decode_image__lossless_colour__returns_the_pixels(file_format):
    decoded = decode_image(encode(colour(), file_format), **LIMITS)
    assert decoded.pixels.mode == "RGB"
    assert np.array_equal(np.asarray(decoded.pixels), np.asarray(colour()))


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_decode_image__lossy__is_close_to_the_pixels(file_format):
    decoded = decode_image(encode(colour(), file_format, quality=95), **LIMITS)
    assert np.abs(np.asarray(decoded.pixels).astype(int) - np.asarray(colour())).mean() < 6


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_decode_image__sixteen_bit__scales_the_full_range(file_format):
    samples = np.array([[0, 257, 32896, 65535]], np.uint16).repeat(8, axis=0)
    decoded = decode_image(encode(Image.fromarray(samples), file_format), **LIMITS)
    assert np.asarray(decoded.pixels)[0].tolist() == [0, 1, 128, 255]
    assert decoded.mode.startswith("I")


@pytest.mark.parametrize(
    ("samples", "expected"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 10.0, 255.0], [0, 10, 255])]
)
def test_decode_image__float_tiff__scales_the_customary_range(samples, expected):
    decoded = decode_image(encode(Image.fromarray(np.array([samples], np.float32)), "TIFF"), **LIMITS)
    assert np.asarray(decoded.pixels)[0].tolist() == expected


def test_decode_image__float_tiff_with_nan__is_corrupt():
    assert reason_of(encode(Image.fromarray(np.array([[0.5, np.nan]], np.float32)), "TIFF")) is Reason.CORRUPT


def test_decode_image__one_bit__becomes_black_and_white():
    decoded = decode_image(encode(gradient().convert("1", dither=Image.Dither.NONE)), **LIMITS)
    assert decoded.pixels.mode == "L"
    assert set(np.unique(np.asarray(decoded.pixels))) == {0, 255}


def test_decode_image__cmyk_jpeg__becomes_rgb():
    decoded = decode_image(encode(colour().convert("CMYK"), "JPEG", quality=95), **LIMITS)
    assert (decoded.mode, decoded.pixels.mode) == ("CMYK", "RGB")
    assert np.abs(np.asarray(decoded.pixels).astype(int) - np.asarray(colour())).mean() < 8


def test_decode_image__palette__becomes_its_colours():
    palette = colour().quantize(64)
    decoded = decode_image(encode(palette), **LIMITS)
    assert np.array_equal(np.asarray(decoded.pixels), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_decode_image__transparent__is_laid_over_black(mode):
    image = Image.new(mode, (4, 4), (200, 200, 200, 128) if mode == "RGBA" else (200, 128))
    pixels = np.asarray(decode_image(encode(image), **LIMITS).pixels)
    assert np.abs(pixels.astype(int) - 100).max() <= 1


def test_decode_image__transparent_palette_colour__is_black():
    image = colour().quantize(8)
    image.info["transparency"] = image.getpixel((0, 0))
    decoded = decode_image(encode(image, transparency=image.getpixel((0, 0))), **LIMITS)
    assert decoded.pixels.getpixel((0, 0)) == (0, 0, 0)


def test_decode_image__several_frames__takes_the_first():
    first, second = Image.new("L", (8, 8), 10), Image.new("L", (8, 8), 200)
    for file_format in ("GIF", "TIFF"):
        data = encode(first, file_format, save_all=True, append_images=[second])
        assert np.asarray(decode_image(data, **LIMITS).pixels.convert("L")).max() == 10


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_image__exif_orientation__is_upright_with_upright_size(file_format, orientation):
    upright = np.zeros((32, 64), np.uint8)
    upright[:16, :32] = 255  # the upper left quarter
    undo = {1: 0, 2: "f", 3: 2, 4: "v", 5: "t", 6: 1, 7: "a", 8: 3}[orientation]
    stored = (
        {
            "f": upright[:, ::-1],
            "v": upright[::-1],
            "t": upright.T,
            "a": upright[::-1, ::-1].T,
        }.get(undo)
        if isinstance(undo, str)
        else np.rot90(upright, undo)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif), **LIMITS)
    assert (decoded.width_px, decoded.height_px) == (64, 32)
    assert decoded.pixels.size == (64, 32)
    assert np.abs(np.asarray(decoded.pixels).astype(int) - upright).mean() < 3


def test_decode_image__large_jpeg__is_reduced_but_says_its_full_size():
    data = encode(gradient(1600, 2400), "JPEG")
    decoded = decode_image(data, **LIMITS, floor_px=512)
    assert (decoded.width_px, decoded.height_px) == (2400, 1600)
    assert decoded.pixels.size == (1200, 800)
    assert decode_image(data, **LIMITS, floor_px=1000).pixels.size == (2400, 1600)


def test_decode_image__large_jpeg_turned__says_its_upright_full_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(encode(gradient(1600, 2400), "JPEG", exif=exif), **LIMITS, floor_px=512)
    assert (decoded.width_px, decoded.height_px) == (1600, 2400)
    assert decoded.pixels.size == (800, 1200)


@pytest.mark.parametrize(
    "data", [b"hello, world", b"%PDF-1.7 ...", b"\x00" * 100, b"PK\x03\x04aaaa", b"RIFF1234WAVEfmt "]
)
def test_decode_image__other_content__is_not_an_image(data):
    assert reason_of(data) is Reason.NOT_AN_IMAGE


def test_decode_image__no_bytes__is_empty():
    assert reason_of(b"") is Reason.EMPTY


def test_decode_image__too_many_bytes__is_refused_without_decoding():
    assert reason_of(encode(gradient()), max_bytes=10) is Reason.TOO_MANY_BYTES


def test_decode_image__bomb__is_refused_by_its_header():
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    data = bytearray(encode(gradient()))
    data[16:29] = header
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    assert reason_of(bytes(data)) is Reason.TOO_MANY_PIXELS


def test_decode_image__limit_above_pillows_own__is_the_only_limit():
    data = encode(Image.new("1", (20_000, 10_000)))
    assert decode_image(data, max_pixels=300_000_000, max_bytes=10_000_000).width_px == 20_000


def test_decode_image__flipped_byte_in_png__is_corrupt():
    data = bytearray(encode(gradient().effect_spread(9)))
    data[len(data) // 2] ^= 0xFF
    assert reason_of(bytes(data)) is Reason.CORRUPT


def test_decode_image__png_signature_and_garbage__is_not_accepted():
    assert reason_of(b"\x89PNG\r\n\x1a\n" + bytes(4) + b"x" * 2000 + b"IEND") is Reason.CORRUPT
    assert reason_of(b"\x89PNG\r\n\x1a\n") is Reason.TRUNCATED


@settings(max_examples=150, deadline=None)
@given(file_format=st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"]), share=st.floats(0.0, 1.0))
def test_decode_image__cut_anywhere__is_refused_or_loses_nothing(file_format, share):
    data = encode(colour(48, 48), file_format)
    whole = np.asarray(decode_image(data, **LIMITS).pixels)
    cut = data[: int(len(data) * share)]
    try:
        decoded = decode_image(cut, **LIMITS)
    except DecodingError:
        return
    assert np.array_equal(np.asarray(decoded.pixels), whole)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_decode_image__cut_off__is_truncated(file_format, share):
    data = encode(
        colour(120, 120).effect_spread(20),
        file_format,
        **({"compression": "tiff_lzw"} if file_format == "TIFF" else {}),
    )
    assert reason_of(data[: int(len(data) * share)]) is Reason.TRUNCATED


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 2000), value=st.integers(0, 255), file_format=st.sampled_from(["PNG", "JPEG", "TIFF"]))
def test_decode_image__damaged_anywhere__raises_nothing_but_its_own_error(position, value, file_format):
    data = bytearray(encode(colour(), file_format))
    data[position % len(data)] = value
    with contextlib.suppress(DecodingError):
        decode_image(bytes(data), **LIMITS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", ["squash", "pad", "crop"])
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (8, 300), (1, 1), (28, 28)])
def test_to_model_input__any_image__has_the_contracts_shape(channels, resize, size):
    contract = InputContract(size_px=28, channels=channels, resize=resize)
    for mode in ("L", "RGB"):
        shaped = to_model_input(Image.new(mode, size, 100 if mode == "L" else (100, 100, 100)), contract)
        assert shaped.shape == (28, 28, channels)
        assert shaped.dtype == np.uint8
        assert shaped[13:15, 13:15].max(axis=(0, 1)).tolist() == [100] * channels


def test_to_model_input__already_the_size__changes_nothing():
    image = gradient(28, 28)
    shaped = to_model_input(image, InputContract(size_px=28, channels=1, resize="squash"))
    assert np.array_equal(shaped[..., 0], np.asarray(image))


def test_to_model_input__pad__keeps_proportions_between_black_bars():
    shaped = to_model_input(Image.new("L", (40, 20), 200), InputContract(size_px=40, channels=1, resize="pad"))
    assert shaped[:10].max() == 0
    assert shaped[30:].max() == 0
    assert shaped[10:30].min() == 200


def test_to_model_input__crop__keeps_the_middle():
    pixels = np.zeros((20, 60), np.uint8)
    pixels[:, 20:40] = 250
    shaped = to_model_input(Image.fromarray(pixels), InputContract(size_px=20, channels=1, resize="crop"))
    assert shaped.min() == 250


def test_to_model_input__shrinking__keeps_the_mean():
    image = gradient(64, 64)
    shaped = to_model_input(image, InputContract(size_px=16, channels=1, resize="squash"))
    assert shaped.mean() == pytest.approx(np.asarray(image).mean(), abs=1)


@pytest.mark.parametrize("size_px", [28, 224, 700])
def test_read_model_input__same_bytes__gives_the_same_array_twice(size_px):
    contract = InputContract(size_px=size_px, channels=3, resize="pad")
    data = encode(colour(1500, 1200), "JPEG")
    first, second = (read_model_input(data, contract, **LIMITS) for _ in range(2))
    assert np.array_equal(first, second)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff_directory(*entries: tuple[int, int, int, int]) -> bytes:
    """A little-endian TIFF whose directory has these entries of tag, type, count and value."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


def test_decode_image__megabytes_of_exif__are_not_written_anew():
    # ImageOps.exif_transpose took 7 s for this.
    each, count = 64_000, 140
    start = 8 + 2 + 12 * (count + 1) + 4
    entries = [(0x9000 + index, 5, each // 8, start + index * each) for index in range(count)]
    exif = tiff_directory((0x0112, 3, 1, 6), *entries) + bytes([1, 0, 0, 0]) * (count * each // 4)
    data = encode(gradient())
    began = time.process_time()
    decoded = decode_image(data[:33] + png_chunk(b"eXIf", exif) + data[33:], **LIMITS)
    assert time.process_time() - began < 1
    assert decoded.pixels.size == (40, 60)


def test_decode_image__jpeg_of_endless_scans__is_refused_before_it_is_decoded():
    data = encode(gradient(), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    assert reason_of(data[:-2] + last_scan * 100 + data[-2:]) is Reason.CORRUPT
    decode_image(data[:-2] + last_scan * 10 + data[-2:], **LIMITS)


def test_decode_image__jpeg_of_endless_segments__is_refused():
    data = encode(gradient(), "JPEG")
    assert reason_of(data[:2] + b"\xff\xfe\x00\x02" * 10_001 + data[2:]) is Reason.CORRUPT


def test_decode_image__tiff_with_a_tile_far_larger_than_itself__is_too_many_pixels():
    shape = ((256, 4, 1, 10), (257, 4, 1, 10), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1))
    tile = ((322, 4, 1, 20_000), (323, 4, 1, 20_000), (324, 4, 1, 8), (325, 4, 1, 100))
    assert reason_of(tiff_directory(*shape, *tile) + bytes(100)) is Reason.TOO_MANY_PIXELS


def test_decode_image__side_that_no_image_has__is_too_many_pixels():
    assert reason_of(encode(Image.new("1", (65_536, 1)))) is Reason.TOO_MANY_PIXELS
    assert decode_image(encode(Image.new("1", (65_535, 1))), **LIMITS).width_px == 65_535
    assert decode_image(encode(Image.new("L", (1, 20_000))), **LIMITS).height_px == 20_000


@pytest.mark.parametrize("largest", [1.0, 255.0, 60_000.0])
def test_decode_image__large_float_tiff__is_scaled_row_by_row_like_a_small_one(largest):
    samples = np.linspace(-1.0, largest, 700 * 900, dtype=np.float32).reshape(700, 900)
    pixels = np.asarray(decode_image(encode(Image.fromarray(samples), "TIFF"), **LIMITS).pixels)
    full = {60_000.0: 65535.0}.get(largest, largest)
    expected = np.clip(np.rint(samples.astype(np.float64) * (255.0 / full)), 0, 255)
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_decode_image__float_tiff_not_finite__is_corrupt(number):
    assert reason_of(encode(Image.fromarray(np.array([[0.5, number]], np.float32)), "TIFF")) is Reason.CORRUPT
