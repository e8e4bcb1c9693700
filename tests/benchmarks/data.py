"""Documents per second from each kind of file to batches, and how long the quick start waits for its data.

    python -m tests.benchmarks.data [--documents 2000] [--steps 400]

The same documents in every format: a JPEG of about 160 × 120 pixels with as much detail as a photograph, and a question
and an answer of 20 to 60 words together (in OBELICS and MMC4: two texts). Files are in the page cache. `index`: reading
all records and the headers of all pictures, with nothing kept from before; `plan`: all lengths, and packing; both once.
`batches`: from the plan to arrays, two threads; medians of 5, the formats taking turns. Parquet has row groups of 100.

Then so many steps of the quick start; the share of the loop's time in which it waits for a batch has the first batch in
it, which nothing can hide. Two cores. The last line is one JSON object.
"""

import argparse
import dataclasses
import functools
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from configs import quickstart
from mmjax.data import convert, drawings, index
from mmjax.data.formats import Dataset, open_dataset
from mmjax.data.source import Source, read
from mmjax.sequence.layout import layout
from mmjax.tokenizers import image as images
from mmjax.tokenizers import text
from mmjax.tokenizers.resolution import Native
from mmjax.train import loop

REPEATS, THREADS, GROUP = 5, 2, 100
TOKENS, ROWS, SHAPES = 1024, 8, 2
POLICY = Native(patch=16)
FORMATS = {
    "LLaVA JSON": "llava.json",
    "messages JSON Lines": "messages.jsonl",
    "Parquet": "messages.parquet",
    "OBELICS": "obelics.jsonl",
    "MMC4": "mmc4.jsonl",
    "WebDataset": "messages.tar",
    "ArrayRecord": "all.array_record",
}
PAGES = ("OBELICS", "MMC4")  # with no turns


@dataclasses.dataclass(frozen=True)
class Made:
    """A document to be written."""

    name: str
    picture: bytes
    question: str
    answer: str


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG whose detail falls with its frequency, as that of photographs does."""
    width, height = int(rng.integers(140, 181)), int(rng.integers(105, 136))
    pixels = np.full((height, width, 3), 128.0, np.float32)
    for side in (64, 32, 16, 8, 4, 2, 1):
        noise = rng.normal(size=(-(-height // side), -(-width // side), 3)) * 4 * np.sqrt(side) + 128
        pixels += images.resize(np.clip(noise, 0, 255).astype(np.uint8), height, width) - np.float32(128)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def make(n: int) -> list[Made]:
    rng = np.random.default_rng(0)
    words = sorted({word for sentence in drawings.corpus() for word in sentence.split()})
    out = []
    for i in range(n):
        said = rng.choice(words, rng.integers(20, 61)).tolist()
        part = int(rng.integers(5, 16))
        out.append(Made(f"{i:06d}", photograph(rng), " ".join(said[:part]), " ".join(said[part:])))
    return out


def write(made: list[Made], folder: Path) -> None:
    """All formats, in one folder with the pictures."""
    folder.mkdir(exist_ok=True)
    for m in made:
        (folder / f"{m.name}.jpg").write_bytes(m.picture)

    def messages(m: Made) -> list[dict]:
        said = {"user": f"<image>{m.question}", "assistant": m.answer}
        return [{"role": role, "content": content} for role, content in said.items()]

    def lines(name: str, record: Callable[[Made], dict]) -> None:
        (folder / FORMATS[name]).write_text("".join(json.dumps(record(m)) + "\n" for m in made))

    def llava(m: Made) -> dict:
        said = [{"from": "human", "value": f"<image>{m.question}"}, {"from": "gpt", "value": m.answer}]
        return {"id": m.name, "image": f"{m.name}.jpg", "conversations": said}

    (folder / FORMATS["LLaVA JSON"]).write_text(json.dumps([llava(m) for m in made], indent=1))
    lines("messages JSON Lines", lambda m: {"id": m.name, "images": [f"{m.name}.jpg"], "messages": messages(m)})
    lines("OBELICS", lambda m: {"images": [None, f"{m.name}.jpg", None], "texts": [m.question, None, m.answer]})
    lines(
        "MMC4",
        lambda m: {
            "text_list": [m.question, m.answer],
            "image_info": [{"image_name": f"{m.name}.jpg", "matched_text_index": 1}],
        },
    )
    rows = [{"images": [{"bytes": m.picture, "path": None}], "messages": messages(m)} for m in made]
    parquet.write_table(pa.Table.from_pylist(rows), folder / FORMATS["Parquet"], row_group_size=GROUP)
    with tarfile.open(folder / FORMATS["WebDataset"], "w") as tar:
        for m in made:
            told = json.dumps({"messages": messages(m)}).encode()
            for suffix, data in (("jpg", m.picture), ("json", told)):
                entry = tarfile.TarInfo(f"{m.name}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    convert.write(open_dataset(folder / FORMATS["LLaVA JSON"], cache=False), folder / FORMATS["ArrayRecord"])


def documents_per_second(folder: Path, n: int) -> dict[str, dict[str, float]]:
    """Of each format, of each part of the way."""
    tokenizer = text.load(drawings.tokenizer_model())
    lay = functools.partial(layout, tokenizer=tokenizer, resolution=POLICY)
    seconds: dict[str, dict[str, float]] = {}
    sources: dict[str, Source] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for name, file in FORMATS.items():
        start = time.perf_counter()
        found: Dataset = open_dataset(folder / file, cache=False)
        indexed = time.perf_counter()
        plan = index.training(found, lay, steps=None, k=SHAPES, tokens=TOKENS, rows=ROWS, seed=0)
        seconds[name] = {"index": indexed - start, "plan": time.perf_counter() - indexed}
        sources[name] = Source(found, lay, plan, tokenizer.vocab, POLICY.patch)
        sizes[name] = tuple(map(sum, zip(*plan.used, strict=True)))
        assert len(found) == n, f"{name} has {len(found)} documents"
    # All that are conversations are the same documents, to the last token.
    assert len({size for name, size in sizes.items() if name not in PAGES}) == 1, sizes
    taken: dict[str, list[float]] = {name: [] for name in FORMATS}
    next(read(sources["ArrayRecord"], 0, threads=THREADS))  # imports, and opens the first threads
    for _ in range(REPEATS):
        for name, source in sources.items():
            start = time.perf_counter()
            batches = sum(1 for _ in read(source, 0, threads=THREADS))
            taken[name].append(time.perf_counter() - start)
            assert batches == len(source)
    rates = {}
    for name in FORMATS:
        parts = seconds[name] | {"batches": statistics.median(taken[name])}
        rates[name] = {part: round(n / t, 1) for part, t in parts.items()}
        print(f"{name:<22}", "".join(f"{part:>9}{rate:>8.0f}/s" for part, rate in rates[name].items()), flush=True)
    return rates


def waiting(folder: Path, steps: int) -> float:
    """The share of its time that the quick start's loop waits for data."""
    loop.run(dataclasses.replace(quickstart.config(), out=folder / "quickstart", steps=steps, save_every=10**9))
    return json.loads((folder / "quickstart" / loop.RESULT).read_text())["waiting"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = make(args.documents)
        write(made, folder / "data")
        rates = documents_per_second(folder / "data", args.documents)
        share = waiting(folder, args.steps)
    figures = {
        "documents": args.documents,
        "bytes_per_picture": round(statistics.mean(len(m.picture) for m in made)),
        "documents_per_second": rates,
        "steps": args.steps,
        "waiting": share,
    }
    aims = [{"name": "waiting share of the quick start", "measured": round(share, 4), "at_most": 0.02}]
    print(json.dumps({**figures, "aims": aims}))


if __name__ == "__main__":
    main()
