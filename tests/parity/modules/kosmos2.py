"""Kosmos-2, whole: a picture before the text of each document, or text alone, tied and not."""

import numpy as np
import torch
from parity import documents
from parity.documents import VOCAB, words
from parity.harness import Compare, system, twin
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration
from transformers.models.kosmos2 import modeling_kosmos2

from mmjax.nn.patch_embed import OPENAI
from mmjax.sequence import interleave
from mmjax.sequence.layout import IMAGE, Piece

PATCH, SIDE, LATENTS = 8, 24, 5
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": SIDE, "patch_size": PATCH}
TEXT = {"embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 48, "vocab_size": VOCAB.size}


def causal(shape: torch.Size, dtype: torch.dtype, device: torch.device, past_key_values_length: int = 0):
    """The reference's own mask, which it cannot make in float64."""
    n = shape[1]
    return torch.full((n, n), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None].expand(shape[0], 1, n, n)


modeling_kosmos2._make_causal_mask = causal


def picture(seed: int) -> tuple[documents.Part, np.ndarray]:
    view = documents.random_view(SIDE, SIDE, seed)
    grid = (1, SIDE // PATCH, SIDE // PATCH)
    return (Piece(IMAGE, LATENTS, (), grid, media=LATENTS), documents.patchify(view, PATCH)), view


def kosmos2(c: Compare, tied: bool, **text) -> None:
    (first, one), (second, two) = picture(1), picture(2)
    rows = [[words(1, 0), first, words(4, 1)], [words(1, 2), second, words(2, 2)], [words(6, 4)]]
    # Padding has the id 1: what is not padding is counted by it.
    given = documents.given(rows, PATCH**2 * 3, interleave.Config(position="sequential"), pad=1, begin=0)
    ids = np.where(given.there, given.ids, 1)
    shows = (given.batch.slot >= 0)[:, : ids.shape[1]]
    config = Kosmos2Config(
        vision_config=VISION,
        text_config=TEXT | {"tie_word_embeddings": tied} | text,
        latent_query_num=LATENTS,
        tie_word_embeddings=tied,
    )

    def call(m: torch.nn.Module) -> torch.Tensor:
        pixels = torch.tensor(documents.pixels([one, two], OPENAI), dtype=next(m.parameters()).dtype)
        # Text alone is no input of the whole.
        text = m.text_model(
            input_ids=torch.tensor(ids[2:]),
            attention_mask=torch.tensor(given.there[2:].astype(np.int64)),
            use_cache=False,
        )
        seen = m(
            pixel_values=pixels,
            input_ids=torch.tensor(ids[:2]),
            attention_mask=torch.tensor(given.there[:2].astype(np.int64)),
            image_embeds_position_mask=torch.tensor(shows[:2].astype(np.int64)),
            use_cache=False,
        )
        return torch.cat([seen.logits, text.logits])

    documents.compare(c, twin(Kosmos2ForConditionalGeneration, config), given, call)


@system("Kosmos-2")
def kosmos2_tied(c: Compare) -> None:
    kosmos2(c, True)


@system("Kosmos-2, untied, tokens not scaled")
def kosmos2_untied(c: Compare) -> None:
    kosmos2(c, False, scale_embedding=False, activation_function="relu")
