"""PVT: PvtForImageClassification and its positions for other sizes. PVT v2: classifier, linear attention, backbone."""

import copy

import jax
import torch
import transformers as hf
from parity.harness import Compare, saved, system, twin
from parity.modules.swin import compare, gradients, pictures

from mmjax.convert import huggingface
from mmjax.encoders import pyramid
from mmjax.encoders.hierarchy import as_map
from mmjax.nn import norm

SIZES = {
    "depths": (1, 2, 1, 1),
    "hidden_sizes": (8, 16, 24, 32),
    "num_attention_heads": (1, 2, 3, 4),
    "mlp_ratios": (4, 3, 2, 2),
}


def intermediates(params: dict, images: jax.Array, cfg: pyramid.Config) -> dict[str, jax.Array]:
    """The encoder step by step."""
    below, out = images, {}
    for i, depth in enumerate(cfg.depths):
        stage = params[f"stage_{i}"]
        x, grid = pyramid.embed(stage, below, cfg, i)
        out[f"stage {i} embedding"] = x
        for j in range(depth):
            x = pyramid.block(jax.tree.map(lambda p, j=j: p[j], stage["layers"]), x, cfg, i, grid)
            out[f"stage {i} block {j}"] = x
        if cfg.kind != "v1":
            x = norm.apply(stage["norm"], x, cfg.stage_norm(i))
            out[f"stage {i}"] = x
        if not cfg.has_class(i):
            below = as_map(x, grid)
    return out


def whole(params: dict, images: jax.Array, cfg: pyramid.Config) -> dict[str, jax.Array]:
    """The same in one, with what follows the blocks. (The last map of PVT, without class token, is for other tests.)"""
    out = pyramid.apply(params, images, cfg)
    maps = out.maps[: -1 if cfg.kind == "v1" else None]
    named = {"norm": out.tokens} | {f"stage {i}": m for i, m in enumerate(maps)}
    return named | ({"out": out.logits} if cfg.classes else {})


def watched(cfg: pyramid.Config, prefix: str) -> dict[str, str]:
    out = {}
    for i, depth in enumerate(cfg.depths):
        first = cfg.kind == "v1"
        stage = f"{prefix}encoder." + (f"block.{i}" if first else f"layers.{i}")
        embed = f"{prefix}encoder.patch_embeddings.{i}" if first else f"{stage}.patch_embedding"
        out |= {f"stage {i} embedding": embed}
        out |= {f"stage {i} block {j}": f"{stage}.{'' if first else 'blocks.'}{j}" for j in range(depth)}
        # A map is the last block's output in PVT, and has a norm in PVT v2.
        out[f"stage {i}"] = f"{stage}.{depth - 1}" if first else f"{stage}.layer_norm"
    return out | {"norm": f"{prefix}encoder.layer_norm" if cfg.kind == "v1" else out[f"stage {cfg.stages - 1}"]}


def logits(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m(x).logits


@system("PVT")
def first(c: Compare) -> None:
    for side in (64, 70, 91):  # its own size, and two whose maps leave something over
        model = twin(hf.PvtForImageClassification, hf.PvtConfig(**SIZES, image_size=side, num_labels=5))
        loaded = huggingface.load(saved(model))
        watch = watched(loaded.cfg, "pvt.")
        compare(c, intermediates, loaded, pictures(2, side, side), watch, model, logits)
    # Alone, the first of the two pictures.
    compare(c, whole, loaded, pictures(2, side, side)[:1], watch, model, logits)

    def call(m: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        out = m.pvt(x).last_hidden_state
        return [out, m.classifier(out[:, 0])]

    gradients(c, loaded, model, (side, side), call, lambda out: [out.tokens, out.logits])


@system("PVT, other sizes")
def interpolated(c: Compare) -> None:
    """Positions for other sizes: transformers cannot, so its tables are resized as the authors' code does."""
    config = hf.PvtConfig(**SIZES, image_size=64, qkv_bias=False, num_labels=5)
    model = twin(hf.PvtForImageClassification, config)
    loaded = huggingface.load(saved(model))
    for size in ((96, 40), (70, 101), (64, 128)):
        other = copy.deepcopy(model)
        rows, columns = size
        for i, embed in enumerate(other.pvt.encoder.patch_embeddings):
            step = config.strides[i]
            rows, columns = rows // step, columns // step
            given = embed.position_embeddings.detach().double()
            token, table = (given[:, :1], given[:, 1:]) if i == 3 else (given[:, :0], given)
            side = round(table.shape[1] ** 0.5)
            table = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            table = torch.nn.functional.interpolate(table, size=(rows, columns), mode="bilinear")
            table = torch.cat([token, table.flatten(2).transpose(1, 2)], dim=1)
            embed.position_embeddings = torch.nn.Parameter(table.float())
        compare(c, whole, loaded, pictures(2, *size), watched(loaded.cfg, "pvt."), other, logits)


@system("PVT v2")
def second(c: Compare) -> None:
    model = twin(hf.PvtV2ForImageClassification, hf.PvtV2Config(**SIZES, num_labels=5))
    loaded = huggingface.load(saved(model))
    watch = watched(loaded.cfg, "pvt_v2.")
    for size in ((64, 64), (70, 85), (101, 67)):
        compare(c, intermediates, loaded, pictures(2, *size), watch, model, logits)
    compare(c, whole, loaded, pictures(2, 101, 67)[:1], watch, model, logits)
    of_classifier(c, loaded, model, (70, 85))


@system("PVT v2, linear attention")
def linear(c: Compare) -> None:
    """Two stages, with maps larger and smaller than 7 × 7, to which keys are averaged, and sides not divided by 7."""
    lists = {"patch_sizes": (7, 3), "strides": (4, 2), "sr_ratios": (8, 4), **{k: v[:2] for k, v in SIZES.items()}}
    config = hf.PvtV2Config(**lists, num_encoder_blocks=2, linear_attention=True, qkv_bias=False)
    model = twin(hf.PvtV2ForImageClassification, config)
    loaded = huggingface.load(saved(model))
    for size in ((64, 64), (70, 85), (33, 50)):
        compare(c, intermediates, loaded, pictures(2, *size), watched(loaded.cfg, "pvt_v2."), model, logits)
    of_classifier(c, loaded, model, (33, 50))


def of_classifier(c: Compare, loaded: huggingface.Model, model: torch.nn.Module, size: tuple[int, int]) -> None:
    def call(m: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        out = m.pvt_v2(x, output_hidden_states=True)
        return [*(y.permute(0, 2, 3, 1) for y in out.hidden_states), m.classifier(out.last_hidden_state.mean((2, 3)))]

    gradients(c, loaded, model, size, call, lambda out: [*out.maps, out.logits])


@system("PVT v2 backbone")
def backbone(c: Compare) -> None:
    """The same encoder under other names, without a classifier."""
    model = twin(hf.PvtV2Backbone, hf.PvtV2Config(**SIZES, out_features=["stage1", "stage2", "stage3", "stage4"]))
    loaded = huggingface.load(saved(model))
    assert loaded.cfg.classes is None

    def call(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m(x).feature_maps[-1]

    compare(c, whole, loaded, pictures(2, 70, 85), watched(loaded.cfg, ""), model, call)
