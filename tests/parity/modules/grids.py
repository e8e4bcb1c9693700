"""Connectors on grids: LLaVA, PaliGemma, InternVL, Idefics3, Qwen mergers, Mistral 3, Gemma 3, OneVision, Honeybee."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity.harness import Compare, double, gradient_model, randomise, state, system, weights_for
from torch import nn
from transformers import (
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    PaliGemmaConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModel,
    LlavaOnevisionMultiModalProjector,
)
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from mmjax.connectors import abstractor, linear, merger, mlp, pixel_shuffle, pool, wico
from mmjax.convert import rules
from mmjax.convert.families import connectors
from mmjax.nn import norm
from mmjax.sequence import windows

D, OUT = 12, 20


def pictures(grids: list[tuple[int, int]], width: int = D) -> list[np.ndarray]:
    """Features of each picture, row by row: [rows, columns, width]."""
    rng = np.random.default_rng(3)
    return [(1.5 * rng.normal(size=(*grid, width)) + 0.3).astype(np.float32) for grid in grids]


def pack(pictures: list[np.ndarray], side: int, size: int, count: int) -> dict:
    """One row of `size` places with all of them in squares' order (noise in empty places) and room for `count`."""
    flat, image = [], []
    for i, x in enumerate(pictures):
        patches, _, _ = windows.order((1, *x.shape[:2]), side)
        flat.append(x.reshape(-1, x.shape[-1])[patches])
        image += [i] * len(patches)
    spare = size - len(image)
    noise = np.random.default_rng(4).normal(size=(spare, flat[0].shape[-1])).astype(np.float32)
    order = [*range(len(image)), *[-1] * spare]
    return {
        "features": jnp.asarray(np.concatenate([*flat, noise])[None]),
        "image": jnp.asarray([image + [-1] * spare], jnp.int32),
        "order": jnp.asarray([order], jnp.int32),
        "grid": jnp.asarray([[(1, *x.shape[:2]) for x in pictures] + [(0, 0, 0)] * (count - len(pictures))], jnp.int32),
    }


def compare_with(
    compare: Compare,
    model: nn.Module,
    call: Callable[[nn.Module, torch.Tensor], dict[str, torch.Tensor]],
    of: ModuleType,
    cfg: object,
    table: list[rules.Rule],
    grids: list[tuple[int, int]],
    inner: Callable[[dict, dict], dict[str, jax.Array]] = lambda params, batch: {},
    places: tuple[str, ...] = (),
    side: int = 1,
    outputs: int | None = None,
) -> None:
    """Every picture of a packed row, and each alone, against `call`: what it returns by name; gradients by "out".

    call: [rows, columns, D] → {"out": [tokens, D], …}. inner: the same tensors of ours but "out". places: which of
    image, order and grid `apply` gets. outputs: places per picture; the connector's own count if left out.
    """
    model = randomise(model.float().eval())
    spec = of.spec(cfg)
    params = rules.load(spec, table, rules.Arrays(state(model)))
    back = rules.save(spec, table, params)
    assert all(np.array_equal(back[k], v) for k, v in state(model).items() if k in back)
    assert len(back) == len(state(model))
    many = pictures(grids)
    wide = double(model)

    @jax.jit
    def ours(params, batch):
        out = of.apply(params, batch["features"], cfg, **{name: batch[name] for name in places})
        return {"out": out, **inner(params, batch)}

    count = [cfg.tokens((1, *g)) if outputs is None else outputs for g in grids]
    stop = np.cumsum(count)
    room = sum(x.shape[0] * x.shape[1] for x in many) + 5, len(many) + 1
    whole = ours(params, pack(many, side, *room))
    with torch.no_grad():
        single = [call(model, torch.from_numpy(x)) for x in many]
        exact = [call(wide, torch.from_numpy(x).double()) for x in many]
    for i, x in enumerate(many):
        alone = ours(params, pack([x], side, *room))
        for name, values in whole.items():
            scale = values.shape[1] / whole["out"].shape[1]  # tensors before squares are merged
            scale = 1 if scale < 1.5 else side * side
            at = slice(int(stop[i] - count[i]) * scale, int(stop[i]) * scale)
            if exact[i][name].shape[0] == x.shape[0] * x.shape[1] and scale == 1 and name != "out":
                start = sum(a.shape[0] * a.shape[1] for a in many[:i])
                at = slice(start, start + x.shape[0] * x.shape[1])
            label = f"{name} of {x.shape[0]}×{x.shape[1]}"
            compare.value(f"{label}, packed", values[0, at], single[i][name], exact[i][name])
            compare.value(f"{label}, alone", alone[name][0, : at.stop - at.start], single[i][name], exact[i][name])

    weights = [weights_for(e["out"].shape, seed=i) for i, e in enumerate(exact)]

    def loss(m: nn.Module) -> torch.Tensor:
        outs = (call(m, torch.from_numpy(x).double())["out"] for x in many)
        return sum((o * torch.from_numpy(w)).sum() for o, w in zip(outs, weights, strict=True))

    theirs = rules.load(spec, table, rules.Arrays(state(gradient_model(model, loss))))
    packed, w = pack(many, side, *room), jnp.asarray(np.concatenate(weights), jnp.float32)

    def ours_loss(params):
        out = of.apply(params, packed["features"], cfg, **{name: packed[name] for name in places})
        return (out[0, : w.shape[0]] * w).sum()

    compare.gradients(jax.jit(jax.grad(ours_loss))(params), theirs)


def sizes(cls: type, **more: object) -> object:
    """A config of the family with our widths."""
    cfg = cls()
    cfg.vision_config.hidden_size = D
    cfg.text_config.hidden_size = OUT
    for name, value in more.items():
        setattr(cfg, name, value)
    return cfg


def flat(model: nn.Module, x: torch.Tensor) -> dict:
    """A projector of single patches."""
    return {"out": model(x.reshape(-1, D))}


SHAPES = [(3, 5), (1, 1), (4, 2)]
SQUARES = [(4, 6), (2, 2), (6, 2)]


@system("LLaVA: MLP")
def llava(compare: Compare) -> None:
    for bias, act, ours in ((True, "gelu", "gelu"), (False, "gelu_pytorch_tanh", "gelu_tanh")):
        cfg = mlp.Config(D, OUT, activation=ours, bias=bias)
        model = LlavaMultiModalProjector(sizes(LlavaConfig, multimodal_projector_bias=bias, projector_hidden_act=act))
        compare_with(compare, model, flat, mlp, cfg, connectors.llava(cfg, ""), SHAPES)


@system("LLaVA: mlp3x")
def llava3(compare: Compare) -> None:
    # As liuhaotian's multimodal_projector/builder.py makes it of "mlp4x_gelu".
    cfg = mlp.Config(D, OUT, depth=4)
    parts = [nn.Linear(D, OUT), *(m for _ in range(3) for m in (nn.GELU(), nn.Linear(OUT, OUT)))]
    compare_with(compare, nn.Sequential(*parts), flat, mlp, cfg, connectors.sequential(cfg, ""), SHAPES)


@system("PaliGemma: linear")
def paligemma(compare: Compare) -> None:
    config = sizes(PaliGemmaConfig)
    config.vision_config.projection_dim = OUT
    cfg = linear.Config(D, OUT)
    table = connectors.paligemma(cfg, "linear.")
    compare_with(compare, PaliGemmaMultiModalProjector(config), flat, linear, cfg, table, SHAPES)


@system("InternVL: pixel shuffle")
def internvl(compare: Compare) -> None:
    cfg = pixel_shuffle.Config(D, OUT)

    def call(m: nn.Module, x: torch.Tensor) -> dict:
        shuffled = InternVLModel.pixel_shuffle(None, x[None], 0.5).reshape(-1, 4 * D)
        return {"shuffled": shuffled, "norm": m.layer_norm(shuffled), "out": m(shuffled)}

    def inner(params: dict, batch: dict) -> dict:
        shuffled = pixel_shuffle.grids.concatenate(batch["features"], 2)
        return {"shuffled": shuffled, "norm": norm.apply(params["norm"], shuffled, cfg.norm_config)}

    model = InternVLMultiModalProjector(sizes(InternVLConfig))
    table = connectors.internvl(cfg, "")
    compare_with(compare, model, call, pixel_shuffle, cfg, table, SQUARES, inner, side=2)


@system("Idefics3, SmolVLM: pixel shuffle")
def idefics3(compare: Compare) -> None:
    for side, grids in ((2, [(4, 4), (2, 2), (6, 6)]), (3, [(3, 3), (9, 9), (6, 6)])):
        cfg = pixel_shuffle.Config(D, OUT, side, norm=False, layers=1, bias=False)

        def call(m: nn.Module, x: torch.Tensor, side: int = side) -> dict:
            x = x.reshape(1, -1, D)
            return {"shuffled": m.pixel_shuffle(x, side)[0], "out": m(x)[0]}

        def inner(params: dict, batch: dict, side: int = side) -> dict:
            return {"shuffled": pixel_shuffle.grids.concatenate(batch["features"], side)}

        model = Idefics3Connector(sizes(Idefics3Config, scale_factor=side))
        table = connectors.idefics3(cfg, "")
        compare_with(compare, model, call, pixel_shuffle, cfg, table, grids, inner, side=side)


def squared(x: torch.Tensor, side: int = 2) -> torch.Tensor:
    """The patches of [rows, columns, D] as Qwen's processor orders them."""
    rows, columns, width = x.shape
    cut = x.reshape(rows // side, side, columns // side, side, width)
    return cut.permute(0, 2, 1, 3, 4).reshape(-1, width)


def qwen(compare: Compare, model: nn.Module, cfg: merger.Config, table: list, first: str) -> None:
    def call(m: nn.Module, x: torch.Tensor) -> dict:
        x = squared(x)
        after = getattr(m, first)(x.view(-1, 4 * D) if cfg.norm_after else x).reshape(-1, 4 * D)
        return {"merged": after, "out": m(x)}

    def inner(params: dict, batch: dict) -> dict:
        return {"merged": merger.merged(params, batch["features"], cfg)}

    compare_with(compare, model, call, merger, cfg, table, SQUARES, inner, side=2)


@system("Qwen2-VL: merger")
def qwen2_vl(compare: Compare) -> None:
    cfg = merger.Config(D, OUT)
    qwen(compare, PatchMerger(OUT, D), cfg, connectors.qwen2_vl(cfg, ""), "ln_q")


@system("Qwen2.5-VL: merger")
def qwen2_5_vl(compare: Compare) -> None:
    cfg = merger.Config(D, OUT, norm="rms")
    qwen(compare, Qwen2_5_VLPatchMerger(OUT, D), cfg, connectors.qwen2_vl(cfg, ""), "ln_q")


@system("Qwen3-VL: merger")
def qwen3_vl(compare: Compare) -> None:
    config = Qwen3VLVisionConfig(hidden_size=D, out_hidden_size=OUT)
    for after in (False, True):
        cfg = merger.Config(D, OUT, norm_after=after)
        qwen(compare, Qwen3VLVisionPatchMerger(config, after), cfg, connectors.qwen3_vl(cfg, ""), "norm")


@system("Mistral 3: merger")
def mistral3(compare: Compare) -> None:
    config = sizes(Mistral3Config)
    patch = config.vision_config.patch_size
    for bias in (False, True):
        config.multimodal_projector_bias = bias
        epsilon = config.text_config.rms_norm_eps
        cfg = merger.Config(D, OUT, 2, OUT, "rms", channels="channel", reduce=True, bias=bias, epsilon=epsilon)

        def call(m: nn.Module, x: torch.Tensor) -> dict:
            size = [(x.shape[0] * patch, x.shape[1] * patch)]
            flat = x.reshape(-1, D)
            return {"merged": m.patch_merger(m.norm(flat), size), "out": m(flat, size)}

        def inner(params: dict, batch: dict, cfg: merger.Config = cfg) -> dict:
            return {"merged": merger.merged(params, batch["features"], cfg)}

        model, table = Mistral3MultiModalProjector(config), connectors.mistral3(cfg, "")
        compare_with(compare, model, call, merger, cfg, table, SQUARES, inner, side=2)


@system("Gemma 3: average pooling")
def gemma3(compare: Compare) -> None:
    config = sizes(Gemma3Config)
    cfg = pool.Config(3, norm=norm.Config(D, "rms", config.vision_config.layer_norm_eps, 1.0), inputs=D, outputs=OUT)

    def call(m: nn.Module, x: torch.Tensor) -> dict:
        # The class knows one square size: it is told each picture's.
        m.patches_per_image = x.shape[0]
        x = x.reshape(1, -1, D)
        pooled = m.avg_pool(x.transpose(1, 2).reshape(1, D, m.patches_per_image, -1)).flatten(2).transpose(1, 2)[0]
        return {"pooled": pooled, "norm": m.mm_soft_emb_norm(pooled), "out": m(x)[0]}

    for raster in (False, True):
        ours = pool.Config(**{**vars(cfg), "raster": raster})
        places = ("grid",) if raster else ()

        def inner(params: dict, batch: dict, ours: pool.Config = ours) -> dict:
            pooled = pool.pool(batch["features"], ours, batch["grid"])
            return {"pooled": pooled, "norm": norm.apply(params["norm"], pooled, ours.norm)}

        config.vision_config.image_size, config.vision_config.patch_size, config.mm_tokens_per_image = 9, 1, 9
        model, table = Gemma3MultiModalProjector(config), connectors.gemma3(ours, "")
        shapes, side = [(6, 6), (3, 3), (9, 9)], 1 if raster else 3
        compare_with(compare, model, call, pool, ours, table, shapes, inner, places=places, side=side)


@system("LLaVA-OneVision: pooling of frames")
def onevision(compare: Compare) -> None:
    cfg = pool.Config(2, "bilinear", True, projector=mlp.Config(D, OUT))

    class Frames(nn.Module):
        apply_pooling = LlavaOnevisionModel.apply_pooling

        def __init__(self):
            super().__init__()
            self.config = sizes(LlavaOnevisionConfig)
            self.multi_modal_projector = LlavaOnevisionMultiModalProjector(self.config)

    def call(m: nn.Module, x: torch.Tensor) -> dict:
        m.config.vision_config.image_size, m.config.vision_config.patch_size = x.shape[0], 1
        projected = m.multi_modal_projector(x.reshape(1, -1, D))
        return {"projected": projected[0], "out": m.apply_pooling(projected)[0]}

    def inner(params: dict, batch: dict) -> dict:
        return {"projected": mlp.apply(params["projector"], batch["features"], cfg.projector)}

    table = [rules.Rule(f"projector/{r.ours}", r.theirs, r.layout) for r in connectors.llava(cfg.projector)]
    compare_with(compare, Frames(), call, pool, cfg, table, [(5, 5), (4, 4), (1, 1), (7, 7)], inner, places=("grid",))


class Empty(type):
    """Classes that have every attribute: an empty class."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name, (), {})


class Nothing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision, full of empty classes: timm imports it, and no part of timm used here needs it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: Empty(name, (), {})


def timm() -> tuple[type, type, type]:
    """timm's RegStage, LayerNorm and LayerNorm2d."""
    if "timm" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        finder = Nothing()
        sys.meta_path.append(finder)
        try:
            importlib.import_module("timm")
        finally:
            sys.meta_path.remove(finder)
            for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    from timm.layers import LayerNorm, LayerNorm2d
    from timm.models.regnet import RegStage

    return RegStage, LayerNorm, LayerNorm2d


class Honeybee(nn.Module):
    """The C-Abstractor, put together as khanrc/honeybee's projectors.py does it."""

    def __init__(self, cfg: abstractor.Config):
        super().__init__()
        stage, layer_norm, layer_norm_2d = timm()

        def blocks(inputs: int) -> nn.Module:
            shape = {"stride": 1, "dilation": 1, "act_layer": nn.SiLU, "norm_layer": layer_norm_2d}
            return stage(cfg.depth, inputs, cfg.width, **shape)

        self.pos_emb = nn.Parameter(torch.zeros(1, cfg.positions**2, cfg.inputs)) if cfg.positions else None
        self.eos_tokens = nn.Parameter(torch.zeros(1, cfg.eos, cfg.outputs)) if cfg.eos else None
        self.prenorm = layer_norm(cfg.inputs) if cfg.prenorm else None
        self.net = nn.Sequential(blocks(cfg.inputs), nn.AdaptiveAvgPool2d(cfg.side), blocks(cfg.width))
        parts = [nn.Linear(cfg.width, cfg.outputs)]
        for _ in range(1, cfg.readout):
            parts += [nn.SiLU(), nn.Linear(cfg.outputs, cfg.outputs)]
        self.readout = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> dict:
        rows, columns, _ = x.shape
        x = x if self.prenorm is None else self.prenorm(x)
        if self.pos_emb is not None:
            side = int(self.pos_emb.shape[1] ** 0.5)
            table = self.pos_emb.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            x = x + nn.functional.interpolate(table, (rows, columns), mode="bilinear")[0].permute(1, 2, 0)
        pooled = self.net[1](self.net[0](x.permute(2, 0, 1)[None]))
        out = self.readout(self.net[2](pooled)[0].flatten(1).T)
        out = out if self.eos_tokens is None else torch.cat([out, self.eos_tokens[0]])
        return {"pooled": pooled[0].flatten(1).T, "out": out}


@system("Honeybee: C-Abstractor")
def honeybee(compare: Compare) -> None:
    plain = abstractor.Config(D, 16, OUT, 3, depth=2)
    full = abstractor.Config(D, D, OUT, 2, depth=1, readout=3, positions=4, prenorm=True, eos=2)
    places = ("image", "order", "grid")
    for cfg in (plain, full):

        def inner(params: dict, batch: dict, cfg: abstractor.Config = cfg) -> dict:
            # With end tokens "out" has other places; then it alone is compared.
            pooled = abstractor.pooled(params, batch["features"], cfg, *(batch[n] for n in places))
            return {} if cfg.eos else {"pooled": pooled}

        shapes, table = [(4, 4), (5, 3), (1, 2), (7, 6)], connectors.honeybee(cfg, "")
        theirs = Honeybee.forward, abstractor, cfg, table, shapes
        compare_with(compare, Honeybee(cfg), *theirs, inner, places, outputs=cfg.media)


@system("WiCo, WiCo+")
def windows_of_tokens(compare: Compare) -> None:
    """torch's unfold and interpolate, called as JackYFL/WiCo's projector and decoder call them."""

    class Projector(nn.Module):
        def __init__(self, window: int):
            super().__init__()
            self.window_proj = nn.Linear(window * window * D, OUT)

    for window, stride in ((2, None), (3, 2)):
        cfg = wico.Config(D, OUT, window, stride)

        def call(m: nn.Module, x: torch.Tensor, window: int = window, stride: int = stride or window) -> dict:
            cut = x.unfold(0, window, stride).unfold(1, window, stride)
            cut = cut.reshape(cut.shape[0] * cut.shape[1], -1)
            return {"windows": cut, "out": m.window_proj(cut)}

        def inner(params: dict, batch: dict, cfg: wico.Config = cfg) -> dict:
            return {"windows": wico.windows(batch["features"], cfg, batch["grid"])}

        shapes = [(4, 4), (2, 2), (6, 8)] if stride is None else [(5, 5), (3, 4), (7, 6)]
        table, places = connectors.window(cfg, ""), () if stride is None else ("grid",)
        side = window if stride is None else 1
        compare_with(compare, Projector(window), call, wico, cfg, table, shapes, inner, places, side)

    before, media, after, times = 3, 6, 2, 4
    length, size = before + media + after, before + media * times + after
    order = jnp.arange(length, dtype=jnp.int32)[None]
    picture = jnp.where((order >= before) & (order < before + media), 0, -1)
    see = {"picture": picture, "document": 0 * order, "order": order, "lo": 0 * order, "hi": order}
    x = pictures([(1, length)])[0]
    for along in ("sequence", "channels"):

        def longer(x: torch.Tensor, along: str = along) -> torch.Tensor:
            part = x[before : before + media]
            if along == "sequence":
                part = nn.functional.interpolate(part.T[None], media * times, mode="linear", align_corners=True)[0].T
            else:
                part = nn.functional.interpolate(part[None], D * times, mode="linear", align_corners=True)
                part = part.reshape(-1, D)
            return torch.cat([x[:before], part, x[before + media :]])

        ours = wico.expand(jnp.asarray(x), times, size, along=along, **see)
        compare.value(
            f"along {along}", ours.x[0], longer(torch.from_numpy(x[0])), longer(torch.from_numpy(x[0]).double())
        )
        assert np.array_equal(ours.position[0], np.arange(size))
