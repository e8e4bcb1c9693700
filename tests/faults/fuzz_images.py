"""Mutated image files find nothing but pictures and refusals.

    python -m tests.faults.fuzz_images [--files 100000]

Bits, bytes, runs and pieces of real files of every kind and mode are changed, cut, doubled and exchanged between files.
Every result must be an RGB array of the size the header tells, or an ImageError; no other exception, no warning, and
resident memory within four times the pixel limit. Prints what came of them, and exits with 1 where a rule was broken.
"""

import argparse
import io
import json
import random
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from mmjax.tokenizers.image import ImageError, Limits, decode, read_size

LIMITS = Limits(max_bytes=2**20, max_pixels=4_000_000)


def files() -> list[bytes]:
    """Small real files of every kind and mode."""
    y, x = np.mgrid[0:40, 0:56]
    rgb = Image.fromarray(np.stack([x * 4, y * 6, (x * y) % 256], -1).astype(np.uint8))
    grey, turned = rgb.convert("L"), Image.Exif()
    turned[0x0112] = 6
    rgba, la = rgb.copy(), grey.copy()
    rgba.putalpha(grey)
    la.putalpha(grey)
    deep = Image.fromarray((x * 1000 + y).astype(np.uint16))
    film = {"save_all": True, "append_images": [rgb.rotate(90)], "duration": 9}
    wanted = [
        *(("JPEG", p, o) for p in (rgb, grey, rgb.convert("CMYK")) for o in ({}, {"progressive": True})),
        ("JPEG", rgb, {"exif": turned, "subsampling": 0, "restart_marker_rows": 1}),
        *(("PNG", p, {}) for p in (rgb, grey, rgba, la, deep, rgb.convert("1"), rgb.quantize())),
        ("PNG", rgb.quantize(), {"transparency": 3}),
        ("PNG", rgb, {"exif": turned, **film}),
        *(("WEBP", p, o) for p in (rgb, rgba) for o in ({}, {"lossless": True}, {"exif": turned}, film)),
        *(("GIF", rgb.quantize(), o) for o in ({}, {"transparency": 3}, {"interlace": 1})),
        ("GIF", rgb, film),
    ]
    out = []
    for kind, picture, options in wanted:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        out.append(file.getvalue())
    return out


def mutated(dice: random.Random, pool: list[bytes]) -> bytes:
    data = bytearray(dice.choice(pool))
    for _ in range(dice.choice((1, 1, 1, 2, 5, 30))):
        at, n = dice.randrange(len(data)), dice.choice((1, 1, 2, 4, 30, 400))
        at = dice.choice((at, min(at, 40), min(at, 400)))
        what = dice.randrange(7)
        if what == 0:
            data[at] ^= 1 << dice.randrange(8)
        elif what == 1:
            data[at] = dice.choice((0, 1, 127, 128, 254, 255, dice.randrange(256)))
        elif what == 2:
            data[at : at + n] = dice.randbytes(n)
        elif what == 3:
            data[at : at + n] = dice.choice((b"\0", b"\xff")) * n
        elif what == 4:
            del data[at : at + n]
        elif what == 5:
            data[at:at] = data[at : at + n]
        else:
            other = dice.choice(pool)
            start = dice.randrange(len(other))
            data[at : at + n] = other[start : start + n]
        data = data or bytearray(b"\0")
    return bytes(data)


def resident(name: str = "VmHWM") -> int:
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("error")
    dice, pool = random.Random(args.seed), files()
    for data in pool:
        decode(data, LIMITS)
    before, slowest, broken = resident(), 0.0, []
    counts = {"pictures": 0, "refused": 0}
    for number in range(args.files):
        data = mutated(dice, pool)
        start = time.perf_counter()
        try:
            pixels = decode(data, LIMITS)
        except ImageError:
            counts["refused"] += 1
        except BaseException as error:
            broken.append(f"file {number}: {type(error).__name__}: {error}")
        else:
            counts["pictures"] += 1
            if pixels.dtype != np.uint8 or pixels.shape != (*read_size(data, LIMITS), 3):
                broken.append(f"file {number}: {pixels.shape} of {pixels.dtype}")
        slowest = max(slowest, time.perf_counter() - start)
    taken = resident() - before
    allowed = 4 * 3 * LIMITS.max_pixels + 8 * 2**20
    if taken > allowed:
        broken.append(f"{taken / 2**20:.0f} MiB of memory, over {allowed / 2**20:.0f}")
    print(*broken[:20], sep="\n")
    told = {"files": args.files, **counts, "broken": len(broken), "slowest_seconds": round(slowest, 3)}
    print(json.dumps({**told, "peak_mib": round(taken / 2**20)}))
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
