"""Resamplers: OpenFlamingo and flamingo-pytorch with embeddings of frames and numbers, Idefics, Idefics2."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flamingo_pytorch.flamingo_pytorch import PerceiverResampler as FlamingoPytorch
from parity.harness import Compare, double, gradient_model, randomise, run, state, system, weights_for
from torch import nn
from transformers import Idefics2Config, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from mmjax.connectors import perceiver
from mmjax.convert import rules
from mmjax.convert.families import perceiver as tables
from mmjax.nn import norm
from mmjax.sequence import behind

D = 24
GRIDS = [(2, 3, 5), (1, 1, 1), (3, 4, 2)]


def pack(clips: list[np.ndarray], numbers: list[int]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One row of some of them, always of one shape: noise in empty places, and pictures that are not there."""
    flat = [x.reshape(-1, x.shape[-1]) for x in clips]
    count, none = [len(x) for x in flat], len(GRIDS) + 1 - len(clips)
    spare = sum(map(math.prod, GRIDS)) + 5 - sum(count)
    noise = np.random.default_rng(4).normal(size=(spare, flat[0].shape[-1])).astype(np.float32)
    image = [*np.repeat(np.arange(len(clips)), count), *[-1] * spare]
    places = {
        "image": jnp.asarray([image], jnp.int32),
        "order": jnp.asarray([[*range(sum(count)), *[-1] * spare]], jnp.int32),
        "grid": jnp.asarray([[x.shape[:3] for x in clips] + [(0, 0, 0)] * none], jnp.int32),
        "number": jnp.asarray([[*numbers, *[0] * none]], jnp.int32),
    }
    return jnp.asarray(np.concatenate([*flat, noise])[None]), places


def compare_with(
    compare: Compare,
    model: nn.Module,
    cfg: perceiver.Config,
    table: list[rules.Rule],
    call: Callable[[nn.Module, torch.Tensor, int], torch.Tensor],
    watch: dict[str, str],
    numbers: tuple[int, ...] = (0, 0, 0),
) -> None:
    """call: (model, clip [frames, rows, columns, D], its number) → [latents, D]. watch: the modules of intermediates.

    Those are "prepared" (what the layers look at), "attention i" and "mlp i" of every layer.
    """
    model = randomise(model.float().eval())
    wide, spec = double(model), perceiver.spec(cfg)
    params = rules.load(spec, table, rules.Arrays(state(model)))
    rng = np.random.default_rng(3)
    clips = [(1.5 * rng.normal(size=(*grid, cfg.inputs)) + 0.3).astype(np.float32) for grid in GRIDS]

    @jax.jit
    def ours(params: dict, features: jax.Array, places: dict) -> dict[str, jax.Array]:
        out = {"out": perceiver.apply(params, features, cfg, **places)}
        prepared = perceiver.prepare(params, features, cfg, **places)
        out["prepared"] = norm.apply(jax.tree.map(lambda p: p[0], params["layers"]["feature_norm"]), prepared, cfg.norm)
        keys, lo, hi = behind.labels(*(places[n] for n in ("image", "order", "grid")), cfg.latents)
        x = behind.start(params["latents"], prepared, places["grid"].shape[1])
        for i in range(cfg.layers):
            p = jax.tree.map(lambda a, i=i: a[i], params["layers"])
            after = perceiver.layer(p, x, prepared, cfg, order=keys, lo=lo, hi=hi)
            # The MLP's branch: what the layer adds to x without it is attention's.
            still = p | {"mlp": jax.tree.map(jnp.zeros_like, p["mlp"])}
            middle = perceiver.layer(still, x, prepared, cfg, order=keys, lo=lo, hi=hi)
            out |= {f"attention {i}": middle - x, f"mlp {i}": after - middle}
            x = after
        return out

    single = [
        run(model, watch, lambda m, a=(x, n): call(m, torch.from_numpy(a[0]), a[1]))
        for x, n in zip(clips, numbers, strict=True)
    ]
    exact = [
        run(wide, watch, lambda m, a=(x, n): call(m, torch.from_numpy(a[0]).double(), a[1]))
        for x, n in zip(clips, numbers, strict=True)
    ]
    together = ours(params, *pack(clips, list(numbers)))
    stop = np.cumsum([math.prod(g) for g in GRIDS])
    for i, x in enumerate(clips):
        alone = ours(params, *pack([x], [numbers[i]]))
        assert set(exact[i]) == set(alone), set(exact[i]) ^ set(alone)
        for name, there in exact[i].items():
            if name == "prepared":
                here, first = math.prod(GRIDS[i]), int(stop[i]) - math.prod(GRIDS[i])
            else:
                here, first = cfg.latents, i * cfg.latents
            there, other = there.reshape(here, -1), single[i][name].reshape(here, -1)
            label = f"{name} of {'×'.join(map(str, GRIDS[i]))}"
            compare.value(f"{label}, packed", together[name][0, first : first + here], other, there)
            compare.value(f"{label}, alone", alone[name][0, :here], other, there)

    weights = weights_for((len(clips), cfg.latents, cfg.width))

    def loss(m: nn.Module) -> torch.Tensor:
        outs = [call(m, torch.from_numpy(x).double(), n) for x, n in zip(clips, numbers, strict=True)]
        return sum((o * torch.from_numpy(w)).sum() for o, w in zip(outs, weights, strict=True))

    theirs = rules.load(spec, table, rules.Arrays(state(gradient_model(model, loss))))
    features, places = pack(clips, list(numbers))
    w = jnp.asarray(weights.reshape(-1, cfg.width), jnp.float32)

    def ours_loss(params: dict) -> jax.Array:
        return (perceiver.apply(params, features, cfg, **places)[0, : w.shape[0]] * w).sum()

    compare.gradients(jax.jit(jax.grad(ours_loss))(params), theirs)


def watched(layers: int, feature_norm: str, attention: str, mlp: str) -> dict[str, str]:
    out = {"prepared": feature_norm}
    for i in range(layers):
        out |= {f"attention {i}": attention.format(i), f"mlp {i}": mlp.format(i)}
    return out


def helpers() -> ModuleType:
    """open_flamingo.src.helpers by its path: importing the package wants open_clip."""
    path = Path(importlib.util.find_spec("open_flamingo").origin).parent / "src" / "helpers.py"
    spec = importlib.util.spec_from_file_location("open_flamingo_helpers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FLAMINGO = watched(2, "layers.0.0.norm_media", "layers.{}.0", "layers.{}.1")


@system("OpenFlamingo: resampler")
def open_flamingo(compare: Compare) -> None:
    for frames, media in ((0, 0), (4, 3)):
        cfg = perceiver.Config(D, D, 5, 2, 3, 8, 4 * D, frames=frames, media=media)
        sizes = {"max_num_frames": frames or None, "max_num_media": media or None}
        model = helpers().PerceiverResampler(dim=D, depth=2, dim_head=8, heads=3, num_latents=5, **sizes)

        def call(m: nn.Module, x: torch.Tensor, number: int) -> torch.Tensor:
            # The class counts the pictures it gets: the table of one picture begins at its own row.
            rows = {"media_time_embs": m.media_time_embs[number:]} if m.media_time_embs is not None else {}
            return torch.func.functional_call(m, rows, (x.reshape(1, 1, x.shape[0], -1, D),))[0, 0]

        compare_with(compare, model, cfg, tables.flamingo(cfg, ""), call, FLAMINGO, (0, 2, 1) if media else (0, 0, 0))


@system("flamingo-pytorch: resampler")
def flamingo_pytorch(compare: Compare) -> None:
    cfg = perceiver.Config(D, D, 5, 2, 3, 8, 4 * D, media=4)
    model = FlamingoPytorch(dim=D, depth=2, dim_head=8, heads=3, num_latents=5, num_media_embeds=4)

    def call(m: nn.Module, x: torch.Tensor, number: int) -> torch.Tensor:
        rows = {"media_pos_emb": m.media_pos_emb[number:]}
        return torch.func.functional_call(m, rows, (x.reshape(1, 1, -1, D),))[0, 0]

    table = tables.flamingo(cfg, "", "media_pos_emb")
    compare_with(compare, model, cfg, table, call, FLAMINGO, (3, 0, 1))


@system("Idefics: resampler")
def idefics(compare: Compare) -> None:
    for normed in (True, False):
        own = {
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 3,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": normed,
        }
        config = IdeficsConfig(vision_config={"embed_dim": D}, perceiver_config=own, use_resampler=True)
        cfg = tables.idefics_config(config.to_dict())
        names = ("resampler_depth", "resampler_n_heads", "resampler_head_dim", "resampler_n_latents")
        model = IdeficsPerceiverResampler(config, D, *(own[n] for n in names))

        def call(m: nn.Module, x: torch.Tensor, _: int) -> torch.Tensor:
            return m(x.reshape(1, -1, D))[0]

        watch = watched(2, "blocks.0.0.context_layer_norm", "blocks.{}.0", "blocks.{}.1")
        compare_with(compare, model, cfg, tables.idefics(cfg, ""), call, watch)


@system("Idefics2: connector")
def idefics2(compare: Compare) -> None:
    own = {
        "hidden_size": D,
        "resampler_n_latents": 5,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 6,
        "num_key_value_heads": 2,
    }
    text = {"model_type": "mistral", "hidden_size": D, "intermediate_size": 40, "num_attention_heads": 2}
    for more in ({}, {"hidden_size": 4096, "rms_norm_eps": 1e-3}):
        config = Idefics2Config(
            vision_config={"hidden_size": 18}, text_config=text | {"rms_norm_eps": 1e-2}, perceiver_config=own | more
        )
        cfg = tables.idefics2_config(
            {
                "vision_config": {"hidden_size": 18},
                "text_config": text | {"rms_norm_eps": 1e-2},
                "perceiver_config": own | more,
            }
        )
        assert cfg.epsilon == config.perceiver_config.rms_norm_eps
        assert cfg == tables.idefics2_config(config.to_dict())
        config.perceiver_config._attn_implementation = config._attn_implementation = "eager"

        def call(m: nn.Module, x: torch.Tensor, _: int) -> torch.Tensor:
            x = x.reshape(1, -1, 18)
            return m(x, torch.ones(x.shape[:2], dtype=torch.long))[0]

        layer = "perceiver_resampler.layers.{}."
        watch = watched(2, f"{layer.format(0)}input_context_norm", f"{layer}self_attn", f"{layer}mlp")
        compare_with(compare, Idefics2Connector(config), cfg, tables.idefics2(cfg, ""), call, watch)
