"""From encoded bytes to the uint8 array a model sees: the one road that training and serving share.

Every decision here changes what a model is fed, so it is made once, from the bytes and the contract alone: no clock,
no randomness, no setting of the machine.  Imports nothing but NumPy and Pillow, to fit the serving image.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipelines.core.contract import InputContract
from pipelines.core.jpeg_markers import MalformedJpegError, read_jpeg_markers

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")

# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its scale as long as both sides keep this many pixels: faster, and it
# still reads every coefficient, so that a truncated file is found out.
REDUCED_DECODING_FLOOR_PX = 256

_SIGNATURES = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"II+\x00",
    b"MM\x00+",
    b"GIF8",
)
# Limits that no honest image comes near, on what costs more than its pixels: rows have an overhead each, and every scan
# of a progressive JPEG goes through all coefficients, so that a hostile 10 MB could keep a processor busy for hours.
MAX_SIDE_PX = 65_535  # what JPEG can name
MAX_JPEG_SCANS = 100  # encoders write about ten; libtiff has the same limit
_TILE_SIDES = (0x0142, 0x0143)  # TIFF's TileWidth and TileLength

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's Orientation
_FLOAT_ROWS_BYTES = 2**22  # of float64 at a time

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


class Reason(StrEnum):
    """Why bytes are not an image that Perch reads; the words of the quarantine table and of the service's errors."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    CORRUPT = "corrupt"
    TRUNCATED = "truncated"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_BYTES = "too_many_bytes"
    UNREADABLE = "unreadable"


class DecodingError(Exception):
    """The bytes are no image that may be used.

    Args:
        reason: the kind of fault, stable across versions.
        detail: what was found, for a person.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class DecodedImage:
    """An image upright, 8 bits deep and opaque, with what its file said of itself.

    Attributes:
        pixels: mode `L` where the file is grey, else `RGB`; a large JPEG may be reduced (see `decode_image`).
        format: as Pillow names it, e.g. `PNG`.
        mode: the file's own mode, before any conversion, e.g. `I;16`.
        width_px: of the full image, upright.
        height_px: of the full image, upright.
    """

    pixels: Image.Image
    format: str
    mode: str
    width_px: int
    height_px: int


def decode_image(
    data: bytes, *, max_pixels: int, max_bytes: int, floor_px: int = REDUCED_DECODING_FLOOR_PX
) -> DecodedImage:
    """Decode an image completely: its first frame, upright, 8 bits per channel, composited over black.

    The size is judged from the header, before any pixel is decoded.  16-bit files are scaled from their full range
    (0-65535 to 0-255), not stretched to what they contain, so that intensities stay comparable between images.

    Args:
        data: the encoded bytes; PNG, JPEG, BMP, TIFF, GIF or WebP.
        max_pixels: largest width times height.
        max_bytes: most encoded bytes.
        floor_px: a JPEG may be decoded at a reduced scale while both sides keep so many pixels.

    Raises:
        DecodingError: with the reason for the quarantine table.
    """
    if not data:
        raise DecodingError(Reason.EMPTY, "holds no bytes")
    if len(data) > max_bytes:
        raise DecodingError(Reason.TOO_MANY_BYTES, f"has {len(data):,} bytes (limit: {max_bytes:,})")
    _refuse_laborious_jpeg(data)
    # The limit below replaces Pillow's own, which warns at one size, raises at another, and knows no parameter.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise _explain_unidentified(data) from None
    except Exception as error:  # Pillow's plugins raise whatever their parsing trips over
        raise _explain_failure(data, error) from error
    width_px, height_px = image.size
    file_format, mode = image.format or "", image.mode
    try:
        _refuse_large(image, max_pixels)
        image.draft(None, (floor_px, floor_px))
        image.load()
        # A TIFF is turned upright while it loads, so that only the others still name an orientation here.
        turned = image.size != (width_px, height_px) and image.size == (height_px, width_px)
        orientation = image.getexif().get(0x0112, 1)
        pixels = _to_eight_bits(image)
        if orientation in _TURNS:
            # Not by ImageOps.exif_transpose, which writes the EXIF data anew: seconds, where there are megabytes of it.
            pixels = pixels.transpose(_TURNS[orientation])
            turned = orientation >= 5
    except DecodingError:
        raise
    except Exception as error:
        raise _explain_failure(data, error) from error
    if turned:
        width_px, height_px = height_px, width_px
    return DecodedImage(pixels, file_format, mode, width_px, height_px)


def to_model_input(image: Image.Image, contract: InputContract) -> npt.NDArray[np.uint8]:
    """Shape a decoded image as the model's contract asks.

    Args:
        image: mode `L` or `RGB`, from `decode_image`.
        contract: side, channels, and how an oblong image becomes square: `squash` ignores its proportions, `pad` adds
            black bars, `crop` keeps the largest square in the middle.

    Returns:
        uint8 `(size_px, size_px, channels)`, 0-255.  Grey from colour is luma (ITU-R BT.601), as Pillow computes it.
    """
    side = contract.size_px
    width, height = image.size
    if contract.resize == "crop":
        square = min(width, height)
        left, top = (width - square) // 2, (height - square) // 2
        shaped = _resize(image, (side, side), box=(left, top, left + square, top + square))
    elif contract.resize == "pad":
        longest = max(width, height)
        fitted = (max(1, round(width * side / longest)), max(1, round(height * side / longest)))
        shaped = Image.new(image.mode, (side, side))
        shaped.paste(_resize(image, fitted), ((side - fitted[0]) // 2, (side - fitted[1]) // 2))
    else:
        shaped = _resize(image, (side, side))
    mode = "L" if contract.channels == 1 else "RGB"
    if shaped.mode != mode:
        shaped = shaped.convert(mode)
    return np.asarray(shaped, dtype=np.uint8).reshape(side, side, contract.channels)


def decoding_floor_px(contract: InputContract) -> int:
    """The `floor_px` that keeps enough pixels for a contract."""
    return max(REDUCED_DECODING_FLOOR_PX, contract.size_px)


def read_model_input(data: bytes, contract: InputContract, *, max_pixels: int, max_bytes: int) -> npt.NDArray[np.uint8]:
    """Decode and shape in one step; training arrays hold exactly what this returns for the same bytes.

    Returns:
        uint8 `(size_px, size_px, channels)`.

    Raises:
        DecodingError: as `decode_image`.
    """
    decoded = decode_image(data, max_pixels=max_pixels, max_bytes=max_bytes, floor_px=decoding_floor_px(contract))
    return to_model_input(decoded.pixels, contract)


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """Area averages where the image shrinks, which keeps fine detail from aliasing; bilinear where it grows."""
    left, top, right, bottom = box or (0, 0, *image.size)
    shrinks = size[0] <= right - left and size[1] <= bottom - top
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return image.resize(size, method, box=box, reducing_gap=2.0)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Bring any of Pillow's modes to `L` or `RGB`."""
    if image.mode in _SIXTEEN_BIT_MODES:
        return Image.fromarray(_eight_bit_table()[np.asarray(image)])
    if image.mode == "I":
        # Pillow's name for integers wider than 8 bits; the files that carry it hold 16-bit samples.
        return Image.fromarray(_eight_bit_table()[np.clip(np.asarray(image), 0, 65535)])
    if image.mode == "F":
        return _scale_float(np.asarray(image))
    transparent = "transparency" in image.info
    if image.mode in ("LA", "La") or (image.mode == "L" and transparent):
        return _over_black(image if image.mode == "LA" else image.convert("LA"), "L")
    if image.mode in ("RGBA", "RGBa", "PA") or (image.mode in ("P", "RGB") and transparent):
        return _over_black(image if image.mode == "RGBA" else image.convert("RGBA"), "RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _over_black(image: Image.Image, mode: str) -> Image.Image:
    background = Image.new(mode, image.size)
    background.paste(image.convert(mode), mask=image.getchannel("A"))
    return background


@cache
def _eight_bit_table() -> npt.NDArray[np.uint8]:
    """For each 16-bit sample its 8-bit one: a look-up takes an eighth of the memory that floating point would."""
    table: npt.NDArray[np.uint8] = np.rint(np.arange(65536) * (255.0 / 65535.0)).astype(np.uint8)
    return table


def _scale_float(samples: npt.NDArray[np.float32]) -> Image.Image:
    """Scale floating-point samples by the smallest customary range that holds them: 0-1, 0-255 or 0-65535.

    Rounds to the nearest and clips what lies outside; a few rows at a time, for float64 needs eight times the result.
    """
    largest = float(samples.max())  # NaN and infinity win
    if not np.isfinite(largest) or not np.isfinite(samples.min()):
        raise DecodingError(Reason.CORRUPT, "holds samples that are not finite numbers")
    full = next((full for full in (1.0, 255.0) if largest <= full), 65535.0)
    scaled = np.empty(samples.shape, np.uint8)
    rows = max(1, _FLOAT_ROWS_BYTES // (8 * samples.shape[1]))
    for start in range(0, len(samples), rows):
        piece = samples[start : start + rows].astype(np.float64)
        scaled[start : start + rows] = np.clip(np.rint(piece * (255.0 / full)), 0, 255)
    return Image.fromarray(scaled)


def _refuse_laborious_jpeg(data: bytes) -> None:
    """Stop at a JPEG whose structure would take far more time than its pixels."""
    if not data.startswith(b"\xff\xd8"):
        return
    try:
        markers = read_jpeg_markers(data, max_scans=MAX_JPEG_SCANS)
    except MalformedJpegError as error:
        raise DecodingError(Reason.CORRUPT, str(error)) from None
    if markers.scans > MAX_JPEG_SCANS:
        raise DecodingError(Reason.CORRUPT, f"has more than {MAX_JPEG_SCANS} scans")


def _refuse_large(image: Image.Image, max_pixels: int) -> None:
    """Stop at an image, or a TIFF's tile, with too many pixels; a decoder holds a whole tile, however few it needs."""
    sides = [image.size]
    tags = getattr(image, "tag_v2", {})
    if all(tag in tags for tag in _TILE_SIDES):
        sides.append((int(tags[_TILE_SIDES[0]]), int(tags[_TILE_SIDES[1]])))
    for width, height in sides:
        if width * height > max_pixels:
            size = f"{width} x {height} = {width * height:,} pixels"
            raise DecodingError(Reason.TOO_MANY_PIXELS, f"has {size} (limit: {max_pixels:,})")
        if max(width, height) > MAX_SIDE_PX:
            size = f"{max(width, height):,} pixels"
            raise DecodingError(Reason.TOO_MANY_PIXELS, f"has a side of {size} (limit: {MAX_SIDE_PX:,})")


def _explain_unidentified(data: bytes) -> DecodingError:
    """Pillow says only that no plugin took the bytes; their first ones tell a broken image from no image."""
    if not data.startswith(_SIGNATURES) and data[8:12] != b"WEBP":
        beginning = data[:8].hex(" ")
        return DecodingError(Reason.NOT_AN_IMAGE, f"starts with {beginning}, which is none of {', '.join(FORMATS)}")
    if _ends_early(data):
        return DecodingError(Reason.TRUNCATED, f"ends within its header, after {len(data):,} bytes")
    return DecodingError(Reason.CORRUPT, "its header cannot be read")


def _explain_failure(data: bytes, error: Exception) -> DecodingError:
    text: Any = str(error) or type(error).__name__
    cut = isinstance(error, EOFError) or "truncated" in text.lower() or _ends_early(data)
    return DecodingError(Reason.TRUNCATED if cut else Reason.CORRUPT, text)


def _ends_early(data: bytes) -> bool:
    """Whether the bytes stop before the end that their own format announces."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-1024:]
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-1024:]
    if data.startswith(b"GIF8"):
        return not data.endswith(b";")
    if data.startswith(b"BM"):
        return int.from_bytes(data[2:6], "little") > len(data)
    if data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith((b"II*\x00", b"MM\x00*")):  # where its directory of tags lies, often at the very end
        return int.from_bytes(data[4:8], "little" if data.startswith(b"II") else "big") >= len(data)
    return False
