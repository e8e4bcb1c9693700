"""Prompts on the host: what of a conversation is in the cache already, and the rest in parts of a few static sizes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmjax.core.errors import InputError
from mmjax.sequence.batch import Batch
from mmjax.sequence.document import Document
from mmjax.sequence.interleave import Example
from mmjax.sequence.layout import TEXT, Layout, patches_of

FEWEST = 16  # tokens of the smallest part
# What the cache knows of a token: of these, a conversation must begin with equal ones to go on from it. The last two
# where media are looked at by cross-attention.
KNOWN = ("tokens", "lo", "hi", "position", "media_lo", "media_hi")


@dataclass(frozen=True)
class Read:
    """The tokens of one row that are in the cache, place by place, and the media among them."""

    rows: np.ndarray  # [n, KNOWN, flat]
    media: tuple[tuple[Any, Any], ...]  # the spans that are no text, as objects, and what is made of each

    @classmethod
    def of(cls, example: Example, document: Document, layout: Layout) -> "Read":
        known = [x for name in KNOWN if (x := getattr(example, name)) is not None]
        parts = [np.asarray(x).reshape(len(example.tokens), -1) for x in known]
        # A policy may depend on how many pictures there are: the same one is then no longer what it was.
        seen = [(document.spans[p.span], (p.policy, p.views, p.mixes)) for p in layout.pieces if p.views]
        return cls(np.concatenate(parts, axis=1), tuple(seen))

    def said(self, tokens: np.ndarray) -> "Read":
        """With an answer's tokens after it."""
        n, at = len(self.rows), self.position(len(self.rows))
        steps = np.arange(len(tokens))
        same = [np.full(len(tokens), x) for x in self.rows[-1]]  # an answer looks at the media of the last token
        more = np.stack([np.asarray(tokens), same[1], n + steps, *[at + steps] * 3, *same[6:]], 1)
        return replace(self, rows=np.concatenate([self.rows, more.astype(self.rows.dtype)]))

    def shows(self, other: "Read") -> bool:
        """Whether the media of both are the same objects."""
        mine, theirs = ([id(span) for span, _ in of.media] for of in (self, other))
        return mine == theirs

    def position(self, n: int) -> int:
        """The position after the first n tokens."""
        return int(self.rows[:n][-1:, 3:6].max(initial=-1)) + 1


def common(old: Read, new: Read, layout: Layout) -> int:
    """How many tokens of a conversation are in the cache as they must be: less than it has, for there is more to say.

    Never so many that a medium is torn, or that one of them sees what is not among them.
    """
    n = min(len(old.rows), len(new.rows) - 1)
    n = int(np.cumprod((old.rows[:n] == new.rows[:n]).all(-1)).sum())
    same = 0
    for (span, made), (other, wanted) in zip(old.media, new.media, strict=False):
        if span is not other or made != wanted:
            break
        same += 1
    at = seen = media = 0
    for piece in layout.pieces:
        inside = at < n < at + piece.length
        if piece.modality != TEXT and (inside or (at < n and seen >= same)):
            n = at
        if piece.views and seen >= same and new.rows.shape[1] > 6:
            n = min(n, _first_look(*new.rows[:, 6:].T, media))
        seen += bool(piece.views)
        at, media = at + piece.length, media + (piece.features if piece.views else 0)
    return border(new.rows[:, 2], n)


def _first_look(lo: np.ndarray, hi: np.ndarray, media: int) -> int:
    """The first token that looks at a medium whose media tokens begin with this one.

    A token that sees none counts where its layer may show it all (nn.cross_attention.Config.blind).
    """
    looks = np.maximum(hi, np.where(lo > hi, lo - 1, -1)) >= media
    return int(looks.argmax()) if looks.any() else len(looks)


def border(hi: np.ndarray, n: int) -> int:
    """The largest number of first tokens, up to n, of which none sees a later one; `hi` [length] or [rows, length]."""
    return max(c for c in (0, *_borders(hi)) if c <= n)


def _borders(hi: np.ndarray) -> list[int]:
    """After how many columns no token has seen a later one."""
    reach = np.maximum.accumulate(np.atleast_2d(hi).max(0))
    return [c + 1 for c, far in enumerate(reach.tolist()) if far <= c]


def parts(batch: Batch, size: int) -> list[tuple[int, int]]:
    """Columns (from, to) in which a batch can be read: at most `size` of them, and more only where it cannot be cut.

    A token sees none of a later part: pictures whose tokens see each other stay whole, and so does a prefix.
    """
    order, hi = np.asarray(batch.order), np.asarray(batch.hi)
    there = order >= 0
    length = int(there.any(0).nonzero()[0].max(initial=-1)) + 1
    # Labels may go on from earlier ones: count columns instead.
    base = np.where(there, order - np.arange(order.shape[1])[None], 0).max(-1, keepdims=True)
    borders = _borders(np.where(there, hi - base, -1)[:, :length])
    out, at = [], 0
    while at < length:
        later = [c for c in borders if c > at]
        stop = max([c for c in later if c <= at + size], default=later[0])
        out.append((at, stop))
        at = stop
    return out


_MEDIA = ("patch", "window", "frame", "instruction")
_TOKENS = {
    "order": -1,
    "hi": -1,
    "media_hi": -1,
    "slot": -1,
    "mix_slot": -1,
    "document": -1,
}  # what empty places say, where it is not 0


def columns(batch: Batch, start: int, stop: int, length: int) -> Batch:
    """Some columns of a batch's tokens, with empty places up to `length`; nothing of its media, which are known."""

    def cut(name: str) -> Any:
        x = getattr(batch, name)
        if x is None or name == "grid" or name.startswith(_MEDIA):
            return None
        out = np.full((x.shape[0], length, *x.shape[2:]), _TOKENS.get(name, 0), x.dtype)
        out[:, : stop - start] = np.asarray(x)[:, start:stop]
        return out

    some = Batch(**{field.name: cut(field.name) for field in dataclasses.fields(Batch)})
    rows = batch.tokens.shape[0]
    return some.replace(patches=np.zeros((rows, 0, 1), np.uint8), grid=np.zeros((rows, 0, 3), np.int32))


def told(part: Batch, batch: Batch) -> Batch:
    """A part of a batch that is told which media tokens the batch has: the first one, where they are looked at."""
    return part.replace(**{name: getattr(batch, name) for name in ("patch_order", "patch_kind", "grid")})


def seen(batch: Batch) -> Batch:
    """The batch without its tokens: what an encoder reads."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{n: getattr(batch, n) if n == "grid" or n.startswith(_MEDIA) else None for n in names})


def rest(example: Example, media: Sequence[Any], layout: Layout, n: int) -> tuple[Example, list[Any]]:
    """A document without its first n tokens and the media among them, numbered from its new start.

    Labels count from there too: who adds n to `order`, `lo` and `hi` has those of the whole.
    """
    if n == 0:
        return example, list(media)
    at = tokens = patches = images = gone = 0
    for piece in layout.pieces:
        if at + piece.length > n:
            if at < n and piece.modality != TEXT:
                raise InputError(f"Document {layout.id!r} cannot be cut after {n} tokens, inside of a medium.")
            break
        at += piece.length
        if piece.views:
            tokens, gone = tokens + piece.features, gone + 1
            patches, images = patches + sum(map(patches_of, piece.views)), images + len(piece.views)
    moved = {name: getattr(example, name)[n:] for name in ("tokens", "modality", "position", "target", "weight")}
    moved |= {name: getattr(example, name)[n:] - n for name in ("lo", "hi")}
    for name in ("slot", "mix_slot"):
        x = getattr(example, name)
        moved[name] = None if x is None else np.where(x[n:] < 0, -1, x[n:] - tokens)
    moved["mix_share"] = None if example.mix_share is None else example.mix_share[n:]
    for name in ("media_lo", "media_hi"):
        x = getattr(example, name)
        moved[name] = None if x is None else x[n:] - tokens
    for name in ("patch_raster", "patch_lo", "patch_hi", "window_lo", "window_hi"):
        x = getattr(example, name)
        moved[name] = None if x is None else x[patches:] - patches
    moved |= {name: getattr(example, name)[patches:] for name in ("patch_position", "patch_kind")}
    moved |= {"patch_image": example.patch_image[patches:] - images, "grid": example.grid[images:]}
    return replace(example, **moved, media=example.media - tokens), list(media)[gone:]


def moved_on(batch: Batch, n: int, media: int = 0) -> Batch:
    """The batch with its labels n further on, and those of the media that it looks at so many."""
    there = np.asarray(batch.order) >= 0
    steps = {"order": n, "lo": n, "hi": n} | ({} if batch.media_lo is None else {"media_lo": media, "media_hi": media})
    more = {name: np.where(there, getattr(batch, name) + by, getattr(batch, name)) for name, by in steps.items()}
    return batch.replace(**{name: x.astype(np.int32) for name, x in more.items()})
