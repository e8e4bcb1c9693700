"""One LLaVA twice, in transformers and in mmjax: the same weights, and batches of the same documents.

Vision tower of 4 layers, width 256, 4 heads, MLP 1,024, patch 14 (CLIP's, of 224 × 224, or Pixtral's); an MLP of two
layers; Llama of 4 layers, width 256, 4 heads, MLP 688, whose head is not tied.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import transformers as hf

from mmjax.connectors import mlp as connector
from mmjax.convert.families import blocks, clip, connectors, pixtral
from mmjax.convert.rules import Arrays, Rule, load
from mmjax.data.source import Source
from mmjax.models import decoder, vlm
from mmjax.nn import patch_embed, rope, transformer
from mmjax.sequence import interleave
from mmjax.sequence.document import Document, Image, Text
from mmjax.tokenizers.vocab import Vocab

LAYERS, WIDTH, HEADS, HIDDEN, PATCH = 4, 256, 4, 688, 14
UNUSED = "vision_tower.post_layernorm"  # LLaVA takes the patches before it
LLAMA = blocks.Names(
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)


class Numbers:
    """A tokenizer whose words are numbers."""

    def __init__(self, size: int):
        self.vocab = Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=size)

    def encode(self, text: str) -> list[int]:
        return [9 + int(word) for word in text.split()]


def document(name: str, sizes: Sequence[tuple[int, int]], words: int, vocab: int) -> Document:
    """Pictures of these sizes, a question, and an answer of about two thirds of the words, which is learnt."""
    rng = np.random.default_rng(list(name.encode()))

    def picture(height: int, width: int) -> Image:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        return Image(height, width, lambda: pixels)

    text = [str(n) for n in rng.integers(0, vocab - 9, words)]
    asked, answer = " ".join(text[: words // 3]), " ".join(text[words // 3 :])
    spans = (*(picture(*size) for size in sizes), Text(asked), Text(answer, "assistant", True))
    return Document(name, spans)


def theirs(tower: str, vocab: Vocab) -> hf.LlavaForConditionalGeneration:
    """A LLaVA with random weights, large enough that attention tells tokens apart; norms and biases too are random."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    vision = {"patch_size": PATCH, "intermediate_size": 4 * WIDTH, **sizes}
    if tower == "clip":
        seen, select = hf.CLIPVisionConfig(image_size=224, **vision), "default"
    else:
        seen, select = hf.PixtralVisionConfig(image_size=1024, hidden_act="silu", **vision), "full"
    text = hf.LlamaConfig(vocab_size=vocab.size, intermediate_size=HIDDEN, num_key_value_heads=HEADS, **sizes)
    cfg = hf.LlavaConfig(
        vision_config=seen,
        text_config=text,
        image_token_index=vocab.image,
        vision_feature_layer=-1,
        vision_feature_select_strategy=select,
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(cfg).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(WIDTH**-0.5 * torch.randn_like(p))
    return model


def ours(model: hf.LlavaForConditionalGeneration, vocab: Vocab) -> tuple[vlm.Config, dict]:
    """The same model as mmjax has it, and its parameters."""
    used = {k: v for k, v in model.state_dict().items() if UNUSED not in k}
    weights = Arrays({k: v.numpy().copy() for k, v in used.items()})
    raw, at = model.config.vision_config.to_dict(), "model.vision_tower."
    if raw["model_type"] == "clip_vision_model":
        vision = clip.configure_vision(raw, None)
        seen = [r for r in clip.vision_rules(vision, at, "") if not r.ours.startswith("head")]
        vision = dataclasses.replace(vision, head=None)
    else:
        vision = pixtral.configure(raw)
        seen = pixtral.rules(vision, at)
    vision = dataclasses.replace(vision, blocks=dataclasses.replace(vision.blocks, unroll=LAYERS))
    head = WIDTH // HEADS
    of = transformer.Config(
        WIDTH, LAYERS, HEADS, HEADS, head, HIDDEN, rope=rope.Config(head, (head // 2,)), unroll=LAYERS
    )
    cfg = vlm.Config(vision, connector.Config(WIDTH, WIDTH), decoder.Config(vocab.size, of, tied=False), vocab.image)
    at = "model.language_model."
    words = [
        *blocks.blocks(of, "blocks", f"{at}layers.{{}}.", LLAMA),
        *blocks.norm("norm", f"{at}norm", "rms"),
        Rule("embed", f"{at}embed_tokens.weight"),
        Rule("head", "lm_head.weight"),
    ]
    projector = connectors.llava(cfg.connector, "model.multi_modal_projector.")
    table = clip.prefixed("vision", seen) + clip.prefixed("connector", projector) + clip.prefixed("decoder", words)
    return cfg, load(vlm.spec(cfg), table, weights)


def collate(documents: Sequence[Document], source: Source, native: bool) -> dict[str, torch.Tensor]:
    """A batch as HF's processor and collator make it, of the same tokens as ours; `native`: with pictures' sizes."""
    examples = [interleave.interleave(source.layout(d), source.vocab, source.cfg) for d in documents]
    long = max(len(x.tokens) for x in examples)
    out = {
        "input_ids": np.full((len(examples), long), source.vocab.pad),
        "attention_mask": np.zeros((len(examples), long), np.int64),
        "labels": np.full((len(examples), long), -100),
    }
    for row, x in enumerate(examples):
        n = len(x.tokens)
        out["input_ids"][row, :n], out["attention_mask"][row, :n] = x.tokens, 1
        # Theirs names the token that is learnt, ours the one before it.
        out["labels"][row, 1:n] = np.where(x.weight > 0, x.target, -100)[: n - 1]
    pictures = [image for d in documents for image in d.images]
    if pictures:
        tall, wide = max(i.height for i in pictures), max(i.width for i in pictures)
        mean, deviation = (np.array(v, np.float32) for v in patch_embed.OPENAI)
        out["pixel_values"] = np.zeros((len(pictures), 3, tall, wide), np.float32)
        for n, image in enumerate(pictures):
            pixels = (image.source().astype(np.float32) / 255 - mean) / deviation
            out["pixel_values"][n, :, : image.height, : image.width] = pixels.transpose(2, 0, 1)
        if native:
            out["image_sizes"] = np.array([(i.height, i.width) for i in pictures])
    return {k: torch.from_numpy(v) for k, v in out.items()}
