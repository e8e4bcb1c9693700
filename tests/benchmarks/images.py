"""Bytes in, patches out: images per second of ours and of transformers' processors, on 200 photographs.

    pip install torchvision "transformers==5.23.0" scikit-image   # in an environment of their own, with mmjax
    python -m tests.benchmarks.images [--photos 200] [--passes 5]

The photographs are scikit-image's, resized to 0.3–12 megapixels and saved as JPEG of quality 95 without subsampling:
1.8 bits per pixel, where phones write 2 to 3. Every way of working runs in processes of its own, in its better
arrangement of two cores (one process with two threads, or two with one), chosen on the first 40 photographs; then
passes over all, turn by turn; medians of the passes, and of the passes' ratios. Peak memory is what the processes of a
way take beyond what they had after loading their libraries and a first picture. `decode` alone is the floor. Without
torchvision its figures are null. The last line is one JSON object.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import PIL
from PIL import Image

from mmjax.tokenizers import image as images
from mmjax.tokenizers.patches import Pixels
from mmjax.tokenizers.published import PUBLISHED
from mmjax.tokenizers.view import needed, render

PHOTOS = ["astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png"]
PHOTOS += ["motorcycle_right.png", "retina.jpg", "rocket.jpg"]
POLICIES = {"qwen2-vl": "qwen2_vl.Qwen2VL", "llava-next": "llava_next.LlavaNext", "clip-large-14-336": "clip.CLIP"}
SETTINGS = {
    "qwen2-vl": {},
    "llava-next": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    "clip-large-14-336": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
}
SIDES = (512, 1024, 2048, 4096, 8192)  # of the canvases on which whole pictures go to the device


def photographs(number: int) -> list[bytes]:
    """JPEG files of log-uniform sizes."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    originals = [Image.open(folder / name).convert("RGB") for name in PHOTOS]
    rng = np.random.default_rng(0)
    out = []
    for i in range(number):
        photo = originals[i % len(originals)]
        scale = np.sqrt(np.exp(rng.uniform(np.log(0.3e6), np.log(12e6))) / (photo.width * photo.height))
        file = io.BytesIO()
        size = round(photo.width * scale), round(photo.height * scale)
        photo.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95, subsampling=0)
        out.append(file.getvalue())
    return out


def worker_of(way: str, name: str):
    """bytes → how many patches it became."""
    if way == "decode":
        return lambda data: Image.open(io.BytesIO(data)).load() and 0
    if way in ("ours", "reduced"):
        policy = PUBLISHED[name].policy
        merge = getattr(policy, "merge", 1)

        def ours(data: bytes) -> int:
            found = images.find(data)
            views = policy.views(*found.size)
            picture = found.load(least=needed(views) if way == "reduced" else None)
            rendered = Pixels(render(picture, views), policy.patch)
            out = np.empty(rendered.shape, np.uint8)  # here, the share of a row's buffer
            rendered.write(out, merge)
            return len(out)

        return ours
    if way == "device":

        def raw(data: bytes) -> int:
            found = images.find(data)
            sides = [min(s for s in SIDES if s >= side) for side in found.size]
            return len(found.decode(np.empty((*sides, 3), np.uint8)))

        return raw
    import importlib

    import torch

    torch.set_num_threads(1)
    module, stem = POLICIES[name].split(".")
    file = f"image_processing_pil_{module}" if way == "pil" else f"image_processing_{module}"
    found = importlib.import_module(f"transformers.models.{module}.{file}")
    kind = "np" if way == "pil" else "pt"
    made = getattr(found, f"{stem}ImageProcessor" + ("Pil" if way == "pil" else ""))(**SETTINGS[name])

    def theirs(data: bytes) -> int:
        return len(made(images=[Image.open(io.BytesIO(data))], return_tensors=kind)["pixel_values"])

    return theirs


def apart(name: str, photos: list[bytes]) -> dict[str, float]:
    """How far reduced-scale decoding is from decoding all, over the photographs that it makes smaller."""
    policy, found = PUBLISHED[name].policy, []
    for data in photos:
        header = images.find(data)
        views = policy.views(*header.size)
        whole, small = header.load(), header.load(least=needed(views))
        if whole.size != small.size:
            pairs = zip(render(whole, views), render(small, views), strict=True)
            found += [(a.astype(np.int16) - b).reshape(-1) for a, b in pairs]
    levels = np.abs(np.concatenate(found))
    decibel = 10 * np.log10(255**2 / np.square(levels.astype(np.float32)).mean())
    return {"mean": float(levels.mean()), "99.9 %": float(np.percentile(levels, 99.9)), "psnr": float(decibel)}


def status(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024


def serve(way: str, name: str, photos: list[bytes], threads: int, pipe) -> None:
    """A process: told a range of photographs, works through it and answers with its peak of memory."""
    work = worker_of(way, name)
    work(photos[0])
    before = status("VmRSS")
    pool = ThreadPoolExecutor(threads)
    pipe.send(None)
    while (share := pipe.recv()) is not None:
        Path("/proc/self/clear_refs").write_text("5")
        for _ in pool.map(work, photos[share]):
            pass
        pipe.send(status("VmHWM") - before)


class Way:
    """One way of working on one policy, in an arrangement: (processes, threads of each)."""

    def __init__(self, way: str, name: str, photos: list[bytes], arrangement: tuple[int, int]):
        context = multiprocessing.get_context("fork")
        self.pipes, self.processes, self.peak = [], [], 0
        for _ in range(arrangement[0]):
            here, there = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(way, name, photos, arrangement[1], there)))
            self.processes[-1].start()
            self.pipes.append(here)
        for pipe in self.pipes:
            pipe.recv()

    def seconds(self, number: int) -> float:
        start = time.perf_counter()
        for i, pipe in enumerate(self.pipes):
            pipe.send(slice(i, number, len(self.pipes)))
        self.peak = max(self.peak, sum(pipe.recv() for pipe in self.pipes))
        return time.perf_counter() - start

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


def best(way: str, name: str, photos: list[bytes]) -> tuple[Way, tuple[int, int]]:
    """In its better arrangement."""
    made = {arrangement: Way(way, name, photos, arrangement) for arrangement in ((1, 2), (2, 1))}
    number = min(40, len(photos))
    seconds = {a: min(w.seconds(number) for _ in range(2)) for a, w in made.items()}
    chosen = min(seconds, key=seconds.get)
    for arrangement, made_way in made.items():
        if arrangement != chosen:
            made_way.end()
    return made[chosen], chosen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--passes", type=int, default=5)
    args = parser.parse_args()
    photos = photographs(args.photos)
    megapixels = sum(np.prod(images.read_size(p)) for p in photos) / 1e6
    ways = ["decode", "ours", "reduced", "device", "pil"]
    try:
        import torchvision  # noqa: F401

        ways.append("torchvision")
    except ImportError:
        print("no torchvision here: its figures are null")
    figures = {"photos": len(photos), "megapixels": round(megapixels), "pillow": PIL.__version__}
    aims = []
    for name in POLICIES:
        made = {way: best(way, name, photos) for way in ways}
        seconds = {way: [] for way in ways}
        for _ in range(args.passes):
            for way, (one, _) in made.items():
                seconds[way].append(one.seconds(len(photos)))
        median = {way: statistics.median(s) for way, s in seconds.items()}
        for way, (one, arrangement) in made.items():
            figures[f"{name} {way}"] = {
                "images_per_second": round(len(photos) / median[way], 1),
                "processes_and_threads": arrangement,
                "peak_mib": round(one.peak / 2**20),
            }
            print(f"{name:20} {way:12}", figures[f"{name} {way}"], flush=True)
            one.end()
        peaks = {way: one.peak for way, (one, _) in made.items()}
        aims += aims_of(name, seconds, peaks)
        figures[f"{name} reduced, grey levels apart"] = apart(name, photos[:45])
    print(json.dumps({**figures, "aims": aims}))


def aims_of(name: str, seconds: dict[str, list[float]], peaks: dict[str, int]) -> list[dict]:
    def ratio(a: str, b: str) -> float | None:
        if a not in seconds or b not in seconds:
            return None
        return round(statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True)), 3)

    def less(a: str, b: str) -> float | None:
        return round(peaks[a] / peaks[b], 3) if b in peaks else None

    out = [
        {"name": f"{name}: images/s over transformers' PIL", "measured": ratio("pil", "ours"), "at_least": 1.3},
        {"name": f"{name}: images/s over torchvision", "measured": ratio("torchvision", "ours"), "at_least": 1.0},
        {"name": f"{name}: time over decoding alone", "measured": ratio("ours", "decode"), "at_most": 2.6},
        {
            "name": f"{name}: host time with device resize / floor",
            "measured": ratio("device", "decode"),
            "at_most": 1.3,
        },
        {"name": f"{name}: peak memory over PIL's", "measured": less("ours", "pil"), "at_most": 1.0},
        {"name": f"{name}: over torchvision's", "measured": less("ours", "torchvision"), "at_most": 1.0},
    ]
    if name.startswith("clip"):
        reduced = ratio("pil", "reduced")
        out.append({"name": f"{name}: reduced-scale decoding over PIL", "measured": reduced, "at_least": 2.0})
    return out


if __name__ == "__main__":
    main()
