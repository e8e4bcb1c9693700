"""CLIP, SigLIP and SigLIP 2 whole: text towers, projections, logits."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf
from parity import pictures
from parity.harness import Compare, double, gradient_model, run, saved, system, twin, weights_for
from parity.modules.towers import Tower, compare

from mmjax.convert import huggingface
from mmjax.encoders import text, vit
from mmjax.models import dual
from mmjax.sequence import intervals

VISION = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "patch_size": 8}
TEXT = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 16}
EOS, PAD = 98, 1
GRIDS = [(1, 4, 4)] * 3
LENGTHS = (7, 4, 11)  # texts, the end-of-text token included


def texts(padded: int | None = None) -> list[np.ndarray]:
    """Ids of the texts; CLIP's end with EOS, SigLIP's are padded to one length and see the padding."""
    rng = np.random.default_rng(2)
    out = [np.append(rng.integers(3, 90, n - 1), EOS) for n in LENGTHS]
    return out if padded is None else [np.pad(t, (0, padded - len(t)), constant_values=PAD) for t in out]


def rows(ids: list[np.ndarray], causal: bool) -> tuple[jax.Array, dict, jax.Array]:
    """All texts in one row with one empty place, and where each ends."""
    lengths = [len(t) for t in ids]
    lo, hi = (intervals.packed if causal else intervals.blocks)(lengths)
    total = len(lo)

    def row(x, fill):
        return jnp.asarray(np.append(x, fill)[None], jnp.int32)

    place = np.concatenate([np.arange(n) for n in lengths])
    see = {"order": row(np.arange(total), -1), "lo": row(lo, 0), "hi": row(hi, -1), "position": row(place, 0)}
    return row(np.concatenate(ids), PAD), see, jnp.asarray(np.cumsum(lengths)[None] - 1, jnp.int32)


def compare_text(
    c: Compare, name: str, params: dict, cfg: text.Config, model, ids, causal: bool, whole, root: str
) -> None:
    """Each text alone through the reference, all packed through ours. `whole` calls the model: ids → pooled vector."""
    tokens, see, at = rows(ids, causal)
    layers = cfg.blocks.layers
    hidden, taps = jax.jit(lambda p: text.apply(p, tokens, cfg, taps=tuple(range(layers)), **see))(params)
    pooled = text.pool(params, hidden, cfg, at)
    start = text.embed(params, tokens, cfg, position=see["position"])
    watch = {f"block {i}": f"{root}encoder.layers.{i}" for i in range(layers)}
    watch |= {"embedding": f"{root}embeddings", "norm": f"{root}final_layer_norm"}
    stop = 0
    for n, t in enumerate(ids):
        where, stop = slice(stop, stop + len(t)), stop + len(t)
        sides = [run(m, watch, lambda m, t=t: whole(m, torch.tensor(t[None]))) for m in (model, double(model))]
        mine = {f"block {i}": taps[i] for i in range(layers)} | {"embedding": start, "norm": hidden}
        for key, x in mine.items():
            c.value(f"{name} text {n} {key}", x[0, where], sides[0][key][0], sides[1][key][0])
        c.value(f"{name} text {n} pooled", pooled[0, n], sides[0]["out"][0], sides[1]["out"][0])


def compare_both(c: Compare, model, ids: list[np.ndarray], causal: bool, given: list, vision) -> None:
    """Text tower, pooled vectors of pictures, logits, gradients. `vision(model)` are the inputs of all pictures."""
    loaded = huggingface.load(saved(model))
    cfg, params = loaded.cfg, loaded.params
    compare_text(
        c,
        "",
        params["text"],
        cfg.text,
        model,
        ids,
        causal,
        lambda m, t: m.get_text_features(t).pooler_output,
        "text_model.",
    )
    packed = pictures.row(GRIDS)
    tokens, see, at = rows(ids, causal)

    def ours(params: dict) -> tuple[jax.Array, jax.Array]:
        images = vit.encode(params["vision"], packed.patches(given), cfg.vision, **packed.see).pooled[0, : len(GRIDS)]
        hidden, _ = text.apply(params["text"], tokens, cfg.text, **see)
        return images, dual.apply(params, images, text.pool(params["text"], hidden, cfg.text, at)[0], cfg)

    def theirs(m) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([m.get_image_features(**one).pooler_output[0] for one in vision(m)]), logits(m)

    def logits(m) -> torch.Tensor:
        inputs = vision(m)
        longest = max(map(len, ids))
        # Causal: what is behind the end changes nothing.
        several = torch.tensor(np.stack([np.pad(t, (0, longest - len(t)), constant_values=EOS) for t in ids]))
        return m(input_ids=several, **{k: torch.cat([one[k] for one in inputs]) for k in inputs[0]}).logits_per_image

    with torch.no_grad():
        single, exact = theirs(model), theirs(double(model))
    got = jax.jit(ours)(params)
    c.value("image vectors", got[0], single[0], exact[0])
    c.value("logits", got[1], single[1], exact[1])
    loss = lambda m: (logits(m) * torch.tensor(weights_for((3, 3)))).sum()  # noqa: E731
    expected = huggingface.load(saved(gradient_model(model, loss))).params
    found = jax.jit(jax.grad(lambda p: (ours(p)[1] * jnp.asarray(weights_for((3, 3)), jnp.float32)).sum()))(params)
    c.gradients(found, expected)


def _pixels(model, given: list[np.ndarray]) -> list[dict]:
    kind = next(model.parameters()).dtype
    return [{"pixel_values": torch.tensor(x, dtype=kind)} for x in given]


@system("CLIP, both towers")
def clip(c: Compare) -> None:
    words = TEXT | {"hidden_size": 32, "vocab_size": 99, "eos_token_id": EOS, "bos_token_id": 97, "pad_token_id": PAD}
    config = hf.CLIPConfig(text_config=words, vision_config=VISION | {"image_size": 32}, projection_dim=24)
    given = pictures.images(GRIDS, 8)
    cuts = [pictures.cut(x, 8) for x in given]
    compare_both(c, twin(hf.CLIPModel, config), texts(), True, cuts, lambda m: _pixels(m, given))


@system("CLIP text with projection")
def clip_text(c: Compare) -> None:
    words = TEXT | {"hidden_size": 32, "vocab_size": 99, "eos_token_id": EOS, "bos_token_id": 97, "pad_token_id": PAD}
    model = twin(hf.CLIPTextModelWithProjection, hf.CLIPTextConfig(**words, projection_dim=24, hidden_act="gelu"))
    loaded = huggingface.load(saved(model))
    args = (loaded.params, loaded.cfg, model, texts(), True, lambda m, t: m(t).text_embeds, "text_model.")
    compare_text(c, "", *args)


@system("SigLIP, both towers")
def siglip(c: Compare) -> None:
    words = TEXT | {"hidden_size": 48, "vocab_size": 99, "projection_size": 48}
    config = hf.SiglipConfig(text_config=words, vision_config=VISION | {"image_size": 32})
    given = pictures.images(GRIDS, 8)
    cuts = [pictures.cut(x, 8) for x in given]
    compare_both(c, twin(hf.SiglipModel, config), texts(16), False, cuts, lambda m: _pixels(m, given))


@system("SigLIP 2, both towers")
def siglip2(c: Compare) -> None:
    words = TEXT | {"hidden_size": 48, "vocab_size": 99, "projection_size": 48}
    config = hf.Siglip2Config(text_config=words, vision_config=VISION | {"num_patches": 9})
    cuts = [pictures.cut(x, 8) for x in pictures.images(GRIDS, 8)]

    def vision(m) -> list[dict]:
        kind = next(m.parameters()).dtype
        shape = {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64)}
        return [{"pixel_values": torch.tensor(x, dtype=kind)[None], **shape} for x in cuts]

    compare_both(c, twin(hf.Siglip2Model, config), texts(16), False, cuts, vision)


@system("CLIP vision with projection")
def clip_vision(c: Compare) -> None:
    model = twin(hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig(**VISION, image_size=32, projection_dim=24))

    def call(m, x):
        out = m(x, interpolate_pos_encoding=True)
        return {"features": out.last_hidden_state, "pooled": out.image_embeds}

    compare(c, Tower(model, call, "vision_model.encoder.layers.{}", 8, 1))


@system("CLIP vision")
def clip_vision_plain(c: Compare) -> None:
    model = twin(hf.CLIPVisionModel, hf.CLIPVisionConfig(**VISION, image_size=24, hidden_act="gelu"))

    def call(m, x):
        out = m(x, interpolate_pos_encoding=True)
        return {"features": out.last_hidden_state, "pooled": out.pooler_output}

    compare(c, Tower(model, call, "encoder.layers.{}", 8, 1))
