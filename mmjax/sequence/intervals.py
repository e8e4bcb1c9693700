"""Who sees whom: one interval of labels per token, for one document whose labels are 0 … n−1.

Each function draws its mask: a row is a query, a column a key, `x` is seen; t is text, i a picture's token or patch, q
a learned query or latent. The rows of a KV cache and of pruned tokens are these same rows, with keys left out: labels
travel with their tokens.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

Intervals = tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]


def causal(length: int) -> Intervals:
    """Every token sees itself and what came before.

    t  x
    i  x x
    i  x x x
    t  x x x x
    """
    return np.zeros(length, np.int32), np.arange(length, dtype=np.int32)


def packed(lengths: Sequence[int]) -> Intervals:
    """Several causal documents in one row.

    t  x
    t  x x
    t      x
    t      x x
    t      x x x
    """
    return blocks(lengths)[0], np.arange(sum(lengths), dtype=np.int32)


def prefix(length: int, prefix: int) -> Intervals:
    """The first `prefix` tokens see each other, the others are causal (SimVLM, PaliGemma).

        i  x x x
        i  x x x
        t  x x x
        t  x x x x
        t  x x x x x

    Args:
      length: tokens in the document.
      prefix: how many of them are the prefix.
    """
    lo, hi = causal(length)
    return lo, np.maximum(hi, np.int32(prefix - 1))


def bidirectional_images(length: int, images: Sequence[tuple[int, int]]) -> Intervals:
    """Causal, but the tokens of one picture see each other (Gemma 3).

        t  x
        i  x x x
        i  x x x
        t  x x x x

    Args:
      length: tokens in the document.
      images: (first, one past the last) token of every picture.
    """
    lo, hi = causal(length)
    for start, stop in images:
        hi[start:stop] = stop - 1
    return lo, hi


def sliding_window(lo: Int[np.ndarray, "n"], hi: Int[np.ndarray, "n"], size: int) -> Intervals:
    """Any of these, but backwards a token sees itself and the size − 1 tokens before it (Mistral, Gemma 3).

        t  x
        t  x x
        t    x x
        i      x x x
        i        x x
        t          x x

    The upper ends stay: a picture whose tokens see each other does so beyond the window's end (Gemma 3's local layers).

    Args:
      lo, hi: intervals of tokens whose labels are 0 … n−1.
      size: tokens in the window.
    """
    return np.maximum(lo, np.arange(len(lo), dtype=np.int32) - np.int32(size - 1)), hi


def blocks(lengths: Sequence[int]) -> Intervals:
    """Everything in a block sees all of its block and nothing else.

    The patches of packed pictures; the windows of Qwen2.5-VL, once patches lie window by window.

    i  x x
    i  x x
    i      x x x
    i      x x x
    i      x x x
    """
    lengths = np.asarray(lengths, np.int64)
    stops = np.cumsum(lengths)
    return (
        np.repeat(stops - lengths, lengths).astype(np.int32),
        np.repeat(stops - 1, lengths).astype(np.int32),
    )


def last_image(length: int, at: Sequence[int], media: Sequence[int]) -> Intervals:
    """Cross-attention of text to the media tokens of the last picture so far (Flamingo, section 3.1.3).

        t
        t  x x x
        t  x x x
        t        x x
        t        x x

    Args:
      length: tokens in the document.
      at: for every picture the token from which on it is seen, rising.
      media: how many media tokens it has; their labels count on from picture to picture.
    """
    which = np.searchsorted(np.asarray(at, np.int64), np.arange(length), side="right") - 1
    stops = np.cumsum(np.asarray(media, np.int64))
    starts = stops - np.asarray(media, np.int64)
    lo, hi = (np.append(x, y)[which].astype(np.int32) for x, y in ((starts, 0), (stops - 1, -1)))
    return lo, hi


def looked_at(lo: np.ndarray, hi: np.ndarray, between: bool = False) -> np.ndarray:
    """How many media tokens each token looks at; `between`: one that sees none looks at all between hi and lo."""
    return np.where(lo <= hi, hi - lo + 1, np.maximum(lo - hi - 1, 0) if between else 0)


def all_images(length: int, at: Sequence[int], media: Sequence[int]) -> Intervals:
    """Cross-attention of text to the media tokens of all pictures so far (Idefics); arguments as of `last_image`.

    t
    t  x x x
    t  x x x
    t  x x x x x
    t  x x x x x
    """
    lo, hi = last_image(length, at, media)
    return np.zeros_like(lo), hi


def last_images(length: int, at: Sequence[int], media: Sequence[int], hidden: int = 0) -> Intervals:
    """The same of the last pictures so far that stand next to each other (Llama 3.2 Vision).

    Two of them, and a third one after text:

    t
    t  x x x
    t  x x x x x
    t  x x x x x
    t            x

    Between hi and lo of a token before the first picture are all media tokens of the document, and `hidden` ones more
    that no other token sees: for layers that show such tokens everything (nn.cross_attention).

    Args:
      length, at, media: as of `last_image`.
      hidden: labels after those of all pictures.
    """
    begins = np.asarray(at, np.int64)
    stops = np.cumsum(np.asarray(media, np.int64))
    alone = np.diff(begins, prepend=-2) != 1
    first = np.maximum.accumulate(np.where(alone, np.arange(len(begins)), 0)) if len(begins) else begins
    starts = (stops - np.asarray(media, np.int64))[first]
    which = np.searchsorted(begins, np.arange(length), side="right") - 1
    total = sum(media) + hidden
    lo, hi = (np.append(x, y)[which].astype(np.int32) for x, y in ((starts, total), (stops - 1, -1)))
    return lo, hi


def qformer_contrastive(queries: int, text: int) -> Intervals:
    """Queries and text apart, for image-text contrast (BLIP-2: Li et al. 2023, figure 2).

    q  x x
    q  x x
    t      x x
    t      x x
    """
    return blocks([queries, text])


def qformer_generation(queries: int, text: int) -> Intervals:
    """Queries see each other, text sees them and what it said so far, for image-grounded generation (same figure).

    q  x x
    q  x x
    t  x x x
    t  x x x x
    """
    return prefix(queries + text, queries)


def qformer_matching(queries: int, text: int) -> Intervals:
    """Everything sees everything, for image-text matching (same figure).

    q  x x x x
    q  x x x x
    t  x x x x
    t  x x x x
    """
    return blocks([queries + text])


def perceiver(features: Sequence[int], latents: int) -> tuple[Int[np.ndarray, "s"], Intervals]:
    """Latents of packed pictures: each sees its own picture's features and latents (Flamingo's resampler, listing 1).

        q  x x x     x x
        q  x x x     x x
        q        x x     x x
        q        x x     x x

    Keys are all features, then all latents, picture by picture; labels alternate, so that what a latent sees is one
    interval although it is two runs of keys.

    Args:
      features: how many features each picture has.
      latents: how many latents each picture gets.

    Returns:
      The keys' labels, and the latents' (lo, hi).
    """
    features = np.asarray(features, np.int64)
    starts = np.cumsum(features + latents) - features - latents
    of_features = np.arange(features.sum()) + np.repeat(np.arange(len(features)) * latents, features)
    of_latents = (starts + features)[:, None] + np.arange(latents)[None]
    order = np.concatenate([of_features, of_latents.reshape(-1)]).astype(np.int32)
    lo, hi = np.repeat(starts, latents), np.repeat(starts + features + latents - 1, latents)
    return order, (lo.astype(np.int32), hi.astype(np.int32))
