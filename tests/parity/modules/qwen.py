"""The vision towers of Qwen2-VL, Qwen2.5-VL (windows) and Qwen3-VL (position table, DeepStack), with their mergers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity import pictures
from parity.harness import Compare, double, gradient_model, run, saved, system, twin, weights_for
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from mmjax.convert import huggingface
from mmjax.convert.families import qwen_vision
from mmjax.encoders import vit
from mmjax.models import tower

PATCH = 4
STILLS = [(1, 6, 10), (1, 4, 4), (1, 2, 8), (1, 10, 6)]
CLIPS = [(3, 4, 6), (2, 6, 2)]


def theirs(model: torch.nn.Module, cuts: list[np.ndarray], grids: list, frames: int) -> dict[str, torch.Tensor]:
    """Pictures or clips through the reference; `cuts` are [P, C], C over (frame, row, column, channel)."""
    kind = next(model.parameters()).dtype
    x = np.concatenate(cuts).reshape(-1, frames, PATCH, PATCH, 3).transpose(0, 4, 1, 2, 3)
    if frames == 1:  # its processor doubles what stands still
        x = np.repeat(x, 2, axis=2)
    out = model(torch.tensor(x.reshape(len(x), -1), dtype=kind), grid_thw=torch.tensor(grids))
    found = {"tokens": out.pooler_output}
    for i, deep in enumerate(getattr(out, "deepstack_features", None) or []):
        found[f"deep {i}"] = deep
    return found


def compare(c: Compare, model: torch.nn.Module) -> None:
    loaded = huggingface.load(saved(model))
    cfg, params, config = loaded.cfg, loaded.params, model.config.to_dict()
    window = qwen_vision.window(config)
    wide, layers = double(model), cfg.vision.blocks.layers
    watch = {f"block {i}": f"blocks.{i}" for i in range(layers)} | {"embedding": "patch_embed"}
    for name, frames, grids in (("stills", 1, STILLS), ("alone", 1, STILLS[:1]), ("clips", 2, CLIPS)):
        packed = pictures.row(grids, merge=2, window=window, frames=True)
        plain = [pictures.windows.order(g, 2)[0] for g in grids]  # the reference takes squares' order, and puts windows
        rng = np.random.default_rng(5)
        given = [rng.normal(size=(g[0] * g[1] * g[2], frames * PATCH**2 * 3)).astype(np.float32) for g in grids]
        patches = packed.patches(given)
        ours, taps = everything(params, patches, cfg, packed.see)
        # Without the table: the reference adds that outside of what embeds.
        bare = dataclasses.replace(cfg.vision, table=None)
        embedded = vit.embed(params["vision"], patches, bare, position=packed.see["position"])
        for n, grid in enumerate(grids):
            sides = []
            for m in (model, wide):
                sides.append(outputs(m, watch, given[n][plain[n]], grid, frames))
            where = packed.slices[n]
            merged = slice(where.start // 4, where.stop // 4)
            # Blocks see our order (windows); tokens are put back into rows by the reference, and by the slots in ours.
            tokens = np.argsort(pictures.windows.order(grid, 2, window)[1])
            label = f"{name} {'x'.join(map(str, grid))}"
            back = np.argsort(plain[n])[packed.orders[n]]  # from the reference's order into ours
            c.value(f"{label} embedding", embedded[0, where], *(s["embedding"][back] for s in sides))
            for i in range(layers):
                c.value(f"{label} block {i}", taps[i, 0, where], sides[0][f"block {i}"], sides[1][f"block {i}"])
            c.value(f"{label} tokens", ours.tokens[0, merged][tokens], sides[0]["tokens"], sides[1]["tokens"])
            for i in range(len(cfg.deepstack)):
                c.value(f"{label} deep {i}", ours.deep[i, 0, merged][tokens], *(s[f"deep {i}"] for s in sides))
    gradients(c, model, loaded, window)


def outputs(model: torch.nn.Module, watch: dict, cut: np.ndarray, grid: tuple, frames: int) -> dict[str, np.ndarray]:
    caught: dict[str, torch.Tensor] = {}
    out = run(model, watch, lambda m: caught.update(theirs(m, [cut], [grid], frames)))
    return out | {k: v.detach().numpy() for k, v in caught.items()}


def everything(params: dict, patches: jax.Array, cfg: tower.Config, see: dict):
    """Media, and the output of every block."""
    taps = tuple(range(cfg.vision.blocks.layers))
    every = jax.jit(lambda p, x, s: vit.encode(p["vision"], x, cfg.vision, taps=taps, **s).taps)
    return jax.jit(lambda p, x, s: tower.apply(p, x, cfg, **s))(params, patches, see), every(params, patches, see)


def gradients(c: Compare, model: torch.nn.Module, loaded, window: int) -> None:
    grids = STILLS[:2]
    rng = np.random.default_rng(6)
    given = [rng.normal(size=(g[0] * g[1] * g[2], PATCH**2 * 3)).astype(np.float32) for g in grids]
    packed = pictures.row(grids, merge=2, window=window, frames=True)

    def loss(m: torch.nn.Module) -> torch.Tensor:
        total = 0.0
        for g, x in zip(grids, given, strict=True):
            for value in theirs(m, [x[pictures.windows.order(g, 2)[0]]], [g], 1).values():
                total = total + (value * torch.tensor(weights_for(value.shape))).sum()
        return total

    def ours(params: dict) -> jax.Array:
        out = tower.apply(params, packed.patches(given), loaded.cfg, **packed.see)
        total = 0.0
        for g, s in zip(grids, packed.slices, strict=True):
            order = pictures.windows.order(g, 2, window)[1]
            merged = slice(s.start // 4, s.stop // 4)
            for value in (out.tokens, *out.deep):
                mine = value[0, merged]
                total = total + (mine * jnp.asarray(weights_for(mine.shape)[order], jnp.float32)).sum()
        return total

    expected = huggingface.load(saved(gradient_model(model, loss))).params
    c.gradients(jax.jit(jax.grad(ours))(loaded.params), expected)


@system("Qwen2-VL vision")
def qwen2(c: Compare) -> None:
    cls = Qwen2VisionTransformerPretrainedModel
    compare(
        c,
        twin(cls, cls.config_class(depth=3, embed_dim=64, num_heads=4, patch_size=PATCH, hidden_size=24, mlp_ratio=2)),
    )


@system("Qwen2.5-VL vision")
def qwen2_5(c: Compare) -> None:
    cls = Qwen2_5_VisionTransformerPretrainedModel
    sizes = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 24, "patch_size": PATCH}
    compare(c, twin(cls, cls.config_class(depth=3, window_size=16, fullatt_block_indexes=[1], **sizes)))


@system("Qwen3-VL vision")
def qwen3(c: Compare) -> None:
    cls = Qwen3VLVisionModel
    sizes = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 24, "patch_size": PATCH}
    compare(
        c, twin(cls, cls.config_class(depth=4, num_position_embeddings=36, deepstack_visual_indexes=[0, 2], **sizes))
    )
