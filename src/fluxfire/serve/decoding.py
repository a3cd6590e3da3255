"""Pictures from bytes that nobody vouches for, and bytes from pictures.

All limits are checked before anything is decoded: a file of some kilobytes can claim to be
a picture of gigabytes. Pillow has a limit of its own, but it is a global of the process and
half of it is a warning; so its plugins are used directly here, which do not look at it.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
from typing import Literal

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from fluxfire.pictures import SMALLEST, opaque
from fluxfire.serve.refusing import Refused

Format = Literal["PNG", "JPG", "WEBP"]
MEDIA_TYPES: dict[Format, str] = {"PNG": "image/png", "JPG": "image/jpeg", "WEBP": "image/webp"}
LARGEST_SIDE = 16_384
"""Pixels of a side; WebP itself ends there."""
MOST_SCANS = 100
"""Times that a JPEG may go over all its pixels.

Progressive files have about ten. Each scan costs time for every pixel and may take only a
few bytes, so a small file could keep a core busy for hours.
"""
MOST_SCANNED = 500_000_000
"""Pixels that a JPEG may go over, all its scans together: ten scans of 50 megapixels."""
KEPT_PIXELS = 4_194_304
"""Pixels of a picture that are kept while it waits. FLUX.1 Kontext works on one megapixel."""
_DATA_URL = re.compile(r"data:([\w.+/-]*)((?:;[\w.+=-]*)*),", re.ASCII | re.IGNORECASE)
_LONGEST_HEADER = 200  # characters before the comma of a data: URL
_EXIF_MARK = b"Exif\0\0"
_EXIF_ORIENTATION = 0x0112
_EXIF_SHORT = 3
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError,
    AttributeError, RuntimeError, struct.error,
)  # fmt: skip
"""What Pillow raises for damaged files, by its documentation and by what was seen."""


class _JpegFile(JpegImageFile):
    """A JPEG file whose EXIF Pillow leaves alone.

    It reads all of it when a file is opened, to find a resolution; older versions copy what
    each entry points to, and thousands of entries may point to the same megabytes.
    """

    def getexif(self) -> Image.Exif:
        """Give none at all."""
        return Image.Exif()


class PictureRefused(Refused):
    """A picture is damaged (400), too large (413), or of a format not taken (415)."""


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode a PNG, JPEG or WebP file: upright, in RGB, what is transparent white.

    Of several frames only the first is decoded. The file's metadata does not come along.

    Args:
        data: the whole file.
        max_pixels: how many pixels, width times height, it may have.

    Returns:
        The picture, decoded.

    Raises:
        PictureRefused: it is damaged, too small or too large, or of another format.
    """
    try:
        file = _opened(data, max_pixels)
        file.load()
        turn = _UPRIGHT.get(_orientation(file))
        picture = opaque(_in_eight_bits(file))
    except MemoryError:
        raise PictureRefused(
            "the picture needs more memory than the server has left; send a smaller one",
            status=413,
            code="image-too-large",
        ) from None
    except _DAMAGE as error:
        raise _damaged(str(error)) from None
    picture.info = {}
    return picture if turn is None else picture.transpose(turn)


def reduced(picture: Image.Image, pixels: int = KEPT_PIXELS) -> Image.Image:
    """Scale a picture down to so many pixels, if it has more; its shape stays.

    Args:
        picture: in RGB.
        pixels: width times height at the most.
    """
    scale = (pixels / (picture.width * picture.height)) ** 0.5
    if scale >= 1:
        return picture
    width, height = (max(SMALLEST, int(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)


def unwrapped(text: str, *, max_bytes: int) -> bytes:
    """Take the bytes out of base64, or out of a data: URL with base64.

    Args:
        text: base64 of the standard alphabet with its padding and without line breaks; or
            a data: URL of some image type. Which one is not believed: the bytes tell.
        max_bytes: how many bytes may come out.

    Raises:
        PictureRefused: it is not such a text, or has more bytes.
    """
    start = 0
    if text[:5].lower() == "data:":
        header = _DATA_URL.match(text[:_LONGEST_HEADER])
        if header is None or not header[2].lower().endswith(";base64"):
            raise PictureRefused(
                "the data: URL does not begin as data:image/png;base64, does",
                status=400,
                code="image-malformed",
            )
        if not header[1].lower().startswith("image/"):
            raise PictureRefused(
                f"the data: URL holds {header[1] or 'text'!r}, not an image",
                status=415,
                code="image-format-unsupported",
            )
        start = header.end()
    if len(text) - start > 4 * -(-max_bytes // 3):
        raise _too_many_bytes(max_bytes)
    try:
        data = binascii.a2b_base64(text[start:], strict_mode=True)
    except ValueError as error:  # binascii.Error is one, and so is a character beyond ASCII.
        raise PictureRefused(
            f"the image is not base64: {error}", status=400, code="image-malformed"
        ) from None
    if len(data) > max_bytes:
        raise _too_many_bytes(max_bytes)
    if not data:
        raise PictureRefused("the image is empty", status=400, code="image-malformed")
    return data


def encode(picture: Image.Image, format: Format, quality: int) -> bytes:  # noqa: A002 - the API's own word
    """Write a picture into a file's bytes.

    Args:
        picture: what to write.
        format: the file's format.
        quality: 1 to 100, for JPG and WEBP; a PNG loses nothing.
    """
    file = io.BytesIO()
    if format == "PNG":
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG" if format == "JPG" else "WEBP", quality=quality)
    return file.getvalue()


def media_type(format: Format) -> str:  # noqa: A002 - as in `encode`
    """Give the media type of a format, such as image/png."""
    return MEDIA_TYPES[format]


def data_url(data: bytes, format: Format) -> str:  # noqa: A002 - as in `encode`
    """Write a file's bytes as a data: URL."""
    return f"data:{media_type(format)};base64,{base64.b64encode(data).decode('ascii')}"


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """Read a file's header, and refuse what is beyond the limits."""
    file: Image.Image
    scans = 1
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        file = PngImageFile(io.BytesIO(data))
    elif data.startswith(b"\xff\xd8\xff"):
        # In pixel data the byte FF is never followed by DA, so only metadata counts too much.
        scans = data.count(b"\xff\xda")
        if scans > MOST_SCANS:
            raise _too_many_scans(scans)
        file = _JpegFile(io.BytesIO(data))
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        # Pillow's decoder sets memory for all pixels aside when it is made.
        _check_size(_webp_size(data), max_pixels)
        file = WebPImageFile(io.BytesIO(data))
    else:
        raise PictureRefused(
            "the image is neither PNG nor JPEG nor WebP; send one of these",
            status=415,
            code="image-format-unsupported",
        )
    _check_size(file.size, max_pixels)
    if scans > 1 and scans * file.width * file.height > MOST_SCANNED:
        raise _too_many_scans(scans)
    return file


def _webp_size(data: bytes) -> tuple[int, int]:
    """Read a WebP's width and height from its first chunk (RFC 9649)."""
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        width, height = (int.from_bytes(body[at : at + 3], "little") + 1 for at in (4, 7))
    elif kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack("<6xHH", body))
    else:
        raise _damaged("a WebP file without a picture at its start")
    return width, height


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if min(size) < SMALLEST:
        raise PictureRefused(
            f"the image has {width}x{height} pixels; a side needs {SMALLEST} or more",
            status=400,
            code="image-too-small",
        )
    if max(size) > LARGEST_SIDE or width * height > max_pixels:
        raise PictureRefused(
            f"the image has {width}x{height} pixels; at most {max_pixels} are taken, and "
            f"{LARGEST_SIDE} along a side",
            status=413,
            code="image-too-large",
        )


def _orientation(file: Image.Image) -> int:
    """Read how a picture is turned from its EXIF; 1, upright, where that cannot be read.

    Only that one entry, for the reason told at `_JpegFile`.
    """
    exif = file.info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(_EXIF_MARK)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(count):
            found = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
            if found[:3] == (_EXIF_ORIENTATION, _EXIF_SHORT, 1):
                return int(found[3])
    except struct.error:
        pass
    return 1


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would cut it off at 255."""
    if not picture.mode.startswith("I"):
        return picture
    grey = picture.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    grey.info.pop("transparency", None)  # It names a value of 16 bits.
    return grey


def _damaged(reason: str) -> PictureRefused:
    return PictureRefused(
        f"the image cannot be read: {reason[:200]}; the file is damaged or incomplete",
        status=400,
        code="image-damaged",
    )


def _too_many_scans(scans: int) -> PictureRefused:
    return PictureRefused(
        f"the JPEG goes over its pixels {scans} times, which takes too long; save it anew",
        status=413,
        code="image-too-large",
    )


def _too_many_bytes(max_bytes: int) -> PictureRefused:
    return PictureRefused(
        f"the image has more than {max_bytes} bytes; send a smaller one",
        status=413,
        code="image-too-large",
    )
