"""Q-Formers of BLIP-2 and InstructBLIP: every layer, all three patterns, the first stage's heads."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf
from parity.harness import Compare, double, gradient_model, numpy, saved, state, system, twin, weights_for

from mmjax.connectors import qformer, qformer_heads
from mmjax.convert import huggingface
from mmjax.convert.families import qformer as table
from mmjax.convert.rules import Arrays, Rule, load

Tensors = dict[str, torch.Tensor]
QUERIES, WIDTH, INPUTS, CONTRAST, VOCAB = 3, 24, 20, 10, 41
FEATURES, TEXTS = (5, 17, 8), (3, 1, 7)  # of three pictures and their texts
ROOM = (24, 8, 3)  # features, tokens and pictures in a row
PACKED, ALONE = ((0, 1), (2,), ()), ((0,), (1,), (2,))
OTHERS = {r"(vision_model|language_model)\..*": "other parts of the model"} | table.DROPPED
VISION = {
    "hidden_size": INPUTS,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
}
QFORMER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "vocab_size": VOCAB,
    "max_position_embeddings": 11,
    "encoder_hidden_size": INPUTS,
}
LANGUAGE = {
    "model_type": "opt",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 16,
    "vocab_size": 30,
    "word_embed_proj_dim": 16,
}


@dataclass(frozen=True)
class Case:
    """reference: (model, features [1, P, D], ids [1, T]) → its tensors, "hidden 0" … [1, Q + T, W] and others.

    ours: (params, packed row) → the same names; hidden ones are [layers + 1, B, M + T, W] in "hidden".
    """

    model: torch.nn.Module
    spec: dict
    rules: list[Rule]
    reference: Callable[[Any, torch.Tensor, torch.Tensor], Tensors]
    ours: Callable[[dict, dict], dict[str, jax.Array]]


def material() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(3)
    features = [rng.normal(size=(p, INPUTS)).astype(np.float32) for p in FEATURES]
    return features, [rng.integers(1, VOCAB, t) for t in TEXTS]


def places(counts: list[list[int]], room: int) -> dict[str, np.ndarray]:
    """Which picture each slot of the rows belongs to, and its label."""
    out = np.full((2, len(counts), room), -1, np.int32)
    for r, row in enumerate(counts):
        out[0, r, : sum(row)] = np.repeat(np.arange(len(row)), row)
        out[1, r, : sum(row)] = np.arange(sum(row))
    return dict(zip(("image", "order"), out, strict=True))


def pack(rows: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    """Three rows of the same shape, however many pictures each has, with room to spare."""
    features, texts = material()
    patches, words = ([[sizes[i] for i in row] for row in rows] for sizes in (FEATURES, TEXTS))
    filled, grid = np.full((3, ROOM[0], INPUTS), 7, np.float32), np.zeros((3, ROOM[2], 3), np.int32)
    tokens = np.zeros((3, ROOM[1]), np.int32)
    for r, row in enumerate(rows):
        for k, i in enumerate(row):
            start, at = sum(patches[r][:k]), sum(words[r][:k])
            filled[r, start : start + FEATURES[i]], tokens[r, at : at + TEXTS[i]] = features[i], texts[i]
            grid[r, k] = 1, 1, FEATURES[i]
    text = qformer.Text(tokens=tokens, **places(words, ROOM[1]))
    return jax.tree.map(jnp.asarray, {"features": filled, "grid": grid, "text": text} | places(patches, ROOM[0]))


def pick(found: dict[str, Any], rows: tuple[tuple[int, ...], ...], i: int) -> dict[str, Any]:
    """What belongs to picture i, as the reference has it."""
    r, number = next((r, row.index(i)) for r, row in enumerate(rows) if i in row)
    start = sum(TEXTS[j] for j in rows[r][:number])
    queries, text = slice(number * QUERIES, (number + 1) * QUERIES), slice(start, start + TEXTS[i])
    m = ROOM[2] * QUERIES
    out = {}
    for name, x in found.items():
        if name == "hidden":
            x = x[:, r]
            with_text = x.shape[1] > m
            parts = [x[:, queries]] + ([x[:, m + text.start : m + text.stop]] if with_text else [])
            out |= {f"hidden {k}": layer[None] for k, layer in enumerate(jnp.concatenate(parts, 1))}
        elif name in ("match", "of text"):
            out[name] = x[r, number][None]
        else:
            out[name] = x[r, text if name == "language" else queries][None]
    return out


def compare(c: Compare, case: Case) -> None:
    def tree(model: torch.nn.Module) -> dict:
        return load(case.spec, case.rules, Arrays(state(model)), drop=OTHERS)

    params, wide = tree(case.model), double(case.model)
    inputs = [(torch.tensor(f)[None], torch.tensor(t)[None]) for f, t in zip(*material(), strict=True)]
    with torch.no_grad():
        single = [case.reference(case.model, f, t) for f, t in inputs]
        truth = [case.reference(wide, f.double(), t) for f, t in inputs]
    last = max((name for name in truth[0] if name.startswith("hidden")), key=lambda name: int(name.split()[1]))
    counted = [name for name in truth[0] if name == last or not name.startswith("hidden")]
    weights = [{k: weights_for(x[k].shape, 9 * i + len(k)) for k in counted} for i, x in enumerate(truth)]

    ours = jax.jit(case.ours)
    for rows, name in ((PACKED, "packed"), (ALONE, "alone")):
        found = ours(params, pack(rows))
        for i in range(3):
            mine = pick(found, rows, i)
            assert mine.keys() == truth[i].keys(), mine.keys() ^ truth[i].keys()
            for k, x in mine.items():
                c.value(f"{name} {i}: {k}", x, single[i][k], truth[i][k])

    def loss(params: dict) -> jax.Array:
        found = case.ours(params, pack(PACKED))
        mine = [pick(found, PACKED, i) for i in range(3)]
        return sum((x[k] * jnp.asarray(w[k], jnp.float32)).sum() for x, w in zip(mine, weights, strict=True) for k in w)

    def theirs(model: torch.nn.Module) -> torch.Tensor:
        found = [case.reference(model, f.double(), t) for f, t in inputs]
        return sum((x[k] * torch.tensor(w[k])).sum() for x, w in zip(found, weights, strict=True) for k in w)

    c.gradients(numpy(jax.jit(jax.grad(loss))(params)), numpy(tree(gradient_model(case.model, theirs))))


def hidden(modules: list[torch.nn.Module], call: Callable[[], Any]) -> list[torch.Tensor]:
    """What these put out while call() runs."""
    out: list[torch.Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _m, _i, y: out.append(y[0] if isinstance(y, tuple) else y)) for m in modules
    ]
    call()
    for h in hooks:
        h.remove()
    return out


def named(layers: list[torch.Tensor]) -> Tensors:
    return {f"hidden {i}": x for i, x in enumerate(layers)}


def joined(queries: list[torch.Tensor], text: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(pair, 1) for pair in zip(queries, text, strict=True)]


def nest(
    cfg: qformer.Config, rules: list[Rule], heads: qformer_heads.Config, more: list[Rule]
) -> tuple[dict, list[Rule]]:
    spec = {"qformer": qformer.spec(cfg), "heads": qformer_heads.spec(heads)}
    return spec, [replace(r, ours=f"qformer/{r.ours}") for r in rules] + [
        replace(r, ours=f"heads/{r.ours}") for r in more
    ]


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def encode(params: dict, row: dict, cfg: qformer.Config, pattern: str) -> qformer.Encoded:
    media = {k: row[k] for k in ("image", "order", "grid")}
    text = row["text"] if cfg.vocab else None
    return qformer.encode(params, row["features"], cfg, **media, text=text, pattern=pattern, intermediates=True)


# ---------------------------------------------------------------------------------------------- transformers


def modules_of(q: torch.nn.Module) -> list[torch.nn.Module]:
    first = q.layernorm if hasattr(q, "layernorm") else q.embeddings
    return [first, *q.encoder.layer]


def for_generation(cls: type, config: type, kind: str, **changes: Any) -> Case:
    """Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration: media tokens, projected."""
    raw = QFORMER | changes
    model = twin(cls, config(vision_config=VISION, qformer_config=raw, text_config=LANGUAGE, num_query_tokens=QUERIES))
    words = kind == "instructblip"
    cfg = table.config(model.config.qformer_config.to_dict(), queries=QUERIES, outputs=16, words=words)

    def reference(model: Any, features: torch.Tensor, ids: torch.Tensor) -> Tensors:
        kwargs = {"query_embeds": model.query_tokens, "encoder_hidden_states": features}
        kwargs |= {"input_ids": ids} if words else {}
        layers = hidden(modules_of(model.qformer), lambda: model.qformer(**kwargs))
        return named(layers) | {"projected": model.language_projection(layers[-1][:, :QUERIES])}

    def ours(params: dict, row: dict) -> dict[str, jax.Array]:
        found = encode(params, row, cfg, "matching")
        return {"hidden": found.hidden, "projected": qformer.project(params, found.queries, cfg)}

    return Case(model, qformer.spec(cfg), table.rules(cfg, family=kind), reference, ours)


@system("BLIP-2 Q-Former")
def blip2(c: Compare) -> None:
    compare(c, for_generation(hf.Blip2ForConditionalGeneration, hf.Blip2Config, "blip_2"))


@system("BLIP-2 Q-Former, five layers of which each third looks")
def rest(c: Compare) -> None:
    changes = {"num_hidden_layers": 5, "cross_attention_frequency": 3, "hidden_act": "gelu_new"}
    compare(c, for_generation(hf.Blip2ForConditionalGeneration, hf.Blip2Config, "blip_2", **changes))


@system("BLIP-2 Q-Former, all layers look")
def all_look(c: Compare) -> None:
    changes = {"num_hidden_layers": 2, "cross_attention_frequency": 1}
    compare(c, for_generation(hf.Blip2ForConditionalGeneration, hf.Blip2Config, "blip_2", **changes))


@system("InstructBLIP Q-Former")
def instructblip(c: Compare) -> None:
    compare(c, for_generation(hf.InstructBlipForConditionalGeneration, hf.InstructBlipConfig, "instructblip"))


def retrieval() -> torch.nn.Module:
    config = hf.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER | {"use_qformer_text_input": True},
        text_config=LANGUAGE,
        num_query_tokens=QUERIES,
        image_text_hidden_size=CONTRAST,
    )
    return twin(hf.Blip2ForImageTextRetrieval, config)


def for_retrieval(pattern: str) -> Case:
    """Blip2ForImageTextRetrieval: queries and text apart, mixed, and, by a dense mask, text that sees its past."""
    model = retrieval()
    cfg = table.config(model.config.qformer_config.to_dict(), queries=QUERIES, words=True)
    heads = qformer_heads.Config(WIDTH, CONTRAST)

    def reference(model: Any, features: torch.Tensor, ids: torch.Tensor) -> Tensors:
        def layers(x: torch.Tensor, count: int, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
            see = {"query_length": count, "attention_mask": mask, "encoder_hidden_states": features}
            return hidden(modules_of(model.qformer), lambda: model.qformer(query_embeds=x, **see))

        queries, text = model.query_tokens, model.embeddings(input_ids=ids)
        if pattern == "contrastive":
            all_layers = joined(layers(queries, QUERIES), layers(text, 0))
            vision = unit(model.vision_projection(all_layers[-1][:, :QUERIES]))
            return named(all_layers) | {
                "vision": vision,
                "of text": unit(model.text_projection(all_layers[-1][:, QUERIES])),
            }
        both = model.embeddings(input_ids=ids, query_embeds=queries)
        if pattern == "matching":
            found = layers(both, QUERIES)
            return named(found) | {"match": model.itm_head(found[-1][:, :QUERIES]).mean(1)}
        size = both.shape[1]
        seen = torch.ones(size, size, dtype=torch.bool).tril()
        seen[:QUERIES] = torch.arange(size) < QUERIES
        seen[QUERIES:, :QUERIES] = True
        dense = torch.where(seen, 0.0, -torch.inf)[None, None].to(features.dtype)
        return named(layers(both, QUERIES, dense))

    def ours(params: dict, row: dict) -> dict[str, jax.Array]:
        found = encode(params["qformer"], row, cfg, pattern)
        out, n = {"hidden": found.hidden}, row["grid"].shape[1]
        if pattern == "contrastive":
            at = qformer_heads.first(row["text"], n)
            out["vision"] = qformer_heads.contrast_vision(params["heads"], found.queries, heads)
            out["of text"] = qformer_heads.contrast_text(params["heads"], found.text, heads, at=at)
        if pattern == "matching":
            out["match"] = qformer_heads.match(params["heads"], found.queries, heads, pictures=n)
        return out

    return Case(model, *nest(cfg, table.rules(cfg), heads, table.heads(heads)), reference, ours)


@system("BLIP-2 Q-Former, contrastive")
def contrastive(c: Compare) -> None:
    compare(c, for_retrieval("contrastive"))


@system("BLIP-2 Q-Former, matching")
def matching(c: Compare) -> None:
    compare(c, for_retrieval("matching"))


@system("BLIP-2 Q-Former, generation by a dense mask")
def generation(c: Compare) -> None:
    compare(c, for_retrieval("generation"))


@system("BLIP-2 image-text retrieval, whole")
def whole(c: Compare) -> None:
    """From the features of its own tower to both kinds of logits, with texts as their own batch and padding."""
    case = for_retrieval("matching")
    params = load(case.spec, case.rules, Arrays(state(case.model)), drop=OTHERS)
    cfg = table.config(case.model.config.qformer_config.to_dict(), queries=QUERIES, words=True)
    heads = qformer_heads.Config(WIDTH, CONTRAST)
    pixels = torch.tensor(np.random.default_rng(1).normal(size=(3, 3, 32, 32)), dtype=torch.float32)
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for i, t in enumerate(material()[1]):
        ids[i, : len(t)], mask[i, : len(t)] = torch.tensor(t), 1
    order = jnp.asarray(np.where(mask.numpy() > 0, np.arange(8), -1), jnp.int32)
    text = qformer.Text(jnp.asarray(ids.numpy(), jnp.int32), jnp.zeros((3, 8), jnp.int32), order)

    def theirs(model: Any, match: bool) -> torch.Tensor:
        see = {"input_ids": ids, "attention_mask": mask, "use_image_text_matching_head": match}
        return model(pixel_values=pixels.to(model.query_tokens.dtype), **see).logits_per_image

    with torch.no_grad():
        features = jnp.asarray(case.model.vision_model(pixels).last_hidden_state.numpy())
        single = [theirs(case.model, m) for m in (False, True)]
        truth = [theirs(double(case.model), m) for m in (False, True)]
    p = features.shape[1]
    media = {
        "image": jnp.zeros((3, p), jnp.int32),
        "order": jnp.repeat(jnp.arange(p, dtype=jnp.int32)[None], 3, axis=0),
        "grid": jnp.asarray(np.array([[[1, 4, 4]]] * 3, np.int32)),  # and a class token besides
    }

    @jax.jit
    def ours(params: dict) -> tuple[jax.Array, jax.Array]:
        apart = qformer.encode(params["qformer"], features, cfg, **media)
        texts = qformer.encode_text(params["qformer"], text, cfg, pictures=1).text
        vision = qformer_heads.contrast_vision(params["heads"], apart.queries, heads)
        of_text = qformer_heads.contrast_text(params["heads"], texts, heads, at=qformer_heads.first(text, 1))[:, 0]
        mixed = qformer.encode(params["qformer"], features, cfg, **media, text=text).queries
        match = qformer_heads.match(params["heads"], mixed, heads, pictures=1)[:, 0]
        return jnp.einsum("bmd,td->bmt", vision, of_text).max(1), match

    itc, itm = ours(params)
    c.value("ITC logits", itc, single[0], truth[0])
    c.value("ITM logits", itm, single[1], truth[1])


@system("Q-Former directories")
def directories(c: Compare) -> None:
    """As `save_pretrained` writes them and `huggingface.save` writes them again; queries are handed over."""
    features, texts = material()
    given = np.random.default_rng(5).normal(size=(QUERIES, WIDTH)).astype(np.float32)
    for cls, config, text in (
        (hf.Blip2QFormerModel, hf.Blip2QFormerConfig(**QFORMER), None),
        (hf.Blip2QFormerModel, hf.Blip2QFormerConfig(**QFORMER, use_qformer_text_input=True), "embedded"),
        (hf.InstructBlipQFormerModel, hf.InstructBlipQFormerConfig(**QFORMER), "ids"),
    ):
        model = twin(cls, config)
        found = huggingface.load(saved(model))
        again = saved(model) / "again"
        huggingface.save(again, found)
        assert (again / "model.safetensors").read_bytes() == (again.parent / "model.safetensors").read_bytes()
        f, t = torch.tensor(features[1])[None], torch.tensor(texts[2])[None]
        words = torch.randn(1, t.shape[1], WIDTH, generator=torch.Generator().manual_seed(2))

        def call(model: Any, f=f, t=t, words=words, text=text) -> torch.Tensor:
            queries = torch.tensor(given)[None].to(f.dtype)
            if text == "ids":
                return model(input_ids=t, query_embeds=queries, encoder_hidden_states=f).last_hidden_state
            x = queries if text is None else torch.cat([queries, words.to(f.dtype)], 1)
            return model(query_embeds=x, query_length=QUERIES, encoder_hidden_states=f).last_hidden_state

        with torch.no_grad():
            single, truth = call(model), call(double(model), f.double())
        flat = jnp.zeros((1, t.shape[1]), jnp.int32)
        tokens = jnp.asarray(t.numpy() if text == "ids" else words.numpy())
        tokens = tokens.astype(jnp.int32) if text == "ids" else tokens
        ours = jax.jit(qformer.encode, static_argnums=2)(
            found.params,
            jnp.asarray(features[1])[None],
            found.cfg,
            image=jnp.zeros((1, FEATURES[1]), jnp.int32),
            order=jnp.arange(FEATURES[1], dtype=jnp.int32)[None],
            grid=jnp.asarray([[[1, 1, FEATURES[1]]]], jnp.int32),
            text=None if text is None else qformer.Text(tokens, flat, jnp.arange(t.shape[1], dtype=jnp.int32)[None]),
            queries=jnp.asarray(given),
        )
        parts = [ours.queries] + ([] if text is None else [ours.text])
        c.value(f"{cls.__name__}, text {text}", jnp.concatenate(parts, 1), single, truth)
