"""How full rows are, and how fast they are planned, on lengths like those of real interleaved data.

    python -m tests.benchmarks.packing

20,000 layouts: text of log-normal length (median 150, σ 1); 0 to 4 pictures (p = .3 .35 .2 .1 .05), sides log-uniform
from 64 to 2,048 pixels, aspect up to 4, at Qwen2-VL's sizes of 4 to 1,280 tokens; rows of 4,096 tokens, at most six
bucket shapes. One core. Peers: padding each batch of 32 to its longest, and Grain's best-fit packing on tokens (64
bins). The last line is one JSON object.
"""

import json
import os
import statistics
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data import index
from mmjax.sequence import batch as batches
from mmjax.sequence import buckets, invariants
from mmjax.sequence.document import Document, Text
from mmjax.sequence.layout import Layout
from mmjax.tokenizers.resolution import Native
from mmjax.tokenizers.vocab import Vocab
from mmjax.train.watch import Compiles

DOCUMENTS, TOKENS, ROWS, SHAPES, BATCH, REPEATS = 20_000, 4096, 4, 6, 32, 5
POLICY = Native(14, 2, 4 * 28 * 28, 1280 * 28 * 28)
LARGEST = 4 * TOKENS  # patches: four of them make one token


def workload(n: int, seed: int = 0) -> np.ndarray:
    """(tokens, patches, images, frames) of n documents."""
    rng = np.random.default_rng(seed)
    out = np.zeros((n, 4), np.int64)
    out[:, 0] = np.maximum(1, np.round(np.exp(rng.normal(np.log(150), 1, n))))
    for i, pictures in enumerate(rng.choice(5, n, p=[0.3, 0.35, 0.2, 0.1, 0.05])):
        for _ in range(pictures):
            longer = np.exp(rng.uniform(np.log(64), np.log(2048)))
            shorter = longer / np.exp(rng.uniform(0, np.log(4)))
            sides = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
            rows, columns = POLICY.grid(*(max(1, round(s)) for s in sides))
            out[i] += (rows * columns // 4 + 2, rows * columns, 1, 0)
    return out


def padded(sizes: np.ndarray) -> float:
    """The joint fill of batches of consecutive documents, one to a row, each padded to the longest."""
    groups = [sizes[i : i + BATCH, :2] for i in range(0, len(sizes), BATCH)]
    room = sum(g.max(0) * len(g) for g in groups)
    return buckets.harmonic(*(sizes[:, :2].sum(0) / room))


def grained(sizes: np.ndarray) -> tuple[float, float]:
    """Fill of tokens, and joint fill where patches are padded to the fullest row, of Grain's best fit on tokens."""
    features = grain.MapDataset.source([{"tokens": np.full(n, i, np.int32)} for i, n in enumerate(sizes[:, 0])])
    packed = grain.experimental.BestFitPackIterDataset(
        features.to_iter_dataset(grain.ReadOptions(num_threads=0)),
        length_struct={"tokens": TOKENS},
        num_packing_bins=64,
    )
    rows = [np.unique(row["tokens"][row["tokens_segment_ids"] > 0]) for row in packed]
    used = np.array([sizes[row, :2].sum(0) for row in rows])
    tokens = used[:, 0].sum() / (TOKENS * len(rows))
    return tokens, buckets.harmonic(tokens, used[:, 1].sum() / (used[:, 1].max() * len(rows)))


def compiled(plan: index.Plan) -> int:
    """Programs compiled after each bucket has been seen once, over all of a plan's steps."""
    count = jax.jit(lambda batch: invariants.violations(batch, 100))
    vocab, seen, late = Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=100), set(), 0
    for step in plan.steps:
        bucket = plan.buckets[step.bucket]
        counter = Compiles()
        count(jax.tree.map(jnp.asarray, batches.empty(bucket, 3, vocab))).block_until_ready()
        late += counter.count if bucket in seen else 0
        seen.add(bucket)
    return late


def main() -> None:
    sizes = workload(DOCUMENTS)
    fits = sizes[:, 0] <= TOKENS
    kept = sizes[fits]
    documents = [Document(str(i), (Text("a"),)) for i in range(len(kept))]

    def layout(document: Document) -> Layout:
        return Layout(document.id, (), *kept[int(document.id)].tolist())

    def plan() -> index.Plan:
        options = {"k": SHAPES, "tokens": TOKENS, "rows": 1, "seed": 0, "patches": LARGEST}
        return index.training(documents, layout, steps=None, **options)

    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        found = plan()
        seconds.append(time.perf_counter() - start)
    print(found.table())
    grain_tokens, grain_joint = grained(kept)
    figures = {
        "fill_tokens": found.fill_tokens,
        "fill_patches": found.fill_patches,
        "joint_fill": found.fill,
        "padding_fill": padded(kept),
        "grain_fill": grain_tokens,
        "grain_joint_fill": grain_joint,
        "refused": int((~fits).sum()),
        "look_ahead": index.WINDOW,
        "documents_per_second": len(kept) / statistics.median(seconds),
        "compiles_after_warmup": compiled(found),
        "shapes": [b.row for b in found.buckets],
    }
    aims = [
        {"name": "joint fill", "measured": round(figures["joint_fill"], 4), "at_least": 0.975},
        {"name": "compiles after warm-up", "measured": figures["compiles_after_warmup"], "at_most": 0},
        {"name": "documents per second", "measured": round(figures["documents_per_second"]), "at_least": 10_000},
    ]
    print(json.dumps({**figures, "aims": aims}))


if __name__ == "__main__":
    main()
