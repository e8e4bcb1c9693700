import io
import os
import random
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmjax.core.errors import InputError
from mmjax.tokenizers import image_header
from mmjax.tokenizers.image import ImageError, Limits, decode, read_size, resize
from mmjax.tokenizers.patches import patchify, unpatchify

ASK = "fetch|convert|leave it out|shrink|raise|crop|give|check|save"  # what to do is always said


def photo(height=20, width=30) -> np.ndarray:
    """Smooth, different in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 250 // width, y * 250 // height, 255 - (x + y) * 250 // (height + width)], -1).astype(np.uint8)


def save(picture, kind, **options) -> bytes:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(height, width, depth, color, rows: bytes, *, before=b"", after=b"") -> bytes:
    """A PNG by hand; `rows` are packed samples without filter bytes."""
    size = len(rows) // height if height else 0
    lines = b"".join(b"\0" + rows[i * size : (i + 1) * size] for i in range(height))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(lines)) + after + chunk(b"IEND", b"")


def exif(orientation, order="<", kind="H") -> bytes:
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    number = {"B": 1, "H": 3, "I": 4}[kind]
    entries = struct.pack(order + "HHII", 0x0100, 4, 1, 7)  # another tag first
    entries += struct.pack(order + "HHI" + kind, 0x0112, number, 1, orientation).ljust(12, b"\0")
    return mark + struct.pack(order + "IH", 8, 2) + entries + bytes(4)


def jpeg(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """With these segments (marker, payload) put in after the first two bytes."""
    extra = b"".join(bytes([0xFF, code]) + struct.pack(">H", len(body) + 2) + body for code, body in segments)
    return data[:2] + extra + data[2:]


ARRAY = photo()
JPEG = save(ARRAY, "JPEG", quality=95)
PNG = save(ARRAY, "PNG")
WEBP = save(ARRAY, "WEBP", lossless=True)
GIF = save(Image.fromarray(ARRAY).quantize(), "GIF")
FILES = {"JPEG": JPEG, "PNG": PNG, "WEBP": WEBP, "GIF": GIF}


def refusal(source, *limits, **options) -> str:
    with pytest.raises(ImageError) as caught:
        decode(source, *limits, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert any(word in message for word in ASK.split("|")), message
    return message


# What is read


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("via", ["bytes", "path", "str", "wrong extension"])
def test_every_format_from_every_source(kind, via, tmp_path):
    path = tmp_path / ("x.tiff" if via == "wrong extension" else "x")
    path.write_bytes(FILES[kind])
    source = {"bytes": FILES[kind], "str": str(path)}.get(via, path)
    got = decode(source)
    assert (got.dtype, got.shape, got.flags.writeable) == (np.uint8, (20, 30, 3), True)
    tolerance = {"PNG": 0, "WEBP": 0, "JPEG": 12, "GIF": 24}[kind]
    assert np.abs(got.astype(int) - ARRAY).max() <= tolerance
    assert read_size(source) == (20, 30)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_arrays(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    got = decode(array, background=(10, 20, 30))
    assert read_size(array) == (5, 7)
    if shape[2:] == (4,):
        alpha = array[..., 3:] / 255
        np.testing.assert_allclose(got, array[..., :3] * alpha + np.array([10, 20, 30]) * (1 - alpha), atol=1)
    else:
        np.testing.assert_array_equal(got, array if array.ndim == 3 else np.stack([array] * 3, -1))
    assert not np.shares_memory(got, array)
    np.testing.assert_array_equal(decode(array[::-1, ::2]), decode(np.ascontiguousarray(array[::-1, ::2])))


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)])
def test_arrays_that_are_no_images(array):
    assert "is not an image" in refusal(array)
    with pytest.raises(ImageError):
        read_size(array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation(kind, orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = save(ARRAY, kind, exif=tag, **options)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode(data), want)
    assert read_size(data) == want.shape[:2] == ((20, 30) if orientation < 5 else (30, 20))


def test_orientation_by_hand():
    # 6: the camera was turned, the stored picture's left edge is the top of what was seen.
    data = jpeg(JPEG, (0xE1, b"Exif\0\0" + exif(6)))
    np.testing.assert_array_equal(decode(data), np.rot90(decode(JPEG), -1))
    # A tag after the pixels, which a header reader must look for too.
    assert read_size(png(1, 2, 8, 0, b"ab", after=chunk(b"eXIf", exif(8)))) == (2, 1)


@pytest.mark.parametrize(
    ("body", "turned"),
    [
        (exif(6, ">"), True),
        (exif(6, "<", "I"), True),
        (exif(6, ">", "B"), True),
        (exif(0), False),
        (exif(9), False),
        (exif(6)[:20], False),
        (b"II*\0\xff\xff\xff\xff", False),
        (b"MM\0*\0\0\0\x08\xff\xff", False),
        (b"nonsense", False),
        (b"", False),
    ],
)
def test_odd_exif_never_stops_a_picture(body, turned):
    for data in (
        jpeg(JPEG, (0xE1, b"Exif\0\0" + body)),
        png(20, 30, 8, 2, ARRAY.tobytes(), before=chunk(b"eXIf", body)),
    ):
        assert decode(data).shape[:2] == read_size(data) == ((30, 20) if turned else (20, 30))


def test_parts_on_which_pillow_warns_do_not_matter():
    # Directory entries that point outside (Pillow: "Corrupt EXIF data"), a broken animation, a file of many pictures.
    wild = struct.pack("<4sIH", b"II*\0", 8, 2) + struct.pack("<HHII", 0x011A, 5, 99, 0xFFFFFF) * 2 + bytes(4)
    index = b"MPF\0" + b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 0xB001, 4, 1, 2) + bytes(4)
    data = jpeg(JPEG, (0xE1, b"Exif\0\0" + wild), (0xE2, index), (0xED, b"Photoshop 3.0\0" + b"8BIM" * 9), (0xFE, b"x"))
    np.testing.assert_array_equal(decode(data), decode(JPEG))
    data = png(20, 30, 8, 2, ARRAY.tobytes(), before=chunk(b"acTL", bytes(8)) + chunk(b"tEXt", b"\xff" * 99))
    np.testing.assert_array_equal(decode(data), ARRAY)


def test_16_bit_grey_is_scaled():
    levels = np.arange(0, 65536, 257 // 3, dtype=np.uint16)[:765].reshape(15, 51)
    got = decode(png(15, 51, 16, 0, levels.astype(">u2").tobytes()))
    np.testing.assert_array_equal(got[..., 0], np.rint(levels / 257))
    np.testing.assert_array_equal(got[..., 0], got[..., 2])
    assert decode(png(1, 2, 16, 0, b"\xff\xff\0\0")).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize(("color", "depth"), [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16)])
def test_one_transparent_sample(color, depth):
    """Eight pixels, the first of the declared value, at every depth."""
    most, channels = 2**depth - 1, 3 if color else 1
    samples = np.tile([most - 1 if depth > 1 else 1, 0], (4, 1)).reshape(8, 1).repeat(channels, 1)
    if depth < 8:
        rows = np.packbits(np.unpackbits(samples.astype(np.uint8), axis=1)[:, -depth:].reshape(-1)).tobytes()
    else:
        rows = samples.astype(f">u{depth // 8}").tobytes()
    clear = chunk(b"tRNS", struct.pack(f">{channels}H", *samples[0]))
    got = decode(png(1, 8, depth, color, rows, before=clear), background=(1, 2, 3))
    assert got[0].tolist() == [[1, 2, 3], [0, 0, 0]] * 4
    opaque = decode(png(1, 8, depth, color, rows))
    assert opaque[0, 0, 0] == (round(samples[0, 0] * 255 / most) if color == 0 else samples[0, 0] >> max(0, depth - 8))


def test_transparency_goes_over_the_background():
    color = (200, 100, 0)
    rgba = Image.new("RGBA", (4, 3), (*color, 128))
    for data in (save(rgba, "PNG"), save(rgba, "WEBP", lossless=True, exact=True)):
        assert np.abs(decode(data, background=(0, 0, 255))[0, 0].astype(int) - [100, 50, 127]).max() <= 1
        assert np.abs(decode(data)[0, 0].astype(int) - [227, 177, 127]).max() <= 1
    assert decode(save(Image.new("LA", (4, 3), (9, 0)), "PNG"), background=(1, 2, 3))[0, 0].tolist() == [1, 2, 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    # Alphas as bytes, on whose plain conversion Pillow warns, and as one index.
    data = save(palette, "PNG", transparency=b"\x00\xff")
    assert decode(data, background=(1, 2, 3))[0].tolist() == [[1, 2, 3], [40, 50, 60]]
    for kind in ("PNG", "GIF"):
        data = save(palette, kind, transparency=1)
        assert decode(data, background=(1, 2, 3))[0].tolist() == [[10, 20, 30], [1, 2, 3]]
    assert decode(save(palette, "PNG"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_other_modes():
    bits = Image.fromarray(np.eye(9, dtype=bool))
    np.testing.assert_array_equal(decode(save(bits, "PNG"))[..., 1], np.eye(9) * 255)
    grey = save(Image.fromarray(ARRAY[..., 0]), "JPEG", quality=95)
    assert np.abs(decode(grey)[..., 2].astype(int) - ARRAY[..., 0]).max() <= 8
    cmyk = save(Image.fromarray(ARRAY).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode(cmyk).astype(int) - ARRAY).max() <= 16
    deep = np.array([[[0x12FF, 0x3400, 0xFFFF]]], ">u2")
    assert decode(png(1, 1, 16, 2, deep.tobytes()))[0, 0].tolist() == [0x12, 0x34, 0xFF]


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 6), color) for color in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = save(frames[0], kind, save_all=True, append_images=frames[1:], duration=9, **options)
        assert decode(data)[3, 4].tolist() == [255, 0, 0]
        assert read_size(data) == (6, 8)


def test_a_gif_whose_frame_leaves_its_screen():
    data = GIF[:6] + struct.pack("<HH", 0, 0) + GIF[10:]
    assert read_size(data) == (20, 30)
    np.testing.assert_array_equal(decode(data), decode(GIF))


def test_progressive_and_padded_jpeg():
    data = save(ARRAY, "JPEG", quality=95, progressive=True)
    np.testing.assert_array_equal(decode(data), decode(JPEG))
    np.testing.assert_array_equal(decode(JPEG[:2] + b"\xff" * 9 + JPEG[2:]), decode(JPEG))
    np.testing.assert_array_equal(decode(JPEG[:20] + b"\0\0junk" + JPEG[20:]), decode(JPEG))
    np.testing.assert_array_equal(decode(JPEG + b"a film" * 99), decode(JPEG))


# What is refused


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_short_is_refused_at_every_length(kind):
    data = FILES[kind]
    whole, reasons = decode(data), set()
    for length in range(len(data)):
        try:
            got = decode(data[:length])
        except ImageError as error:
            reasons.add(str(error).split(" bytes ", 1)[1][:20])
        else:  # only what ends the file, not the picture, is missing
            assert length >= len(data) - 2
            np.testing.assert_array_equal(got, whole)
    assert len(reasons) >= 2
    if kind in ("PNG", "WEBP"):  # which tell their length
        with pytest.raises(ImageError, match="is cut short"):
            read_size(data[:-3])


@pytest.mark.parametrize("kind", FILES)
def test_damage_is_refused_or_read_but_never_another_error(kind):
    # Warnings are errors here, so this is about warnings too.
    dice, outcomes = random.Random(0), {"read": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(FILES[kind])
        for _ in range(dice.choice((1, 1, 3, 20))):
            data[dice.randrange(min(len(data), dice.choice((40, 800, 10_000))))] = dice.choice(
                (0, 1, 255, dice.randrange(256))
            )
        try:
            got = decode(bytes(data), Limits(max_pixels=10**6))
        except ImageError:
            outcomes["refused"] += 1
        else:
            assert read_size(bytes(data)) == got.shape[:2]
            outcomes["read"] += 1
    assert min(outcomes.values()) > 3


def test_what_is_not_an_image(tmp_path):
    assert "image of 0 bytes is empty" in refusal(b"")
    assert "is not a JPEG, PNG, WebP or GIF file (it begins with b'<!DOCTYPE ht')" in refusal(b"<!DOCTYPE html><html>")
    for kind in ("BMP", "TIFF", "PPM", "ICO"):
        assert "is not a JPEG, PNG, WebP or GIF file" in refusal(save(ARRAY, kind))
    path = tmp_path / "page.jpg"
    path.write_text("<html>not found</html>")
    assert "page.jpg' is not a JPEG" in refusal(path)
    assert "absent.png' cannot be read (No such file or directory)" in refusal(tmp_path / "absent.png")
    assert "' is not a file; give the path" in refusal(tmp_path)
    assert "nul" in refusal("a\0b.png")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe' is not a file" in refusal(tmp_path / "pipe")
    with pytest.raises(ImageError, match="absent"):
        read_size(tmp_path / "absent.png")


def test_sides_of_nothing():
    assert "is 0x3 pixels, so there is nothing to see" in refusal(png(0, 3, 8, 0, b""))
    assert "is 3x0 pixels" in refusal(png(3, 0, 8, 0, b""))
    at = JPEG.index(b"\xff\xc0") + 5
    assert "is 0x30 pixels" in refusal(JPEG[:at] + b"\0\0" + JPEG[at + 2 :])
    assert "is 0x5 pixels" in refusal(np.zeros((0, 5, 3), np.uint8))


def huge(kind) -> bytes:
    """A small file that declares at least 88 megapixels."""
    if kind == "PNG":
        return png(8000, 11000, 8, 0, bytes(88_000_000))
    if kind == "GIF":
        return GIF[:6] + struct.pack("<HH", 60_000, 60_000) + GIF[10:]
    if kind == "JPEG":
        at = JPEG.index(b"\xff\xc0") + 5
        return JPEG[:at] + struct.pack(">HH", 65_000, 65_000) + JPEG[at + 4 :]
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\x00" * 2 + b"VP8L" + bytes(20)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@pytest.mark.parametrize("kind", FILES)
def test_a_bomb_is_refused_before_a_decoder_sees_it(kind, monkeypatch):
    data = huge(kind)
    assert len(data) < 100_000
    monkeypatch.setattr("mmjax.tokenizers.image.READERS", {})
    assert "over the limit of 50,000,000; shrink it or raise Limits.max_pixels" in refusal(data)
    with pytest.raises(ImageError, match="over the limit"):
        read_size(data)


def test_no_warning_of_a_gif_whose_frame_leaves_its_screen_far(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # of ours 600, which Pillow would warn of as it opens
    assert decode(GIF[:6] + struct.pack("<HH", 1, 1) + GIF[10:]).shape == (20, 30, 3)
    assert decode(PNG).shape == (20, 30, 3)


def test_a_segment_shorter_than_its_own_length_is_refused():
    assert "is damaged" in refusal(JPEG[:20] + b"\xff\xe1\0\1" + JPEG[20:])


def test_limits_and_no_warning_of_pillow_above_its_own():
    assert "is 20x30 pixels, over the limit of 599" in refusal(PNG, Limits(max_pixels=599))
    assert decode(PNG, Limits(max_pixels=600)).shape == (20, 30, 3)
    assert f"is {len(PNG):,} bytes long, over the limit of {len(PNG) - 1:,}" in refusal(
        PNG, Limits(max_bytes=len(PNG) - 1)
    )
    assert decode(PNG, Limits(max_bytes=len(PNG))).shape == (20, 30, 3)
    line = png(1, 201, 8, 0, bytes(201))
    assert "one side over 200 times the other" in refusal(line)
    assert decode(line, Limits(max_aspect=201.0)).shape == (1, 201, 3)
    assert "one side over" in refusal(np.zeros((201, 1, 3), np.uint8))
    assert "over the limit" in refusal(np.zeros((20, 30, 3), np.uint8), Limits(max_pixels=599))
    # 90 megapixels, of which Image.open would warn.
    assert read_size(png(9000, 10000, 8, 0, bytes(90_000_000)), Limits(max_pixels=10**8)) == (9000, 10000)
    for wrong in ({"max_pixels": 0}, {"max_bytes": 0}, {"max_aspect": 0.5}, {"max_aspect": float("nan")}):
        with pytest.raises(InputError, match="admits no picture"):
            Limits(**wrong)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_text_bombs_in_png(kind, place):
    packed = zlib.compress(bytes(64 * 2**20), 9)
    body = b"Comment\0" + {"zTXt": b"\0", "iCCP": b"\0", "iTXt": b"\1\0en\0kommentar\0"}[kind] + packed
    data = png(1, 1, 8, 0, b"a", **{place: chunk(kind.encode(), body)})
    assert "holds text of more than 8,388,608 bytes in compressed form" in refusal(data)
    many = chunk(kind.encode(), body.replace(packed, zlib.compress(bytes(2**20)))) * 9
    assert "holds text" in refusal(png(1, 1, 8, 0, b"a", **{place: many}))
    small = chunk(kind.encode(), body.replace(packed, zlib.compress(b"hello")))
    assert decode(png(1, 1, 8, 0, b"a", **{place: small})).tolist() == [[[97] * 3]]


def test_a_damaged_png_is_told_by_its_checksum():
    at = PNG.index(b"IDAT") + 30
    assert "wrong checksum of a IDAT chunk" in refusal(PNG[:at] + bytes([PNG[at] ^ 1]) + PNG[at + 1 :])


def test_a_jpeg_of_many_scans_is_refused():
    data = save(np.zeros((16, 16), np.uint8), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at : data.rindex(b"\xff\xd9")]
    assert "more than 100 scans" in refusal(data[:at] + scan * 200 + data[at:])
    # The same bytes after the picture are not scans.
    assert decode(data + b"\0\0" + scan * 200).shape == (16, 16, 3)


def test_a_file_of_countless_parts_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(image_header, "MAX_PARTS", 1000)
    start = time.perf_counter()
    comments = b"\x21\xfe" + b"\x01a" * 2000 + b"\0"
    at = GIF.index(b"\x21\xf9") if b"\x21\xf9" in GIF else GIF.index(b"\x2c")
    assert "more than 1,000 parts" in refusal(GIF[:at] + comments + GIF[at:])
    assert "more than 1,000 parts" in refusal(jpeg(JPEG, *[(0xFE, b"")] * 2000))
    assert "more than 1,000 parts" in refusal(png(1, 1, 8, 0, b"a", before=chunk(b"tEXt", b"") * 2000))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("background", [(0, 0, 256), (-1, 0, 0)])
def test_a_background_that_is_no_color(background):
    with pytest.raises(InputError, match="is not a colour"):
        decode(PNG, background=background)


def test_sizes_come_from_the_header_alone(tmp_path, monkeypatch):
    """Of a large file only kilobytes are read, and nothing is decoded."""
    path = tmp_path / "x.png"
    noise = np.random.default_rng(0).integers(0, 256, (600, 700, 3), np.uint8)
    path.write_bytes(save(noise, "PNG"))
    monkeypatch.setattr("mmjax.tokenizers.image.READERS", {})
    taken = []
    real = image_header._take
    monkeypatch.setattr(image_header, "_take", lambda file, length: taken.append(length) or real(file, length))
    assert read_size(path) == (600, 700)
    assert sum(taken) < 5000 < path.stat().st_size


def test_it_needs_no_jax():
    code = "import sys; from mmjax.tokenizers import image, resolution, text; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# Sizes and patches


def test_resize_is_pillow_bicubic():
    want = np.asarray(Image.fromarray(ARRAY).resize((17, 9), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize(ARRAY, 9, 17), want)
    np.testing.assert_array_equal(resize(ARRAY, 20, 30), ARRAY)
    flat = np.full((8, 8, 3), 77, np.uint8)
    assert (resize(flat, 50, 3) == 77).all()
    with pytest.raises(InputError, match="cannot resize an image to 0x5"):
        resize(ARRAY, 0, 5)


def test_patches_are_in_raster_order():
    patch, rows, columns = 5, 4, 6
    patches = patchify(ARRAY, patch)
    assert patches.shape == (rows * columns, patch * patch * 3)
    for row in range(rows):
        for column in range(columns):
            got = patches[row * columns + column].reshape(patch, patch, 3)
            want = ARRAY[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            np.testing.assert_array_equal(got, want)
    assert patchify(np.arange(12, dtype=np.uint8).reshape(2, 2, 3), 2).tolist() == [list(range(12))]


def test_unpatchify_is_the_inverse():
    rng = np.random.default_rng(0)
    for rows, columns, patch in ((1, 1, 1), (3, 2, 4), (2, 5, 7)):
        image = rng.integers(0, 256, (rows * patch, columns * patch, 3), np.uint8)
        np.testing.assert_array_equal(unpatchify(patchify(image, patch), rows, columns, patch), image)


def test_patches_that_do_not_fit_are_refused():
    for patch in (3, 0, -1, 40):
        with pytest.raises(InputError, match=f"20x30 is not a grid of {patch}-pixel patches"):
            patchify(ARRAY, patch)
    patches = patchify(ARRAY, 5)
    for rows, columns, patch in ((4, 5, 5), (4, 6, 4), (-4, -6, 5), (0, 0, 5)):
        with pytest.raises(InputError, match="is not"):
            unpatchify(patches, rows, columns, patch)
