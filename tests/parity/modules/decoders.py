"""Text decoders, whole: logits of rows of different lengths, and gradients by every parameter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from parity.harness import Compare, double, gradient_model, saved, system, twin, weights_for
from safetensors.numpy import load_file, save_file

from mmjax.convert import huggingface
from mmjax.models import decoder
from mmjax.sequence import intervals, positions

LENGTHS = (13, 9, 4)
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0}
Change = Callable[[dict], dict]


def rows(lengths: tuple[int, ...], vocab: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random ids, right-padded, and where they are."""
    there = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    ids = np.random.default_rng(seed).integers(1, vocab, there.shape)
    return np.where(there, ids, 0), there


def theirs(model: torch.nn.Module, ids: np.ndarray, there: np.ndarray) -> torch.Tensor:
    """Row by row: there, padding that a window does not reach is NaN, and spreads."""
    rows = [torch.tensor(row[own][None]) for row, own in zip(ids, there, strict=True)]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])


def ours(params: dict, cfg: decoder.Config, ids: np.ndarray, there: np.ndarray) -> jax.Array:
    lo, hi = intervals.causal(ids.shape[1])
    order = np.where(there, np.arange(ids.shape[1]), -1)
    see = {"order": order, "lo": np.where(there, lo, 0), "hi": np.where(there, hi, -1)}
    see = {k: jnp.asarray(v, jnp.int32) for k, v in see.items()}
    see["position"] = jnp.asarray(order.clip(0)[..., None], jnp.int32)
    if cfg.blocks.rope is not None and cfg.blocks.rope.needs_length:
        see["length"] = positions.lengths(jnp.where(see["order"] < 0, -1, 0), see["position"])
    x = decoder.apply(params, decoder.embed(params, jnp.asarray(ids, jnp.int32), cfg), cfg, **see)
    return decoder.logits(params, x, cfg)


def rewritten(path: Path, change: Change | None) -> Path:
    """A directory whose config.json is as `change` makes it."""
    if change is bare:
        weights = load_file(path / "model.safetensors")
        named = {key.removeprefix("model."): x for key, x in weights.items()}
        save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    if change is not None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(change(config)))
    return path


def hub(config: dict) -> dict:
    """config.json as older versions wrote it, and most hub files are."""
    given = dict(config.pop("rope_parameters"))
    config["rope_theta"] = given.pop("rope_theta")
    kind = given.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type" if kind == "linear" else "rope_type": kind, **given}
    config["torch_dtype"] = config.pop("dtype")
    return {k: v for k, v in config.items() if k not in ("head_dim", "layer_types", "attention_bias", "mlp_bias")}


def compare(
    c: Compare,
    name: str,
    change: Change | None = None,
    lengths: tuple[int, ...] = LENGTHS,
    shard: str = "1GB",
    **more: Any,
) -> None:
    cls = getattr(transformers, f"{name}ForCausalLM")
    model = twin(cls, cls.config_class(**SIZES | more))
    loaded = huggingface.load(rewritten(saved(model, max_shard_size=shard), change))
    assert loaded.of is decoder
    ids, there = rows(lengths, SIZES["vocab_size"])
    weight = weights_for((*ids.shape, SIZES["vocab_size"])) * there[..., None]

    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
        out = ours(params, loaded.cfg, ids, there)
        return (out * jnp.asarray(weight, jnp.float32)).sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(loaded.params)
    with torch.no_grad():
        single, exact = (theirs(m, ids, there).numpy() for m in (model, double(model)))
    c.value("logits", np.asarray(out)[there], single, exact)
    slopes = gradient_model(model, lambda m: (theirs(m, ids, there) * torch.tensor(weight[there])).sum())
    expected = huggingface.load(rewritten(saved(slopes), change)).params
    c.gradients(gradient, expected)


def llama3(original: int = 16) -> dict:
    kind = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_parameters": kind | {"original_max_position_embeddings": original}}


@system("Llama 2")
def llama2(c: Compare) -> None:
    compare(c, "Llama", hub, num_key_value_heads=4)


@system("Llama 3.1")
def llama31(c: Compare) -> None:
    compare(c, "Llama", **llama3(), attention_bias=True, mlp_bias=True)


@system("Llama 3.2 (tied, hub files)")
def llama32(c: Compare) -> None:
    compare(c, "Llama", hub, shard="10KB", tie_word_embeddings=True, **llama3())


@system("Llama, linear")
def linear(c: Compare) -> None:
    compare(c, "Llama", hub, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0})


@system("Llama, dynamic")
def dynamic(c: Compare) -> None:
    # transformers takes the length of the longest row for all of them.
    kind = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    compare(c, "Llama", hub, (12, 12), max_position_embeddings=8, rope_parameters=kind)


@system("Llama, LongRoPE")
def longrope(c: Compare) -> None:
    kind = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "factor": 4.0}
    kind |= {"long_factor": [1.5, 2.0, 3.0, 4.0], "original_max_position_embeddings": 8}
    compare(c, "Llama", None, (12, 12), rope_parameters=kind)


@system("Mistral")
def mistral(c: Compare) -> None:
    compare(c, "Mistral", hub, sliding_window=5)


@system("Qwen2")
def qwen2(c: Compare) -> None:
    compare(c, "Qwen2", hub, tie_word_embeddings=True)


@system("Qwen2.5, YaRN")
def qwen25(c: Compare) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
    compare(c, "Qwen2", rope_parameters=yarn)


@system("Qwen2.5, sliding windows")
def qwen25_windows(c: Compare) -> None:
    compare(c, "Qwen2", hub, use_sliding_window=True, sliding_window=4, max_window_layers=1)


@system("Qwen3")
def qwen3(c: Compare) -> None:
    compare(c, "Qwen3", head_dim=16)


@system("Gemma")
def gemma(c: Compare) -> None:
    compare(c, "Gemma", lambda config: hub(config) | {"hidden_act": "gelu", "head_dim": 16}, head_dim=16)


@system("Gemma 2")
def gemma2(c: Compare) -> None:
    more = {"head_dim": 16, "query_pre_attn_scalar": 24, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0}
    compare(c, "Gemma2", lambda config: hub(config) | {"head_dim": 16}, sliding_window=4, **more)


def gemma3_hub(config: dict) -> dict:
    """As google/gemma-3-1b-it has it."""
    given = config.pop("rope_parameters")
    config["rope_theta"] = given["full_attention"].pop("rope_theta")
    config["rope_local_base_freq"] = given["sliding_attention"]["rope_theta"]
    config["rope_scaling"] = given["full_attention"]
    config["sliding_window_pattern"] = 3
    return {k: v for k, v in config.items() if k != "layer_types"}


GEMMA3 = {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}
GEMMA3 |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
GEMMA3["rope_parameters"] = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}


@system("Gemma 3")
def gemma3(c: Compare) -> None:
    compare(c, "Gemma3", None, **GEMMA3)


@system("Gemma 3 (hub files)")
def gemma3_hub_files(c: Compare) -> None:
    compare(c, "Gemma3", gemma3_hub, **GEMMA3)


def bare(config: dict) -> dict:
    """As Meta's directories have it, whose tensors are those of OPTModel."""
    return {k: v for k, v in config.items() if k not in ("enable_bias", "layer_norm_elementwise_affine")}


OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 13}


@system("OPT")
def opt(c: Compare) -> None:
    compare(c, "OPT", **OPT, tie_word_embeddings=False)


@system("OPT (hub files)")
def opt_hub(c: Compare) -> None:
    compare(c, "OPT", bare, **OPT)
