"""A layout as arrays: the descriptor of every token of one document, numbered from its own start."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmjax.core.errors import InputError
from mmjax.sequence import intervals, positions
from mmjax.sequence.layout import EMPTY, IMAGE, TEXT, Layout, patches_of
from mmjax.tokenizers.vocab import Vocab

See = Literal["causal", "bidirectional_images"]


@dataclass(frozen=True)
class Example:
    """One document's share of a row; see `Batch` for the fields. Labels, slots and images count from 0."""

    id: str
    tokens: np.ndarray  # i32[n]
    modality: np.ndarray  # i8[n]
    lo: np.ndarray  # i32[n]
    hi: np.ndarray  # i32[n]
    position: np.ndarray  # i32[n, 3]
    slot: np.ndarray  # i32[n]
    target: np.ndarray  # i32[n]
    weight: np.ndarray  # f32[n]
    patch_lo: np.ndarray  # i32[p]
    patch_hi: np.ndarray  # i32[p]
    patch_position: np.ndarray  # i32[p, 2]
    patch_image: np.ndarray  # i32[p]
    grid: np.ndarray  # i32[images, 3]


def interleave(layout: Layout, vocab: Vocab, see: See = "causal") -> Example:
    """The arrays of a layout.

    The target of a token is the next token; it weighs 1 where that next token is trained, else 0. Media are never
    targets.

    Raises:
      InputError: an id outside the vocabulary; a picture whose media tokens are not one per patch.
    """
    n = layout.tokens
    tokens, modality = np.empty(n, np.int32), np.full(n, EMPTY, np.int8)
    slot, train = np.full(n, -1, np.int32), np.zeros(n, bool)
    images, grids = [], []
    at = used = 0
    for piece in layout.pieces:
        span = slice(at, at + piece.length)
        modality[span] = piece.modality
        if piece.modality == TEXT:
            tokens[span], train[span] = piece.ids, piece.train
        else:
            if piece.length != patches_of(piece.grid):
                raise InputError(
                    f"Document {layout.id!r}: a picture of {piece.grid} patches was laid out as {piece.length} media "
                    f"tokens; this connector makes one token per patch."
                )
            tokens[span], slot[span] = vocab.image, np.arange(used, used + piece.length)
            images.append((at, at + piece.length))
            grids.append(piece.grid)
            used += piece.length
        at += piece.length
    if n and not 0 <= tokens.min() <= tokens.max() < vocab.size:
        wrong = int(tokens[(tokens < 0) | (tokens >= vocab.size)][0])
        raise InputError(
            f"Document {layout.id!r} holds the token id {wrong}, outside the vocabulary of {vocab.size}; use the "
            f"tokenizer that the model was made for."
        )
    lo, hi = intervals.causal(n) if see == "causal" else intervals.bidirectional_images(n, images)
    patch_lo, patch_hi = intervals.blocks([patches_of(g) for g in grids])
    next_is = np.append(train[1:], False) & (np.append(modality[1:], EMPTY) != IMAGE)
    return Example(
        id=layout.id,
        tokens=tokens,
        modality=modality,
        lo=lo,
        hi=hi,
        position=positions.mrope(layout.pieces),
        slot=slot,
        target=np.where(next_is, np.append(tokens[1:], 0), 0).astype(np.int32),
        weight=next_is.astype(np.float32),
        patch_lo=patch_lo,
        patch_hi=patch_hi,
        patch_position=np.concatenate(
            [positions.grid_positions(g)[:, 1:] for g in grids] or [np.zeros((0, 2), np.int32)]
        ),
        patch_image=np.repeat(np.arange(len(grids)), [patches_of(g) for g in grids]).astype(np.int32),
        grid=np.array(grids, np.int32).reshape(-1, 3),
    )
