"""2,000 documents whose pictures all have another size, trained with a handful of programs.

    python -m tests.benchmarks.stream

Reports how many programs were compiled (as many as there are buckets, none after the first of each), how fast the
loader and the step are, each by itself and together, and how many bytes go to the device per step. Two cores, both
for the loader and the step. The last line is one JSON object.
"""

import functools
import json
import os
import statistics
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from mmjax.connectors import mlp as connector
from mmjax.core import spec as specs
from mmjax.data import index
from mmjax.data.source import Source, read
from mmjax.encoders import vit
from mmjax.models import decoder, vlm
from mmjax.nn import patch_embed, rope, transformer
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.layout import layout
from mmjax.tokenizers.resolution import Native
from mmjax.tokenizers.vocab import Vocab
from mmjax.train import state
from mmjax.train.config import Optimizer
from mmjax.train.step import train_step
from mmjax.train.watch import Compiles

DOCUMENTS, SHAPES, TOKENS, ROWS, PATCH = 2000, 4, 512, 4, 14
VOCAB = Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=300)


class Bytes:
    vocab = VOCAB

    def encode(self, text: str) -> list[int]:
        return [9 + b for b in text.encode()]


def documents() -> list[Document]:
    """No two pictures have the same size; pixels are drawn when they are read."""
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in np.stack(np.unravel_index(rng.permutation(200 * 200), (200, 200)), 1) + 56]

    def pixels(h: int, w: int) -> np.ndarray:
        return np.random.default_rng(h * 1000 + w).integers(0, 256, (h, w, 3), np.uint8)

    out = []
    for n in range(DOCUMENTS):
        h, w = sizes[n]
        words = "x" * int(rng.integers(5, 120))
        picture = Image(h, w, functools.partial(pixels, h, w))
        out.append(Document(f"d{n}", (picture, Text(words), Text("y" * int(rng.integers(1, 40)), "assistant", True))))
    return out


def model() -> vlm.Config:
    blocks = functools.partial(transformer.Config, width=64, layers=2, heads=4, kv_heads=4, head=16, hidden=128)
    return vlm.Config(
        vit.Config(patch_embed.Config(PATCH, 64), blocks(rope=rope.Config(16, (4, 4)))),
        connector.Config(64, 64),
        decoder.Config(VOCAB.size, blocks(rope=rope.Config(16, (2, 3, 3)))),
        placeholder=VOCAB.image,
    )


def main() -> None:
    made = documents()
    lay = functools.partial(layout, tokenizer=Bytes(), resolution=Native(PATCH, 2, 56 * 56, 224 * 224))
    plan = index.training(made, lay, steps=None, k=SHAPES, tokens=TOKENS, rows=ROWS, seed=0, patches=256)
    print(plan.table())
    source = Source(made, lay, plan, VOCAB, PATCH)
    cfg, tx = model(), state.optimizer(Optimizer(), len(plan.steps))
    now = state.create(vlm.spec(cfg), tx, jax.random.key(0))
    step = jax.jit(functools.partial(train_step, cfg=cfg, tx=tx), donate_argnums=0)

    start = time.perf_counter()
    batches = list(read(source, 0, threads=1))
    loader = time.perf_counter() - start
    sent = [sum(x.nbytes for x in jax.tree.leaves(b)) for b in batches]

    late, seconds = 0, []
    seen = set()
    for planned, batch in zip(plan.steps, batches, strict=True):
        counter = Compiles()
        start = time.perf_counter()
        now, metrics = step(now, batch)
        jax.block_until_ready(metrics)
        if planned.bucket in seen:
            late += counter.count
            seconds.append(time.perf_counter() - start)
        else:
            seen.add(planned.bucket)
    late_programs = step._cache_size() - len(plan.buckets)

    start = time.perf_counter()
    waited = 0.0
    feed = read(source, 0, threads=1)
    for _ in plan.steps:
        asked = time.perf_counter()
        batch = next(feed)
        waited += time.perf_counter() - asked
        now, metrics = step(now, batch)
        jax.block_until_ready(metrics)
    together = time.perf_counter() - start

    n = len(plan.steps)
    figures = {
        "documents": DOCUMENTS,
        "sizes": len({(d.images[0].height, d.images[0].width) for d in made}),
        "buckets": len(plan.buckets),
        "steps": n,
        "programs": int(step._cache_size()),
        "compiled_late": late,
        "fill": plan.fill,
        "loader_steps_per_second": n / loader,
        "train_steps_per_second": 1 / statistics.median(seconds),
        "together_steps_per_second": n / together,
        "share_of_time_waiting": waited / together,
        "bytes_per_step": statistics.mean(sent),
        "bytes_per_step_as_float_patches": statistics.mean(
            s + 3 * b.patches.nbytes for s, b in zip(sent, batches, strict=True)
        ),
        "parameters": specs.count(vlm.spec(cfg)),
    }
    aims = [
        {"name": "programs beyond one per bucket", "measured": int(late_programs), "at_most": 0},
        {
            "name": "loader rate / step rate",
            "measured": round(figures["loader_steps_per_second"] / figures["train_steps_per_second"], 2),
            "at_least": 1.0,
        },
    ]
    print(json.dumps({**figures, "aims": aims}))


if __name__ == "__main__":
    main()
