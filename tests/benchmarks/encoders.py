"""Encoders against transformers on CPU: `python -m tests.benchmarks.encoders` (needs the `parity` extra).

Forward and backward by every parameter, float32, two threads, the same weights, useful patches per second:

* ViT-B/16 at 224 × 224, batch 4.
* 20 pictures of mixed native sizes through Qwen2-VL's vision tower (width 1,280; 4 of its 32 blocks, to end in
  minutes), which transformers packs too.
* the same 20 through SigLIP 2 NaFlex B/16 (4 of its 12 blocks), which transformers pads to the largest of them.

Contestants take turns; medians of 5. A turn is two steps, of which the second counts, as in a run: right after the
other's turn a step of ViT-B/16 took a quarter longer for us and a tenth for torch (fresh memory, most likely). The last
line is JSON.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mmjax.convert.families import qwen_vision, siglip, vit
from mmjax.convert.found import Found
from mmjax.convert.rules import Arrays, load
from mmjax.encoders import vit as encoder
from mmjax.models import tower
from mmjax.nn import patch_embed
from mmjax.sequence import intervals, windows
from mmjax.sequence.positions import grid_positions

ROUNDS, THREADS = 5, 2
# Photographs, screenshots and thumbnails as they come: 16 to 528 patches, all sides multiples of the merge.
GRIDS = [(1, 2 * r, 2 * c) for r, c in [
    (8, 12), (2, 2), (12, 8), (6, 6), (4, 14), (10, 10), (3, 5), (8, 8), (2, 9), (12, 11),
    (5, 7), (7, 4), (9, 6), (4, 4), (6, 11), (11, 4), (3, 3), (10, 6), (5, 12), (8, 5),
]]  # fmt: skip


def rows(grids: list, rows: int, merge: int = 1) -> dict:
    """Descriptors of pictures dealt out to so many rows, and in `cuts` which places of which row a picture has."""
    dealt: list[list[int]] = [[] for _ in range(rows)]
    filled = [0] * rows
    for n in sorted(range(len(grids)), key=lambda n: -grids[n][1] * grids[n][2]):
        least = filled.index(min(filled))
        dealt[least].append(n)
        filled[least] += grids[n][1] * grids[n][2]
    long, many = max(filled), max(map(len, dealt))
    see = {"order": np.full((rows, long), -1), "lo": np.zeros((rows, long)), "hi": np.full((rows, long), -1)}
    see |= {
        "image": np.full((rows, long), -1),
        "position": np.zeros((rows, long, 2)),
        "grid": np.zeros((rows, many, 3)),
    }
    cuts = {}
    for row, some in enumerate(dealt):
        counts = [grids[n][1] * grids[n][2] for n in some]
        total = sum(counts)
        see["order"][row, :total] = np.arange(total)
        see["lo"][row, :total], see["hi"][row, :total] = intervals.blocks(counts)
        see["image"][row, :total] = np.repeat(np.arange(len(some)), counts)
        orders = [windows.order(grids[n], merge)[0] for n in some]
        see["position"][row, :total] = np.concatenate(
            [grid_positions(grids[n])[:, 1:][o] for n, o in zip(some, orders, strict=True)]
        )
        see["grid"][row, : len(some)] = [grids[n] for n in some]
        at = 0
        for n, o in zip(some, orders, strict=True):
            cuts[n] = (row, slice(at, at + len(o)), o)
            at += len(o)
    return {k: jnp.asarray(v, jnp.int32) for k, v in see.items()}, cuts, long


def fill(cuts: dict, pictures: list[np.ndarray], long: int) -> jax.Array:
    """The rows' patches; a picture is [P, C], row by row."""
    out = np.zeros((1 + max(row for row, *_ in cuts.values()), long, pictures[0].shape[1]), np.float32)
    for n, (row, where, order) in cuts.items():
        out[row, where] = pictures[n][order]
    return jnp.asarray(out)


def ours(found: Found, model: torch.nn.Module, call: Callable) -> Callable[[], None]:
    """A compiled forward and backward pass of the sum of `call(params, cfg)`."""
    weights = Arrays({k: v.detach().numpy() for k, v in model.state_dict().items()})
    params = load(found.of.spec(found.cfg), found.rules, weights)
    step = jax.jit(jax.grad(lambda p: jnp.square(call(p)).sum()))
    jax.block_until_ready(step(params))
    return lambda: jax.block_until_ready(step(params))


def theirs(model: torch.nn.Module, call: Callable) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        call(model).square().sum().backward()

    step()
    return step


def measure(name: str, contestants: dict[str, Callable[[], None]], patches: int) -> dict[str, float]:
    """Useful patches per second of each."""
    seconds: dict[str, list[float]] = {k: [] for k in contestants}
    for round in range(ROUNDS):
        for k in list(contestants) if round % 2 else list(contestants)[::-1]:
            contestants[k]()
            start = time.perf_counter()
            contestants[k]()
            seconds[k].append(time.perf_counter() - start)
    rates = {k: patches / statistics.median(v) for k, v in seconds.items()}
    print(name, {k: f"{r:.0f} patches/s" for k, r in rates.items()}, flush=True)
    return rates


def unrolled(cfg: encoder.Config) -> encoder.Config:
    """The same weights, the same numbers, a twentieth sooner where blocks are few.

    Twelve of ViT-B/16 are slower so: a trace shows 0.8 s of 4.3 s in XLA's concatenation of their gradients.
    """
    return dataclasses.replace(cfg, blocks=dataclasses.replace(cfg.blocks, unroll=cfg.blocks.layers))


def vit_b16() -> dict[str, float]:
    model = hf.ViTModel(hf.ViTConfig(), add_pooling_layer=False).eval()
    named = _on_disk(model)
    found = vit.read(model.config.to_dict(), frozenset(named.state_dict()))
    cfg = found.cfg
    pixels = np.random.default_rng(0).normal(size=(4, 3, 224, 224)).astype(np.float32)
    see, _, _ = rows([(1, 14, 14)] * 4, 4)
    patches = patch_embed.patchify(jnp.asarray(pixels.transpose(0, 2, 3, 1)), 16)
    call = lambda p: encoder.encode(p, patches, cfg, **see).patches  # noqa: E731
    both = {
        "mmjax": ours(found, named, call),
        "transformers": theirs(model, lambda m: m(torch.tensor(pixels)).last_hidden_state),
    }
    return measure("ViT-B/16, 224, batch 4", both, 4 * 196)


class _on_disk:
    """A model under the names its files have (transformers 5 has others in memory)."""

    def __init__(self, model: torch.nn.Module):
        import tempfile

        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.tensors = load_file(f"{folder}/model.safetensors")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors


def pictures(values: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(r * c, values)).astype(np.float32) for _, r, c in GRIDS]


def qwen2_vl() -> dict[str, float]:
    cls = Qwen2VisionTransformerPretrainedModel
    model = cls(cls.config_class(depth=4)).eval()
    found = qwen_vision.read(model.config.to_dict(), frozenset())
    cfg = dataclasses.replace(found.cfg, vision=unrolled(found.cfg.vision))
    given = pictures(14 * 14 * 3)
    see, cuts, long = rows(GRIDS, 2, merge=2)
    patches = fill(cuts, given, long)
    orders = [windows.order(g, 2)[0] for g in GRIDS]
    flat = np.concatenate([x[o] for x, o in zip(given, orders, strict=True)])
    flat = np.repeat(flat.reshape(-1, 1, 14, 14, 3).transpose(0, 4, 1, 2, 3), 2, axis=2).reshape(len(flat), -1)
    inputs = {"hidden_states": torch.tensor(flat), "grid_thw": torch.tensor(GRIDS)}
    both = {
        "mmjax": ours(found, model, lambda p: tower.apply(p, patches, cfg, **see).tokens),
        "transformers": theirs(model, lambda m: m(**inputs).pooler_output),
    }
    return measure("Qwen2-VL vision, 20 native sizes", both, len(flat))


def naflex() -> dict[str, float]:
    model = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(num_hidden_layers=4)).eval()
    found = siglip.read(model.config.to_dict(), frozenset(model.state_dict()))
    cfg = unrolled(found.cfg)
    given = pictures(16 * 16 * 3)
    see, cuts, long = rows(GRIDS, 2)
    patches = fill(cuts, given, long)
    most = max(map(len, given))
    padded = np.stack([np.pad(x, ((0, most - len(x)), (0, 0))) for x in given])
    mask = np.stack([np.arange(most) < len(x) for x in given]).astype(np.int64)
    inputs = {
        "pixel_values": torch.tensor(padded),
        "pixel_attention_mask": torch.tensor(mask),
        "spatial_shapes": torch.tensor([g[1:] for g in GRIDS]),
    }
    both = {
        "mmjax": ours(found, model, lambda p: encoder.encode(p, patches, cfg, **see).pooled),
        "transformers": theirs(model, lambda m: m(**inputs).pooler_output),
    }
    return measure("SigLIP 2 NaFlex B/16, 20 native sizes", both, sum(map(len, given)))


def main() -> None:
    torch.set_num_threads(THREADS)
    figures = {"ViT-B/16": vit_b16(), "Qwen2-VL packed": qwen2_vl(), "NaFlex padded": naflex()}
    least = {"ViT-B/16": 0.9, "Qwen2-VL packed": 0.95, "NaFlex padded": 1.5}
    ratio = {k: v["mmjax"] / v["transformers"] for k, v in figures.items()}
    aims = [
        {"name": f"{k}, over transformers", "measured": round(r, 3), "at_least": least[k]} for k, r in ratio.items()
    ]
    print(json.dumps({"patches_per_second": figures, "useful": sum(r * c for _, r, c in GRIDS), "aims": aims}))


if __name__ == "__main__":
    main()
