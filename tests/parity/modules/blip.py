"""BLIP-2 and InstructBLIP, whole, and T5 by itself: pictures in rows of different lengths, text alone, older files."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from parity import documents
from parity.documents import VOCAB, words
from parity.harness import Compare, double, gradient_model, saved, system, twin, weights_for
from safetensors.numpy import load_file, save_file

from mmjax.convert import huggingface
from mmjax.models import encoder_decoder
from mmjax.nn.patch_embed import OPENAI
from mmjax.sequence import interleave
from mmjax.sequence.batch import Batch, Bucket, build
from mmjax.sequence.layout import IMAGE, Layout, Piece

PATCH, SIDE, QUERIES = 8, 24, 3
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = BLOCKS | {"image_size": SIDE, "patch_size": PATCH}
QFORMER = BLOCKS | {"hidden_size": 24, "num_hidden_layers": 3, "encoder_hidden_size": 32, "vocab_size": 41}
QFORMER |= {"max_position_embeddings": 8}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
OPT |= {"model_type": "opt", "vocab_size": VOCAB.size, "pad_token_id": 0, "max_position_embeddings": 32}
SEQUENCE = interleave.Config(position="sequential")


def picture(seed: int) -> tuple[documents.Part, np.ndarray]:
    """A picture of a fixed number of media tokens, and its pixels."""
    view = documents.random_view(SIDE, SIDE, seed)
    grid = (1, SIDE // PATCH, SIDE // PATCH)
    return (Piece(IMAGE, QUERIES, (), grid, media=QUERIES), documents.patchify(view, PATCH)), view


def model(name: str, text: dict) -> torch.nn.Module:
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    sizes = {"num_query_tokens": QUERIES, "image_token_index": VOCAB.image}
    return twin(cls, cls.config_class(vision_config=VISION, qformer_config=QFORMER, text_config=text, **sizes))


def pixels(views: list[np.ndarray], m: torch.nn.Module) -> torch.Tensor:
    return torch.tensor(documents.pixels(views, OPENAI), dtype=next(m.parameters()).dtype)


def blip2(c: Compare, rewrite=lambda path: path) -> None:
    (first, second, third), views = zip(*(picture(i) for i in range(3)), strict=True)
    rows = [[first, words(4, 1)], [words(2, 2), second, words(1, 5), third, words(1, 3)], [words(6, 4)]]
    given = documents.given(rows, PATCH**2 * 3, SEQUENCE)

    def call(m: torch.nn.Module) -> torch.Tensor:
        ids = {"input_ids": torch.tensor(given.ids), "attention_mask": torch.tensor(given.there.astype(np.int64))}
        return m(**ids, pixel_values=pixels(list(views), m), use_cache=False).logits

    documents.compare(c, model("Blip2", OPT), given, call, rewrite)


@system("BLIP-2, OPT")
def blip2_opt(c: Compare) -> None:
    blip2(c)


def older(path: Path) -> Path:
    """Files of before 2024: no id where pictures go, a copy of the tied table, buffers, much left out."""
    config = json.loads((path / "config.json").read_text())
    config.pop("image_token_index")
    for key in ("enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings", "activation_function"):
        config["text_config"].pop(key)
    (path / "config.json").write_text(json.dumps(config | {"use_decoder_only_language_model": True}))
    weights = load_file(path / "model.safetensors")
    weights["language_model.lm_head.weight"] = weights["language_model.model.decoder.embed_tokens.weight"]
    weights["qformer.embeddings.position_ids"] = np.arange(8)[None]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@system("BLIP-2, OPT (older files)")
def blip2_older(c: Compare) -> None:
    blip2(c, older)


LLAMA = BLOCKS | {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": VOCAB.size, "pad_token_id": 0}
SAID = (5, 1, 3)  # tokens beside each picture


@system("InstructBLIP, Llama")
def instructblip(c: Compare) -> None:
    """Several pictures in a row, each with a text of its own length that its queries read."""
    (first, second, third), views = zip(*(picture(i) for i in range(3)), strict=True)
    rows = [[first, words(4, 1)], [words(2, 2), second, words(1, 5), third, words(1, 3)], [words(6, 4)]]
    ids = np.random.default_rng(8).integers(1, 41, (3, 5)).astype(np.int32)
    there = np.arange(5)[None] < np.array(SAID)[:, None]
    said = np.where(there, ids, -1)
    sequence = dataclasses.replace(SEQUENCE, instruction=6)
    given = documents.given(rows, PATCH**2 * 3, sequence, [said[:1], said[1:], said[:0]])
    reads = {"qformer_input_ids": torch.tensor(np.where(there, ids, 0)).long()}
    reads["qformer_attention_mask"] = torch.tensor(there.astype(np.int64))

    def call(m: torch.nn.Module) -> torch.Tensor:
        own = {"input_ids": torch.tensor(given.ids), "attention_mask": torch.tensor(given.there.astype(np.int64))}
        return m(**own, **reads, pixel_values=pixels(list(views), m), use_cache=False).logits

    documents.compare(c, model("InstructBlip", LLAMA), given, call)


T5 = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB.size}
T5 |= {"model_type": "t5", "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 9}
T5 |= {"relative_attention_num_buckets": 8, "num_decoder_layers": 3, "decoder_start_token_id": 0}
PARTED = dataclasses.replace(SEQUENCE, answer=7, start=0)


@system("BLIP-2, T5")
def blip2_t5(c: Compare) -> None:
    """A head of its own; a question without a picture; an answer of one token."""
    (first, second, third), views = zip(*(picture(i) for i in range(3)), strict=True)
    rows = [[first, words(14, 1), documents.learnt(6, 2)], [second, words(1, 5), third, documents.learnt(1, 3)]]
    rows.append([words(6, 4), documents.learnt(4, 6)])
    given = documents.given(rows, PATCH**2 * 3, PARTED)
    twin = model("Blip2", T5)
    twin.language_model.config.scale_decoder_outputs = False
    twin.config.text_config.scale_decoder_outputs = False
    table = twin.language_model.lm_head.weight
    twin.language_model.lm_head.weight = torch.nn.Parameter(table.detach().flip(0).clone())

    def call(m: torch.nn.Module) -> torch.Tensor:
        own = {"input_ids": torch.tensor(given.ids), "attention_mask": torch.tensor(given.there.astype(np.int64))}
        answer = torch.tensor(given.batch.answer.tokens).long()
        return m(**own, pixel_values=pixels(list(views), m), decoder_input_ids=answer, use_cache=False).logits

    documents.compare(c, twin, given, call)


@system("T5")
def t5(c: Compare) -> None:
    """The first T5: ReLU, a scaled head that is the token table; two documents in a row are each as it is alone."""
    cls = transformers.T5ForConditionalGeneration
    twin_of = twin(cls, cls.config_class(**T5 | {"feed_forward_proj": "relu"}))
    rows = [[words(14, 1), documents.learnt(5, 2)], [words(1, 3), documents.learnt(7, 4)]]
    given = documents.given(rows, 3, PARTED)
    loaded = huggingface.load(saved(twin_of))
    batch = given.batch.answer
    there, ids = batch.order >= 0, torch.tensor(given.ids)
    mask = torch.tensor(given.there.astype(np.int64))
    weight = weights_for((*there.shape, VOCAB.size)) * there[..., None]
    examples = [
        interleave.interleave(Layout.of(str(i), tuple(p for p, _ in r), True), VOCAB, PARTED)
        for i, r in enumerate(rows)
    ]
    packed = build([[(x, []) for x in examples]], Bucket(1, 17, 0, 0, answers=12), 3, VOCAB, PARTED)

    def ours(params: dict, batch: Batch) -> jax.Array:
        x = encoder_decoder.embed(params, jnp.asarray(batch.tokens), loaded.cfg)
        see = {"order": batch.order, "lo": batch.lo, "hi": batch.hi}
        hidden = encoder_decoder.apply(params, x, loaded.cfg, batch.answer, **see)
        return encoder_decoder.logits(params, hidden, loaded.cfg)

    def loss(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        out = ours(params, batch)
        return (out * jnp.asarray(weight, jnp.float32)).sum(), out

    def theirs(m: torch.nn.Module) -> torch.Tensor:
        return m(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.tensor(batch.tokens).long()).logits

    placed = jax.tree.map(jnp.asarray, given.batch)
    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(loaded.params, placed)
    with torch.no_grad():
        single, exact = (theirs(m).numpy() for m in (twin_of, double(twin_of)))
    c.value("logits", np.asarray(out)[there], single[there], exact[there])
    together = np.asarray(jax.jit(ours)(loaded.params, jax.tree.map(jnp.asarray, packed)))
    c.value("packed", together[0, :12], single[there], exact[there])
    slopes = gradient_model(twin_of, lambda m: (theirs(m) * torch.tensor(weight)).sum())
    c.gradients(gradient, huggingface.load(saved(slopes)).params)
