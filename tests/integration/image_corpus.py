"""Images as a hostile or careless client sends them, made by code: cut off, swollen, ambiguous, rare, or merely odd."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

PIXELS = 25_000_000  # the service's default limit; the bombs are just below or far above it


@dataclass(frozen=True)
class Sent:
    """What is sent, and the statuses of which one must come back.

    Attributes:
        name: for a failure's message.
        data: the bytes.
        statuses: that are right.
    """

    name: str
    data: bytes
    statuses: frozenset[int]


READ = frozenset({200})
REFUSED = frozenset({415, 422})
EITHER = READ | REFUSED


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def photograph(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """A smooth, coloured picture that no turn or mirror leaves alone."""
    rows, columns = np.mgrid[0:height, 0:width]
    bands = [rows * 255 // height, columns * 255 // width, (rows + columns) * 255 // (width + height)]
    return Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8)).convert(mode)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_zeros(width: int, height: int, *, depth: int = 8, colour: int = 0, before: bytes = b"") -> bytes:
    """A PNG as small as its size allows; `colour` is PNG's own: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    zeros = ((width * depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour] + 7) // 8 + 1) * height
    compressor = zlib.compressobj(1)
    piece = bytes(min(zeros, 2**20))
    pixels = b"".join(compressor.compress(piece) for _ in range(-(-zeros // len(piece)))) + compressor.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    end = png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + before + end


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header lies."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = png_of_zeros(1, 1)
    return data[:8] + png_chunk(b"IHDR", header) + data[33:]


def tiff_of(*entries: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """A little-endian TIFF with one directory of tag, type, count and value, and `data` behind it."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + data


def grey_tiff(width: int, height: int, *more: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    start = 8 + 2 + 12 * (5 + len(more)) + 4
    return tiff_of(
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        *[(tag, kind, count, start if value < 0 else value) for tag, kind, count, value in more],
        data=data,
    )


def rationals(count: int) -> bytes:
    """EXIF that turns the image and holds `count` values of 64,000 bytes each."""
    each, start = 64_000, 8 + 2 + 12 * (count + 1) + 4
    entries = [(0x9000 + index, 5, each // 8, start + index * each) for index in range(count)]
    return tiff_of((0x0112, 3, 1, 6), *entries, data=bytes([1, 0, 0, 0]) * (count * each // 4))


def bitmap(width: int, height: int, bits: int, compression: int, data: bytes) -> bytes:
    start = 54 + 4 * 2**bits
    head = struct.pack("<IHHI", start + len(data), 0, 0, start)
    return (
        b"BM"
        + head
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 2**bits, 0)
        + bytes(start - 54)
        + data
    )


def cut_off() -> Iterator[Sent]:
    for image_format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = encode(photograph(), image_format)
        for share in (0.01, 0.1, 0.3, 0.5, 0.8, 0.99):
            yield Sent(f"{image_format} cut at {share:.0%}", whole[: max(1, int(len(whole) * share))], EITHER)
    yield Sent("no bytes", b"", frozenset({400}))
    yield Sent("one byte", b"\x89", REFUSED)
    yield Sent("zeros", bytes(5000), REFUSED)
    yield Sent("text", b"an image, honestly", REFUSED)


def swollen() -> Iterator[Sent]:
    yield Sent("PNG of 100,000 x 100,000", png_of_size(100_000, 100_000), REFUSED)
    yield Sent("PNG of 2^31 - 1 squared", png_of_size(2**31 - 1, 2**31 - 1), REFUSED)
    yield Sent("PNG without width", png_of_size(0, 10), REFUSED)
    yield Sent("PNG without size", png_of_size(0, 0), REFUSED)
    yield Sent("PNG, RGBA of 16 bits, largest", png_of_zeros(5000, 5000, depth=16, colour=6), READ)
    yield Sent("PNG, 16-bit grey, largest", png_of_zeros(5000, 5000, depth=16), READ)
    yield Sent("PNG, one pixel too many", png_of_zeros(5000, 5001, depth=1), REFUSED)
    yield Sent("PNG, 1 x 25,000,000", png_of_zeros(1, PIXELS, depth=1), REFUSED)
    yield Sent("PNG, 25,000,000 x 1", png_of_zeros(PIXELS, 1, depth=1), REFUSED)
    inflated = zlib.compress(bytes(1_000_000), 9)
    text = b"".join(png_chunk(b"zTXt", b"k%d\0\0" % index + inflated) for index in range(200))
    yield Sent("PNG with 200 MB of text", png_of_zeros(28, 28, before=text), EITHER)
    profiles = png_chunk(b"iCCP", b"k\0\0" + inflated) * 1000
    yield Sent("PNG with 1 GB of profiles", png_of_zeros(28, 28, before=profiles), EITHER)
    yield Sent("PNG with 50,000 chunks", png_of_zeros(28, 28, before=png_chunk(b"tEXt", b"k\0") * 50_000), EITHER)
    exif = png_chunk(b"eXIf", rationals(140))
    yield Sent("PNG with 9 MB of EXIF", png_of_zeros(28, 28, before=exif), READ)
    jpeg = encode(photograph(2000, 2000, "L"), "JPEG", progressive=True, quality=5)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    yield Sent("JPEG of 600 scans", jpeg[:-2] + last * 600 + jpeg[-2:], REFUSED)
    yield Sent("JPEG of 90 scans", jpeg[:-2] + last * 80 + jpeg[-2:], READ)
    yield Sent("JPEG of 100,000 comments", jpeg[:2] + b"\xff\xfe\x00\x02" * 100_000 + jpeg[2:], REFUSED)
    yield Sent("JPEG whose size lies", _resized_jpeg(65_500, 65_500), REFUSED)
    yield Sent("JPEG without height", _resized_jpeg(100, 0), REFUSED)
    gif = bytearray(encode(photograph(10, 10, "P"), "GIF"))
    frame = gif.index(b"\x2c")
    gif[frame + 5 : frame + 9] = struct.pack("<HH", 65_535, 65_535)
    yield Sent("GIF with a frame larger than itself", bytes(gif), REFUSED)
    frames = [photograph(16, 16, "L").point(lambda level, shift=shift: (level + shift) % 256) for shift in range(256)]
    yield Sent("GIF of 256 frames", encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), READ)
    tile = ((322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, -1), (325, 4, 1, 100))
    yield Sent("TIFF with a tile of 1.6 GB", grey_tiff(10, 10, (259, 3, 1, 8), *tile, data=bytes(100)), REFUSED)
    strips = ((259, 3, 1, 1), (278, 4, 1, 1), (273, 4, 2**31, -1), (279, 4, 2**31, -1))
    yield Sent("TIFF with 2^31 strips", grey_tiff(10, 10, *strips, data=bytes(100)), REFUSED)
    strips = ((259, 3, 1, 1), (278, 4, 1, 1), (273, 4, 100_000, -1), (279, 4, 100_000, -1))
    yield Sent("TIFF with 100,000 strips", grey_tiff(500, 500, *strips, data=bytes(400_000)), EITHER)
    pages = [photograph(8, 8)] * 200
    yield Sent("TIFF of 200 pages", encode(pages[0], "TIFF", save_all=True, append_images=pages[1:]), READ)
    float_tiff = encode(Image.fromarray(np.zeros((4900, 5000), np.float32)), "TIFF", compression="tiff_adobe_deflate")
    yield Sent("TIFF of floats, largest", float_tiff, READ)
    yield Sent("TIFF that points to itself", b"II*\x00" + struct.pack("<IHI", 8, 0, 8), REFUSED)
    webp = bytearray(encode(photograph(10, 10), "WEBP", save_all=True, append_images=[photograph(10, 10, "L")]))
    canvas = webp.index(b"VP8X") + 12
    webp[canvas : canvas + 6] = (16_382).to_bytes(3, "little") * 2
    yield Sent("WebP of 16,383 x 16,383", bytes(webp), REFUSED)
    yield Sent("BMP of 2^31 - 1 rows", bitmap(2**31 - 1, 2**31 - 1, 8, 0, b""), REFUSED)
    yield Sent("BMP, run lengths that jump", bitmap(4000, 4000, 8, 1, b"\x00\x02\xff\x00" * 100_000), EITHER)
    yield Sent("BMP without size", bitmap(0, 0, 8, 0, b""), REFUSED)


def _resized_jpeg(width: int, height: int) -> bytes:
    data = bytearray(encode(photograph(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def ambiguous() -> Iterator[Sent]:
    png, jpeg, gif = (encode(photograph(), name) for name in ("PNG", "JPEG", "GIF"))
    archive = b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18)
    page = b"<html><script>alert(document.cookie)</script></html>"
    vector = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield Sent("PNG and archive", png + archive, READ)
    yield Sent("archive and PNG", archive + png, REFUSED)
    yield Sent("GIF and script", gif[:6] + gif[6:] + b"=1;alert(1)//", READ)
    yield Sent("script named GIF", b"GIF89a=1;alert(1)//", REFUSED)
    yield Sent("JPEG with a page in its comment", encode(photograph(), "JPEG", comment=page), READ)
    yield Sent("PNG in JPEG's clothes", jpeg[:4] + png, REFUSED)
    yield Sent("two JPEGs", jpeg + jpeg, READ)
    yield Sent("page", page, REFUSED)
    yield Sent("vector", vector, REFUSED)
    yield Sent("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage", REFUSED)
    yield Sent("PDF", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj", REFUSED)
    yield Sent("PPM", encode(photograph(), "PPM"), REFUSED)
    yield Sent("ICO", encode(photograph(), "ICO"), REFUSED)
    yield Sent("JPEG 2000", encode(photograph(), "JPEG2000"), REFUSED)
    yield Sent("compressed PNG", zlib.compress(png), REFUSED)


def rare() -> Iterator[Sent]:
    grey16: npt.NDArray[np.uint16] = np.linspace(0, 65_535, 900, dtype=np.uint16).reshape(30, 30)
    for image_format in ("PNG", "TIFF"):
        yield Sent(f"16-bit grey {image_format}", encode(Image.fromarray(grey16), image_format), READ)
    yield Sent("CMYK JPEG", encode(photograph(mode="CMYK"), "JPEG"), READ)
    ycck = bytearray(encode(photograph(mode="CMYK"), "JPEG"))
    ycck[ycck.index(b"Adobe") + 11] = 2
    yield Sent("YCCK JPEG", bytes(ycck), READ)
    yield Sent("palette", encode(photograph().quantize(32)), READ)
    yield Sent("palette with a transparent colour", encode(photograph().quantize(32), transparency=3), READ)
    yield Sent("palette with alphas", encode(photograph().quantize(8), transparency=bytes(range(0, 256, 32))), READ)
    yield Sent("grey with a transparent level", encode(photograph(mode="L"), transparency=7), READ)
    for mode in ("LA", "RGBA", "1", "L", "RGB"):
        yield Sent(f"PNG of mode {mode}", encode(photograph(mode=mode)), READ)
    for number in (np.nan, np.inf, -np.inf):
        tiff = encode(Image.fromarray(np.array([[0.5, number]], np.float32)), "TIFF")
        yield Sent(f"TIFF with {number}", tiff, REFUSED)
    yield Sent("TIFF of floats", encode(Image.fromarray(np.linspace(0, 1, 99, dtype=np.float32)[None]), "TIFF"), READ)
    yield Sent("TIFF in CIE Lab", encode(Image.new("LAB", (9, 9), (50, 128, 128)), "TIFF"), READ)
    for image_format in ("GIF", "WEBP", "PNG"):
        frames = {"save_all": True, "append_images": [photograph(mode="L").convert("RGB")]}
        yield Sent(f"animated {image_format}", encode(photograph(), image_format, **frames), READ)
    yield Sent("progressive JPEG", encode(photograph(), "JPEG", progressive=True), READ)
    yield Sent("WebP without loss, with alpha", encode(photograph(mode="RGBA"), "WEBP", lossless=True), READ)
    yield Sent("one pixel", encode(photograph(1, 1)), READ)
    yield Sent("1 x 20,000", encode(Image.new("L", (1, 20_000), 9)), READ)
    yield Sent("20,000 x 1", encode(Image.new("L", (20_000, 1), 9)), READ)
    for compression in ("tiff_lzw", "packbits", "jpeg", "group4"):
        image = photograph(mode="1" if compression == "group4" else "RGB")
        yield Sent(f"TIFF, {compression}", encode(image, "TIFF", compression=compression), READ)
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "\u202e\x00 </script>", zip=True)
    yield Sent("PNG with an odd text", encode(photograph(), pnginfo=info), READ)
    bad_turn = tiff_of((0x0112, 2, 4, 0x64636261))
    yield Sent("EXIF whose orientation is text", encode(photograph(), "JPEG", exif=b"Exif\0\0" + bad_turn), READ)
    yield Sent("EXIF that is no EXIF", encode(photograph(), "JPEG", exif=b"Exif\0\0" + b"garbage" * 9), EITHER)


def corpus() -> list[Sent]:
    parts: tuple[Callable[[], Iterator[Sent]], ...] = (cut_off, swollen, ambiguous, rare)
    return [sent for part in parts for sent in part()]


def stored_turned(upright: Image.Image, orientation: int) -> Image.Image:
    """The image as a camera stores it that notes this EXIF orientation; turning it as noted gives `upright`."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    return upright if undo is None else upright.transpose(undo)


def turned(upright: Image.Image, orientation: int, image_format: str, **options: object) -> bytes:
    """An encoded image that its EXIF says to turn."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(stored_turned(upright, orientation), image_format, exif=exif, **options)
