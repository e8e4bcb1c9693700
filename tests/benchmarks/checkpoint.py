"""What a checkpoint costs the training that goes on: how long `save` blocks, and how long its checksums take.

    python -m tests.benchmarks.checkpoint

The state is that of AdamW for a decoder of 68 million parameters (12 layers, width 512, vocabulary 32,768), 0.8 GB of
float32, on one CPU device with all cores. Medians of five, after one to warm up.

- blocking: the time until `save` returns, over the time until the step exists. A donated update follows each save, as
  in training; `update` is how long that takes beside what it takes without a save, because a donated array that is
  still being written must be waited for or copied.
- checksums: the time of all sums of the state, over the forward and backward pass of the decoder on 2,048 tokens.

The last line is one JSON object.
"""

import json
import os
import statistics
import tempfile
import time

# Before JAX starts: the CPU alone, also where an accelerator is present.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.checkpoint import Checkpoints
from mmjax.core import spec as specs
from mmjax.core.checksum import checksums
from mmjax.core.files import require_space
from mmjax.core.tree import nbytes
from mmjax.models import decoder
from mmjax.nn import rope, transformer

REPEATS, TOKENS, VOCAB, WIDTH, HEAD = 5, 2048, 32_768, 512, 64
BLOCKS = transformer.Config(
    width=WIDTH, layers=12, heads=8, kv_heads=8, head=HEAD, hidden=4 * WIDTH, rope=rope.Config(HEAD, (HEAD // 2,))
)
CONFIG = decoder.Config(VOCAB, BLOCKS)


def train_state() -> dict:
    params = specs.init(decoder.spec(CONFIG), jax.random.key(0))
    noise = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape, p.dtype), params)
    # Random numbers, as moments are, hardly compress.
    return {"params": params, "mu": noise, "nu": jax.tree.map(lambda x: x * x, noise), "step": jnp.int32(0)}


def loss(params: dict, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next token, of one causal document."""
    length = tokens.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None]
    zero = jnp.zeros_like(index)
    see = {"order": index, "lo": zero, "hi": index, "position": index[..., None]}
    hidden = decoder.apply(params, decoder.embed(params, tokens, CONFIG), CONFIG, **see)
    logits = decoder.logits(params, hidden, CONFIG)[:, :-1]
    likely = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - likely).mean()


def seconds(f) -> float:
    """The median time of f, after one call to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def saving(state: dict, directory: str) -> dict[str, float]:
    """Medians in seconds: until save returns, until the step exists, and a donated update after a save or none."""
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    found: dict[str, list[float]] = {"blocks": [], "whole": [], "update": [], "update_alone": []}
    with Checkpoints(directory, keep=1) as checkpoints:
        for step in range(REPEATS + 1):
            start = time.perf_counter()
            state = jax.block_until_ready(update(state))
            found["update_alone"].append(time.perf_counter() - start)
            start = time.perf_counter()
            checkpoints.save(step, state)
            saved = time.perf_counter()
            state = jax.block_until_ready(update(state))
            updated = time.perf_counter()
            checkpoints.wait()
            found["blocks"].append(saved - start)
            found["update"].append(updated - saved)
            found["whole"].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def main() -> None:
    state = jax.block_until_ready(train_state())
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (1, TOKENS)), jnp.int32)
    both = jax.jit(jax.value_and_grad(loss))
    step = seconds(lambda: both(state["params"], tokens))
    sums = seconds(lambda: checksums(state))
    size = nbytes(state)
    with tempfile.TemporaryDirectory(prefix="mmjax-benchmark-") as directory:
        require_space(directory, 3 * size, "keep three checkpoints")
        times = saving(state, directory)
    figures = {
        "parameters": specs.count(decoder.spec(CONFIG)),
        "bytes": size,
        "tokens": TOKENS,
        "train_step_seconds": step,
        "checksum_seconds": sums,
        "checksum_bytes_per_second": size / sums,
        **{f"{name}_seconds": value for name, value in times.items()},
        "share_blocked": times["blocks"] / times["whole"],
        "share_checksums": sums / step,
        "cores": os.cpu_count(),
    }
    aims = [
        {"name": "share of a save that blocks", "measured": round(figures["share_blocked"], 4), "at_most": 0.05},
        {"name": "checksums over a train step", "measured": round(figures["share_checksums"], 4), "at_most": 0.01},
    ]
    print(json.dumps({**figures, "aims": aims}))


if __name__ == "__main__":
    main()
