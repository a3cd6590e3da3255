"""Decodes pictures from untrusted bytes, and encodes pictures.

This module checks all limits before it decodes anything: a file of some kilobytes can claim to be
a picture of gigabytes. Pillow has a limit of its own, but this limit is a global of the process,
and Pillow only warns up to twice the limit. So this module uses Pillow's plugins directly; they
ignore that limit.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
from typing import Literal

from PIL import Image, ImageCms
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from fluxfire.pictures import SMALLEST, flatten_to_rgb
from fluxfire.serve.errors import RefusedError

Format = Literal["PNG", "JPG", "WEBP"]
MEDIA_TYPES: dict[Format, str] = {"PNG": "image/png", "JPG": "image/jpeg", "WEBP": "image/webp"}
LARGEST_SIDE = 16_384
"""Most pixels of a side; it is also WebP's limit."""
MOST_SCANS = 100
"""Most scans of a JPEG. Each scan updates all pixels of the picture.

Progressive files have about ten. Each scan costs time for every pixel and may take only a
few bytes, so a small file could keep a core busy for hours.
"""
MOST_SCANNED = 500_000_000
"""Most pixels of a JPEG times its scans: ten scans of 50 megapixels."""
KEPT_PIXELS = 4_194_304
"""Most pixels of a picture in the queue. FLUX.1 Kontext works on one megapixel."""
LARGEST_PROFILE = 4 * 2**20
"""Most bytes of an ICC profile. Those of printers have up to about two million."""
_DATA_URL = re.compile(r"data:([\w.+/-]*)((?:;[\w.+=-]*)*),", re.ASCII | re.IGNORECASE)
_LONGEST_HEADER = 200  # characters before the comma of a data: URL
_EXIF_MARK = b"Exif\0\0"
_EXIF_ORIENTATION = 0x0112
_EXIF_SHORT = 3
_CHAIN = b"mpet"
"""Marks a chain of conversions in an ICC profile. Few bytes can make a chain so long that it keeps
a core busy for minutes, and cameras write none.
"""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
)
"""What Pillow raises for damaged files: documented errors, and errors seen in tests."""


class _JpegFile(JpegImageFile):
    """A JPEG file without EXIF for Pillow to read.

    Pillow reads all of the EXIF when it opens a file, to find a resolution. Older versions copy
    the data of each entry, and thousands of entries may point to the same megabytes.
    """

    def getexif(self) -> Image.Exif:
        """Return an empty EXIF."""
        return Image.Exif()


class PictureRefusedError(RefusedError):
    """A picture is damaged (400), too large (413), or of an unsupported format (415)."""


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode a PNG, JPEG or WebP file to upright RGB; transparent pixels become white.

    Only the first frame is decoded. Its colours become sRGB, as its ICC profile says. The file's
    metadata is dropped.

    Args:
        data: the whole file.
        max_pixels: the most pixels, width times height, that the picture may have.

    Returns:
        The picture, decoded.

    Raises:
        PictureRefusedError: the picture is damaged, too small, too large, or of another format.
    """
    try:
        file = _open_within_limits(data, max_pixels)
        file.load()
        turn = _UPRIGHT.get(_orientation(file))
        picture = _flatten_to_srgb(_to_eight_bits(file), file.info.get("icc_profile"))
    except MemoryError:
        raise PictureRefusedError(
            "the picture needs more memory than the server has left; send a smaller one",
            status=413,
            code="image-too-large",
        ) from None
    except _DAMAGE_ERRORS as error:
        raise _damaged_error(str(error)) from None
    picture.info = {}
    return picture if turn is None else picture.transpose(turn)


def pixels_of(data: bytes, *, max_pixels: int) -> int:
    """Read from a file's header how many pixels its picture has.

    Args:
        data: the whole file.
        max_pixels: the most pixels that the picture may have.

    Raises:
        PictureRefusedError: for the reasons of `decode` that show in the header.
    """
    try:
        if _is_webp(data):
            size = _webp_size(data)  # opening it would allocate memory for all pixels
            _check_size(size, max_pixels)
        else:
            size = _open_within_limits(data, max_pixels).size
    except _DAMAGE_ERRORS as error:
        raise _damaged_error(str(error)) from None
    return size[0] * size[1]


def scale_down(picture: Image.Image, pixels: int = KEPT_PIXELS) -> Image.Image:
    """Scale a picture down to a number of pixels if it has more, and keep its aspect ratio.

    Args:
        picture: in RGB.
        pixels: the most pixels, width times height.
    """
    scale = (pixels / (picture.width * picture.height)) ** 0.5
    if scale >= 1:
        return picture
    width, height = (max(SMALLEST, int(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)


def decode_base64(text: str, *, max_bytes: int) -> bytes:
    """Decode base64, or a data: URL that contains base64.

    Args:
        text: base64 of the standard alphabet with its padding, in one line or many; or a data: URL
            of any image type. The type is ignored: `decode` looks at the bytes.
        max_bytes: the most bytes that the result may have.

    Raises:
        PictureRefusedError: the text is neither, or it has more bytes.
    """
    start = 0
    if text[:5].lower() == "data:":
        header = _DATA_URL.match(text[:_LONGEST_HEADER])
        if header is None or not header[2].lower().endswith(";base64"):
            raise PictureRefusedError(
                "the data: URL must begin like data:image/png;base64,",
                status=400,
                code="image-malformed",
            )
        if not header[1].lower().startswith("image/"):
            raise PictureRefusedError(
                f"the data: URL holds {header[1] or 'text'!r}, not an image",
                status=415,
                code="image-format-unsupported",
            )
        start = header.end()
    try:
        # Only line breaks: a space may be a "+" that some client decoded as one of a URL.
        encoded = text[start:].encode("ascii").translate(None, b"\r\n")
        if len(encoded) > 4 * -(-max_bytes // 3):
            raise _too_many_bytes_error(max_bytes)
        data = binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError as error:  # binascii.Error is one, and so is a character beyond ASCII.
        raise PictureRefusedError(
            f"the image is not base64: {error}", status=400, code="image-malformed"
        ) from None
    if len(data) > max_bytes:
        raise _too_many_bytes_error(max_bytes)
    if not data:
        raise PictureRefusedError("the image is empty", status=400, code="image-malformed")
    return data


def encode(picture: Image.Image, format: Format, quality: int) -> bytes:  # noqa: A002 - the API's own word
    """Encode a picture as a file.

    Args:
        picture: what to write.
        format: the file's format.
        quality: 1 to 100, for JPG and WEBP; PNG is lossless.
    """
    file = io.BytesIO()
    if format == "PNG":
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG" if format == "JPG" else "WEBP", quality=quality)
    return file.getvalue()


def media_type(format: Format) -> str:  # noqa: A002 - as in `encode`
    """Return the media type of a format, such as image/png."""
    return MEDIA_TYPES[format]


def media_type_of(name: str) -> str:
    """Return the media type of a picture's file, by the end of its name."""
    suffix = name.rpartition(".")[2].upper()
    return next(kind for key, kind in MEDIA_TYPES.items() if key == suffix)


def data_url(data: bytes, format: Format) -> str:  # noqa: A002 - as in `encode`
    """Return a file's bytes as a data: URL."""
    return f"data:{media_type(format)};base64,{base64.b64encode(data).decode('ascii')}"


def _open_within_limits(data: bytes, max_pixels: int) -> Image.Image:
    """Read a file's header, and refuse a file that exceeds the limits."""
    file: Image.Image
    scans = 1
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        file = PngImageFile(io.BytesIO(data))
    elif data.startswith(b"\xff\xd8\xff"):
        # In pixel data DA never follows FF. Only metadata can make this count too high.
        scans = data.count(b"\xff\xda")
        if scans > MOST_SCANS:
            raise _too_many_scans_error(scans)
        file = _JpegFile(io.BytesIO(data))
    elif _is_webp(data):
        # Pillow's decoder allocates memory for all pixels in its constructor.
        _check_size(_webp_size(data), max_pixels)
        file = WebPImageFile(io.BytesIO(data))
    else:
        raise PictureRefusedError(
            "the image is neither PNG nor JPEG nor WebP; send one of these",
            status=415,
            code="image-format-unsupported",
        )
    _check_size(file.size, max_pixels)
    if scans > 1 and scans * file.width * file.height > MOST_SCANNED:
        raise _too_many_scans_error(scans)
    return file


def _is_webp(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


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
        raise _damaged_error("a WebP file without a picture at its start")
    return width, height


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if min(size) < SMALLEST:
        raise PictureRefusedError(
            f"the image has {width}x{height} pixels; a side needs {SMALLEST} or more",
            status=400,
            code="image-too-small",
        )
    if max(size) > LARGEST_SIDE or width * height > max_pixels:
        raise PictureRefusedError(
            f"the image has {width}x{height} pixels; the limits are {max_pixels} pixels, and "
            f"{LARGEST_SIDE} pixels for a side",
            status=413,
            code="image-too-large",
        )


def _orientation(file: Image.Image) -> int:
    """Return a picture's EXIF orientation; 1, upright, if it cannot be read.

    It reads no other entry, for the reason given at `_JpegFile`.
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


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip it at 255."""
    if not picture.mode.startswith("I"):
        return picture
    grey = picture.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    grey.info.pop("transparency", None)  # Its value has 16 bits.
    return grey


def _flatten_to_srgb(picture: Image.Image, profile: object) -> Image.Image:
    """Convert a picture to RGB, and its colours to sRGB; a broken or strange profile is ignored."""
    if not isinstance(profile, bytes) or len(profile) > LARGEST_PROFILE or _CHAIN in profile:
        return flatten_to_rgb(picture)
    mode = {"C": "CMYK", "1": "L", "L": "L"}.get(picture.getbands()[0], "RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        to_srgb = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, ImportError, *_DAMAGE_ERRORS):  # some Pillows have no ImageCms
        return flatten_to_rgb(picture)
    if mode != "RGB":
        return to_srgb.apply(picture if mode == "CMYK" else flatten_to_rgb(picture).convert(mode))
    flat = flatten_to_rgb(picture)
    return to_srgb.apply(flat, flat)  # in place, because it may have many megabytes


def _damaged_error(reason: str) -> PictureRefusedError:
    return PictureRefusedError(
        f"the image cannot be read: {reason[:200]}; the file is damaged or incomplete",
        status=400,
        code="image-damaged",
    )


def _too_many_scans_error(scans: int) -> PictureRefusedError:
    return PictureRefusedError(
        f"the JPEG has {scans} scans, which take too long to decode; save it again",
        status=413,
        code="image-too-large",
    )


def _too_many_bytes_error(max_bytes: int) -> PictureRefusedError:
    return PictureRefusedError(
        f"the image has more than {max_bytes} bytes; send a smaller one",
        status=413,
        code="image-too-large",
    )
