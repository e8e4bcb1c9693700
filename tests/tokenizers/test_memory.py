"""What decoding takes of memory at most, in a process of its own, against what is said of it beforehand."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmjax.tokenizers.image import ImageError, Limits, decode, find

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
HEIGHT, WIDTH = 1200, 1700
MEBI = 2**20
CODE = """
import sys
from pathlib import Path
from mmjax.tokenizers import image

def status(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

data = Path(sys.argv[1]).read_bytes()
image.decode(Path(sys.argv[2]).read_bytes())  # what every process pays once
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
image.decode(data) if sys.argv[3] == "decode" else image.find(data).load().resize((100, 70))
print(status("VmHWM") - before)
"""


def picture():
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)
    pixels[::5, ::3] = np.random.default_rng(0).integers(0, 256, pixels[::5, ::3].shape)
    return Image.fromarray(pixels)


def made(name) -> bytes:
    rgb, turned = picture(), Image.Exif()
    turned[0x0112] = 6
    rgba = rgb.copy()
    rgba.putalpha(rgb.getchannel(0))
    kind, mode, options = {
        "jpeg": ("JPEG", rgb, {"exif": turned}),
        "jpeg progressive": ("JPEG", rgb, {"progressive": True, "subsampling": 0, "quality": 95, "exif": turned}),
        "jpeg cmyk progressive": ("JPEG", rgb.convert("CMYK"), {"progressive": True, "subsampling": 0}),
        "jpeg grey": ("JPEG", rgb.convert("L"), {}),
        "png": ("PNG", rgb, {"compress_level": 1, "exif": turned}),
        "png alpha": ("PNG", rgba, {"compress_level": 1, "exif": turned}),
        "png palette": ("PNG", rgb.quantize(), {"compress_level": 1, "transparency": 3}),
        "png 16 bit": ("PNG", Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)), {}),
        "webp": ("WEBP", rgb, {"method": 0}),
        "webp alpha": ("WEBP", rgba, {"method": 0, "exif": turned}),
        "gif": ("GIF", rgb.quantize(), {"transparency": 3}),
    }[name]
    file = io.BytesIO()
    mode.save(file, kind, **options)
    return file.getvalue()


KINDS = [
    *("jpeg", "jpeg progressive", "jpeg cmyk progressive", "jpeg grey", "png", "png alpha", "png palette"),
    *("png 16 bit", "webp", "webp alpha", "gif"),
]


@pytest.mark.parametrize("name", KINDS)
def test_decoding_takes_no_more_than_it_says(name, tmp_path):
    data = made(name)
    (tmp_path / "x").write_bytes(data)
    Image.new("RGB", (9, 9)).save(tmp_path / "small", "PNG")
    for what in ("decode", "load"):
        command = [sys.executable, "-c", CODE, str(tmp_path / "x"), str(tmp_path / "small"), what]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        said = find(data).memory
        assert peak <= said + 2 * MEBI  # the interpreter's own, and one strip
        assert said <= 1.6 * peak + 4 * MEBI, "says far too much"


def test_a_kind_that_takes_more_than_four_times_the_limit_is_refused():
    """The same picture as WebP and as JPEG, of 2.04 megapixels, with a limit of 2.1."""
    limits = Limits(max_pixels=2_100_000)
    assert decode(made("jpeg"), limits).shape == (WIDTH, HEIGHT, 3)
    with pytest.raises(ImageError, match=r"of a kind of WEBP that takes 3\d MiB to decode, over 4 times"):
        find(made("webp"), limits)


def test_scans_of_one_component_each_are_counted_as_progressive_ones():
    """A baseline JPEG whose first scan holds one of three components keeps all coefficients, as libjpeg does."""
    file = io.BytesIO()
    picture().resize((64, 64)).save(file, "JPEG", subsampling=0)
    data = file.getvalue()
    assert find(data).memory == 8 * 64 * 64 + 2 * len(data)
    at = data.index(b"\xff\xda")
    one = data[:at] + struct.pack(">BBHBBBBBB", 0xFF, 0xDA, 8, 1, 1, 0, 0, 63, 0) + data[at + 14 :]
    assert find(one).memory == 10 * 64 * 64 + 2 * len(one)
