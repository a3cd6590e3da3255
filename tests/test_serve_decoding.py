"""Pictures from bytes that nobody vouches for: decoded within limits, or refused."""

from __future__ import annotations

import base64
import io
import random
import struct
import warnings
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms

from fluxfire.errors import FluxfireError
from fluxfire.serve import decoding
from fluxfire.serve.decoding import (
    PictureRefusedError,
    data_url,
    decode,
    decode_base64,
    encode,
    media_type,
)

LIMIT = 100 * 100
FORMATS = ["PNG", "JPG", "WEBP"]


def drawn(width=40, height=24, mode="RGB"):
    """A picture whose corners differ: red, green, blue and white quarters."""
    picture = Image.new("RGB", (width, height), "white")
    picture.paste("red", (0, 0, width // 2, height // 2))
    picture.paste("lime", (width // 2, 0, width, height // 2))
    picture.paste("blue", (0, height // 2, width // 2, height))
    return picture.convert(mode)


def saved(picture, file_format, **options):
    file = io.BytesIO()
    picture.save(file, "JPEG" if file_format == "JPG" else file_format, **options)
    return file.getvalue()


def refused(data, *, max_pixels=LIMIT):
    with pytest.raises(PictureRefusedError) as caught:
        decode(data, max_pixels=max_pixels)
    return caught.value.status, caught.value.code


def near(one, other, tolerance):
    bands = ImageChops.difference(one, other).getextrema()
    return max(high for _, high in bands) <= tolerance


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width, height):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


def jpeg_claiming(width, height):
    data = bytearray(saved(drawn(), "JPG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_claiming(kind, width, height):
    if kind == b"VP8X":
        sides = [(side - 1).to_bytes(3, "little") for side in (width, height)]
        body = bytes(4) + b"".join(sides)
    elif kind == b"VP8L":
        body = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + bytes(9)
    else:
        body = b"\x10\x00\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(8)
    inner = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


@pytest.mark.parametrize("file_format", FORMATS)
def test_decodes_what_is_encoded(file_format):
    picture = drawn()
    again = decode(encode(picture, file_format, 95), max_pixels=LIMIT)
    assert (again.mode, again.size, again.info) == ("RGB", picture.size, {})
    middle = [again.getpixel(at) for at in ((8, 5), (32, 5), (8, 19), (32, 19))]
    wanted = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    gap = max(
        abs(a - b)
        for one, two in zip(middle, wanted, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert gap <= (0 if file_format == "PNG" else 12)


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 40), st.integers(16, 40), st.randoms(use_true_random=False))
def test_png_loses_nothing(width, height, chance):
    picture = Image.frombytes("RGB", (width, height), chance.randbytes(3 * width * height))
    assert decode(encode(picture, "PNG", 1), max_pixels=LIMIT).tobytes() == picture.tobytes()


@pytest.mark.parametrize("file_format", ["JPG", "WEBP"])
def test_quality_is_used(file_format):
    noise = Image.frombytes("RGB", (64, 64), random.Random(1).randbytes(3 * 64 * 64))
    assert len(encode(noise, file_format, 10)) < len(encode(noise, file_format, 60))
    assert len(encode(noise, file_format, 60)) < len(encode(noise, file_format, 95))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_out_upright(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "an entry before it"
    turned = decode(saved(drawn(), file_format, exif=exif, quality=95), max_pixels=LIMIT)
    # Which way each value turns, by the standard: what stands in the picture's corners.
    corner = {
        1: "RGBW",
        2: "GRWB",
        3: "WBGR",
        4: "BWRG",
        5: "RBGW",
        6: "BRWG",
        7: "WGBR",
        8: "GWRB",
    }[orientation]
    colours = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}
    right, low = turned.width - 4, turned.height - 4
    for letter, at in zip(corner, [(3, 3), (right, 3), (3, low), (right, low)], strict=True):
        seen = turned.getpixel(at)
        assert max(abs(a - b) for a, b in zip(seen, colours[letter], strict=True)) < 60
    assert turned.size == ((40, 24) if orientation < 5 else (24, 40))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"II*\0", b"MM\0*", b"MM\0*\0\0\0\x08"]))
def test_exif_that_makes_no_sense_turns_nothing_away(body, head):
    data = saved(drawn(), "PNG", exif=b"Exif\0\0" + head + body)
    assert decode(data, max_pixels=LIMIT).size in {(40, 24), (24, 40)}


def test_the_exif_of_a_jpeg_is_not_read_by_pillow(monkeypatch):
    # Entries may claim more memory than there is, each pointing to the same megabytes.
    monkeypatch.setattr(Image.Exif, "load", lambda *_: pytest.fail("Pillow reads EXIF"))
    entries = b"".join(struct.pack(">HHII", tag, 7, 60_000, 8) for tag in range(1, 400))
    tiff = b"MM\0*" + struct.pack(">IH", 8, 399) + entries
    body = b"Exif\0\0" + tiff + bytes(60_000 - len(tiff))
    data = saved(drawn(), "JPG")
    length = struct.unpack(">H", data[4:6])[0]  # of the JFIF segment, which tells a resolution
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[4 + length :]
    assert decode(data, max_pixels=LIMIT).size == (40, 24)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_what_is_transparent_becomes_white(file_format):
    picture = drawn(mode="RGBA")
    picture.putalpha(Image.new("L", picture.size, 0))
    shown = decode(saved(picture, file_format, lossless=True), max_pixels=LIMIT)
    assert shown.getcolors() == [(40 * 24, (255, 255, 255))]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_pngs_of_every_kind(mode):
    grey = Image.new("L", (20, 20), 128)
    if mode == "I;16":
        picture = Image.frombytes("I;16", (20, 20), struct.pack("<H", 128 * 257) * 400)
    else:
        picture = grey.quantize() if mode == "P" else grey.convert("RGB").convert(mode)
    shown = decode(saved(picture, "PNG"), max_pixels=LIMIT)
    assert shown.mode == "RGB"
    if mode != "1":
        assert near(shown, grey.convert("RGB"), 3)


def test_grey_of_16_bits_keeps_its_shades():
    values = [255 * 257 * at // 399 for at in range(400)]
    picture = Image.frombytes("I;16", (20, 20), struct.pack("<400H", *values))
    shown = decode(saved(picture, "PNG"), max_pixels=LIMIT).getchannel("R").tobytes()
    assert list(shown) == [round(value / 257) for value in values]


def test_cmyk_jpegs():
    shown = decode(saved(Image.new("CMYK", (20, 20)), "JPG"), max_pixels=LIMIT)
    assert near(shown, Image.new("RGB", (20, 20), "white"), 3)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_of_several_frames_the_first_is_taken(file_format):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    data = saved(
        frames[0], file_format, save_all=True, append_images=frames[1:], duration=50, lossless=True
    )
    assert decode(data, max_pixels=LIMIT).getpixel((9, 9)) == (255, 0, 0)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
"""The profile whose red is sRGB's green, and the other way round."""


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_become_srgb(file_format, mode):
    options = {"icc_profile": SWAPPED, "quality": 95, "lossless": True}
    if file_format == "JPG":
        mode = "RGB"
    shown = decode(saved(drawn(mode=mode), file_format, **options), max_pixels=LIMIT)
    red, green, blue = drawn().split()
    swapped = Image.merge("RGB", (green, red, blue))
    for at in ((8, 5), (32, 5), (8, 19), (32, 19)):
        pairs = zip(shown.getpixel(at), swapped.getpixel(at), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 12
    assert shown.info == {}


def profile(kinds, tags):
    """An ICC profile with such tags."""
    head, table, body = 128, struct.pack(">I", len(tags)), b""
    start = head + len(table) + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    beginning = struct.pack(">I4xI", start + len(body), 0x02100000) + kinds + bytes(12) + b"acsp"
    return beginning.ljust(head, b"\0") + table + body


WHITE = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
LINEAR = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, 256)
LINEAR_GREY = profile(b"mntrGRAYXYZ ", {b"wtpt": WHITE, b"kTRC": LINEAR})
IDENTITY = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
ONLY_KEY = bytes([255, 128, 128, 0, 128, 128]) * 8  # white without black ink, else black
TABLES = bytes(range(256)) * 4, bytes(range(256)) * 3
INKS = b"mft1\0\0\0\0\4\3\2\0" + IDENTITY + TABLES[0] + ONLY_KEY + TABLES[1]
GREY_INK = profile(b"prtrCMYKLab ", {b"wtpt": WHITE, b"A2B0": INKS})


@pytest.mark.parametrize(("ink", "shade"), [((255, 0, 0, 0), 255), ((0, 0, 0, 255), 0)])
def test_inks_become_srgb(ink, shade):
    data = saved(Image.new("CMYK", (20, 20), ink), "JPG", icc_profile=GREY_INK)
    assert near(decode(data, max_pixels=LIMIT), Image.new("RGB", (20, 20), (shade,) * 3), 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_becomes_srgb(mode):
    picture = Image.new("L", (20, 20), 255 if mode == "1" else 100).convert(mode)
    shown = decode(saved(picture, "PNG", icc_profile=LINEAR_GREY), max_pixels=LIMIT)
    (grey, *_) = shown.getpixel((9, 9))
    assert (grey, shown.mode) == (255 if mode == "1" else 168, "RGB")


ODD_PROFILES = {
    "srgb": SRGB,
    "empty": b"",
    "no profile": b"x" * 300,
    "cut": SWAPPED[:-100],
    "without colours": SRGB.replace(b"rXYZ", b"zzzz"),
    "of inks": GREY_INK,
    "of grey": LINEAR_GREY,
    "with a chain": SWAPPED + b"mpet",
}


@pytest.mark.parametrize("odd", ODD_PROFILES.values(), ids=ODD_PROFILES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_profiles_that_do_not_fit_are_ignored(odd, mode):
    picture = drawn(mode=mode)
    if mode == "CMYK" and odd == GREY_INK:
        odd = SWAPPED
    for file_format in {"RGB": FORMATS, "CMYK": ["JPG"]}.get(mode, ["PNG"]):
        data = saved(picture, file_format, icc_profile=odd, lossless=True)
        plain = saved(picture, file_format, lossless=True)
        shown, wanted = (decode(each, max_pixels=LIMIT) for each in (data, plain))
        assert shown.tobytes() == wanted.tobytes()


def test_a_profile_that_is_too_large_is_ignored(monkeypatch):
    monkeypatch.setattr(decoding, "LARGEST_PROFILE", len(SWAPPED) - 1)
    assert decode(saved(drawn(), "PNG", icc_profile=SWAPPED), max_pixels=LIMIT) == drawn()


BOMBS = {
    "png": png_claiming,
    "jpeg": jpeg_claiming,
    "webp, simple": lambda *size: webp_claiming(b"VP8 ", *size),
    "webp, lossless": lambda *size: webp_claiming(b"VP8L", *size),
    "webp, extended": lambda *size: webp_claiming(b"VP8X", *size),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("size", [(101, 100), (16_000, 16_000)])
def test_too_many_pixels_are_refused_before_anything_is_decoded(bomb, size, monkeypatch):
    for kind in (decoding.PngImageFile, decoding.JpegImageFile, decoding.WebPImageFile):
        monkeypatch.setattr(kind, "load", lambda _: pytest.fail("it was decoded"))
    monkeypatch.setattr(
        decoding.WebPImageFile, "_open", lambda _: pytest.fail("memory was set aside")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refused(bomb(*size)) == (413, "image-too-large")


def test_a_side_is_limited_too():
    side = decoding.LARGEST_SIDE
    assert refused(png_claiming(side + 1, 16), max_pixels=10**9) == (413, "image-too-large")
    assert refused(png_claiming(side, 16), max_pixels=10**9) == (400, "image-damaged")


def test_pillows_own_limit_neither_warns_nor_refuses(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # ours is larger: 960 are nine times it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file_format in ("PNG", "JPG"):
            assert decode(encode(drawn(), file_format, 90), max_pixels=LIMIT).size == (40, 24)


def test_a_picture_too_small_to_edit_is_refused():
    assert refused(encode(drawn(15, 40), "PNG", 90)) == (400, "image-too-small")


def test_a_jpeg_of_very_many_scans_is_refused():
    data = saved(drawn(), "JPG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    assert decode(data, max_pixels=LIMIT)
    slow = data[:end] + data[start:end] * decoding.MOST_SCANS + data[end:]
    assert refused(slow) == (413, "image-too-large")


def test_the_larger_a_jpeg_the_fewer_scans_it_may_have(monkeypatch):
    data = saved(drawn(), "JPG", progressive=True)
    pixels = drawn().width * drawn().height
    scans = data.count(b"\xff\xda")
    monkeypatch.setattr(decoding, "MOST_SCANNED", scans * pixels)
    assert decode(data, max_pixels=LIMIT)
    monkeypatch.setattr(decoding, "MOST_SCANNED", scans * pixels - 1)
    assert refused(data) == (413, "image-too-large")
    assert decode(saved(drawn(), "JPG"), max_pixels=LIMIT)  # in one scan it may


@given(st.integers(16, 700), st.integers(16, 700), st.integers(256, 10_000))
@settings(max_examples=50, deadline=None)
def test_a_picture_is_reduced_to_so_many_pixels_and_keeps_its_shape(width, height, pixels):
    picture = Image.new("RGB", (width, height), "teal")
    small = decoding.scale_down(picture, pixels)
    if width * height <= pixels:
        assert small is picture
        return
    assert small.getpixel((0, 0)) == picture.getpixel((0, 0))
    assert small.width * small.height <= pixels or min(small.size) == 16
    assert all(side == 16 or side > 15 for side in small.size)
    if min(small.size) > 16:
        assert abs(small.width - width * (pixels / (width * height)) ** 0.5) <= 1


@pytest.mark.parametrize("file_format", FORMATS)
def test_truncated_files_are_refused(file_format):
    data = encode(drawn(), file_format, 90)
    for end in range(12, len(data) * 3 // 4, 5):
        assert refused(data[:end])[0] == 400


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(file_format):
    assert refused(saved(drawn(), file_format)) == (415, "image-format-unsupported")


def only_refuses(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = decode(data, max_pixels=LIMIT)
        except PictureRefusedError as error:
            assert isinstance(error, FluxfireError)
            assert error.status in {400, 413, 415}
            assert len(str(error)) > 20
        else:
            assert picture.mode == "RGB"
            assert 16 * 16 <= picture.width * picture.height <= LIMIT


MAGIC = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBP"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(MAGIC), st.binary(max_size=200))
def test_bytes_decode_or_are_refused(magic, body):
    only_refuses(magic + body)


SEEDS = [
    saved(drawn(), "PNG"),
    saved(drawn(mode="P"), "PNG", transparency=0),
    saved(drawn(mode="LA"), "PNG"),
    saved(drawn(), "JPG", icc_profile=SWAPPED),
    saved(drawn(mode="RGBA"), "WEBP", icc_profile=SWAPPED),
    saved(drawn(), "JPG"),
    saved(drawn(), "JPG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    saved(drawn(), "WEBP"),
    saved(drawn(mode="RGBA"), "WEBP", lossless=True, exif=b"MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    saved(drawn(), "PNG", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
    saved(drawn(), "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_pictures_with_wrong_bytes_decode_or_are_refused(seed, data):
    changed = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(changed)))
    paste = data.draw(st.binary(max_size=8))
    only_refuses(bytes(changed))
    only_refuses(bytes(changed[:cut]) + paste + bytes(changed[cut:]))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pngs_with_wrong_chunks_and_right_sums_are_refused(data):
    # With right sums of their own, chunks get past the check that stops most damage.
    kinds = [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL"]
    kinds += [b"fcTL", b"fdAT", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tEXt", b"IEND"]
    chunks = data.draw(st.lists(st.tuples(st.sampled_from(kinds), st.binary(max_size=40))))
    middle = b"".join(chunk(*each) for each in chunks)
    whole = saved(drawn(), "PNG")
    only_refuses(whole[:33] + middle + whole[33:])
    only_refuses(whole[:-12] + middle + whole[-12:])


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.sampled_from(FORMATS))
def test_data_urls_are_decoded(data, file_format):
    assert decode_base64(data_url(data, file_format), max_bytes=200) == data
    assert decode_base64(base64.b64encode(data).decode(), max_bytes=200) == data
    assert data_url(data, file_format).startswith(f"data:{media_type(file_format)};base64,")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["", "data:", "data:image/png;base64,", "DATA:image/x,"]), st.text())
def test_any_text_is_decoded_or_refused(head, body):
    try:
        assert 0 < len(decode_base64(head + body, max_bytes=30)) <= 30
    except PictureRefusedError as error:
        assert error.status in {400, 413, 415}


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", 400),
        ("data:image/png;base64,", 400),
        ("data:image/png,abc", 400),
        ("data:image/png;base64", 400),
        ("data:" + "image/png;" * 50 + "base64,AAAA", 400),
        ("data:text/html;base64,AAAA", 415),
        ("data:;base64,AAAA", 415),
        ("AAA", 400),
        ("AA=A", 400),
        ("AA A", 400),
        ("AAA\n", 400),
        ("\n", 400),
        ("AA-_", 400),
        ("AAé=", 400),
        ("A" * 40, 200),
        ("data:image/png;base64,\n" + "AAAA\r\n" * 10, 200),
        ("A" * 44, 413),
        ("AAAA\n" * 11, 413),
    ],
)
def test_base64_is_strict_and_limited(text, status):
    if status == 200:
        assert len(decode_base64(text, max_bytes=30)) == 30
        return
    with pytest.raises(PictureRefusedError) as caught:
        decode_base64(text, max_bytes=30)
    assert caught.value.status == status


def test_length_is_checked_before_decoding(monkeypatch):
    monkeypatch.setattr(
        decoding.binascii, "a2b_base64", lambda *_, **__: pytest.fail("it was decoded")
    )
    with pytest.raises(PictureRefusedError, match="more than 30 bytes"):
        decode_base64("data:image/png;base64," + "A" * 44, max_bytes=30)


def test_one_byte_too_many_is_too_many():
    with pytest.raises(PictureRefusedError) as caught:
        decode_base64(base64.b64encode(bytes(29)).decode(), max_bytes=28)
    assert caught.value.status == 413


def test_other_media_types_of_images_are_not_believed():
    assert decode_base64("data:image/x-any;charset=utf-8;base64,AAAA", max_bytes=3) == bytes(3)
