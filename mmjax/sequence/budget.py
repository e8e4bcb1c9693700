"""Token budgets: what a document costs, from its layout alone, and what to do where that is too much."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

from mmjax.core.errors import InputError
from mmjax.sequence import interleave, intervals
from mmjax.sequence.document import Document
from mmjax.sequence.layout import NAMES, Layout, patches_of

Measure = Literal["resolution", "frames", "images", "refuse"]
SHARES = 64  # steps in which resolutions and frame counts are lowered


@dataclass(frozen=True)
class Blocks:
    """The sizes of a transformer that costs depend on: attention width of queries, of keys and values, MLP width."""

    layers: int
    width: int
    queries: int  # heads × head size
    keys: int  # key heads × head size
    hidden: int
    gated: bool = True

    def products(self, tokens: int, others: tuple[int, int] | None = None) -> int:
        """FLOPs of the matrix products with parameters: two per parameter and token.

        others: how many tokens it looks at, and how wide they are, where keys and values are not made of its own.
        """
        count, width = others or (tokens, self.width)
        own = self.width * (2 * self.queries + (3 if self.gated else 2) * self.hidden)
        return 2 * self.layers * (tokens * own + count * width * 2 * self.keys)

    def attention(self, pairs: int) -> int:
        """FLOPs of scores and weighted sums over so many pairs of a query and a key it sees."""
        return 4 * self.layers * self.queries * pairs


@dataclass(frozen=True)
class Costs:
    """A model's: its decoder, the vocabulary its head spans, its encoder, and bytes per cached number.

    tokens: that the encoder has of every picture, where that is fixed; 0: as many as patches.
    cross: the layers through which text looks at media (Flamingo), which are `media` wide; at which, `sequence` says.
    blind: whether tokens that see none look at all of them (nn.cross_attention.Config.blind).
    answer: of an encoder–decoder, the blocks that answer; those that read are then in `decoder`'s place.
    """

    decoder: Blocks
    vocab: int = 0
    encoder: Blocks | None = None
    bytes: int = 2
    tokens: int = 0
    cross: Blocks | None = None
    media: int = 0
    sequence: interleave.Config = interleave.PLAIN
    blind: bool = False
    answer: Blocks | None = None

    def prefill(self, layout: Layout) -> int:
        """FLOPs from pixels to the first logits: encoder over each picture, decoder over a causal sequence.

        Of an encoder–decoder, both over all that they read: of the answer, what the layout has of it.
        """
        n, t = layout.tokens, layout.answers
        total = self.decoder.products(n) + self.decoder.attention(n * n if self.answer else n * (n + 1) // 2)
        total += 2 * self.decoder.width * self.vocab
        if self.answer is not None:
            look = replace(self.answer, hidden=0)
            total += self.answer.products(t) + self.answer.attention(t * (t + 1) // 2)
            total += look.products(t, (n, self.decoder.width)) + look.attention(t * n)
        if self.cross is not None:
            pairs = intervals.looked_at(*interleave.looks(layout, self.sequence), self.blind)
            total += self.cross.products(n, (_media(layout), self.media)) + self.cross.attention(int(pairs.sum()))
        if self.encoder is not None:
            # A video's frames do not see each other.
            views = [(v[0], self.tokens or v[1] * v[2]) for p in layout.pieces for v in p.views]
            total += sum(self.encoder.products(f * n) + self.encoder.attention(f * n * n) for f, n in views)
        return total

    def cache(self, layout: Layout, more: int = 0) -> int:
        """Bytes of keys and values of a document and so many tokens more, and of all that these look at."""
        said = self.decoder if self.answer is None else self.answer
        kept = [(said, (layout.answers if self.answer else layout.tokens) + more)]
        if self.answer is not None:
            kept.append((self.answer, layout.tokens))
        if self.cross is not None:
            kept.append((self.cross, _media(layout)))
        return sum(2 * blocks.layers * blocks.keys * self.bytes * n for blocks, n in kept)


def _media(layout: Layout) -> int:
    """Media tokens of all that is seen."""
    return sum(piece.features for piece in layout.pieces if piece.views)


@dataclass(frozen=True)
class Report:
    """What a document takes: for every span (its number, modality, tokens), and together."""

    id: str
    spans: tuple[tuple[int, str, int], ...]
    tokens: dict[str, int]  # by modality; text includes the marks between spans
    headroom: int  # places kept for the answer
    flops: int  # to the first logits, 0 where no costs were given
    cache: int  # bytes of keys and values, the answer's included
    did: tuple[str, ...] = ()  # what was done to come within the budget

    @property
    def total(self) -> int:
        return sum(self.tokens.values()) + self.headroom


def report(layout: Layout, headroom: int = 0, costs: Costs | None = None, did: Sequence[str] = ()) -> Report:
    """Expanded counts of a layout: media as the tokens they become, not as the one placeholder they are written as."""
    spans: Counter = Counter()
    tokens: Counter = Counter()
    for piece in layout.pieces:
        tokens[NAMES[piece.modality]] += piece.length
        if piece.span >= 0:
            spans[piece.span, NAMES[piece.modality]] += piece.length
    return Report(
        layout.id,
        tuple((span, kind, n) for (span, kind), n in sorted(spans.items())),
        dict(tokens),
        headroom,
        0 if costs is None else costs.prefill(layout),
        0 if costs is None else costs.cache(layout, headroom),
        tuple(did),
    )


@dataclass(frozen=True)
class Budget:
    """How much a document may take.

    tokens: at most, the answer's places included; 0: no limit.
    headroom: places kept for the answer.
    flops, cache: at most, to the first logits and in bytes; 0: no limit.
    over: what is tried in this order: lower the resolution (as little as is enough), take fewer frames of each video,
      leave out the last pictures, refuse. What was tried and changed anything stays, the next is tried on top.
    """

    tokens: int = 0
    headroom: int = 0
    flops: int = 0
    cache: int = 0
    over: tuple[Measure, ...] = ("refuse",)

    def holds(self, found: Report) -> bool:
        """Whether a document is within it."""
        limits = (self.tokens, found.total), (self.flops, found.flops), (self.cache, found.cache)
        return all(n <= limit for limit, n in limits if limit)


@runtime_checkable
class Lowerable(Protocol):
    """A policy that can do with less: `lowered(share)` gives about this share of its largest picture or clip."""

    def lowered(self, share: float) -> "Lowerable": ...


@dataclass
class Limited:
    """A layout function that keeps a budget; `reports` has every document that had to be changed.

    lay: layout of a document, with `resolution`, `clips` and `skip` as keywords (sequence.layout.layout).
    """

    lay: Callable[..., Layout]
    budget: Budget
    resolution: Any
    clips: Any = None
    costs: Costs | None = None
    reports: dict[str, Report] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def __call__(self, document: Document) -> Layout:
        """The layout within the budget.

        Raises:
          InputError: nothing that was allowed brings it there; the message says what it takes.
        """
        found, said = fit(document, self.lay, self.budget, self.resolution, self.clips, self.costs)
        if said.did:
            with self._lock:
                self.reports[document.id] = said
        return found


def fit(
    document: Document,
    lay: Callable[..., Layout],
    budget: Budget,
    resolution: Any,
    clips: Any = None,
    costs: Costs | None = None,
) -> tuple[Layout, Report]:
    """A document's layout within a budget and what it took; see `Limited` for arguments and errors."""
    options: dict[str, Any] = {"resolution": resolution, "clips": clips, "skip": ()}
    did: list[str] = []

    def tried(**changes: Any) -> tuple[Layout, Report]:
        found = lay(document, **(options | changes))
        return found, report(found, budget.headroom, costs, did)

    found, said = tried()
    for measure in budget.over:
        if budget.holds(said):
            break
        if measure == "refuse":
            raise InputError(_refusal(document, said, budget))
        if measure == "images":
            candidates = [{"skip": s} for s in _skips(document, found)]
            words = ["without the spans {skip}"] * len(candidates)
        else:
            name = "resolution" if measure == "resolution" else "clips"
            if not isinstance(options[name], Lowerable):
                continue
            shares = [s / SHARES for s in range(SHARES - 1, 0, -1)]
            candidates = [{name: options[name].lowered(share)} for share in shares]
            words = [f"{measure} lowered to {share:.0%}" for share in shares]
        best = _first(candidates, lambda c: budget.holds(tried(**c)[1]))
        if candidates and tried(**candidates[best])[0].size != found.size:
            options |= candidates[best]
            did.append(words[best].format(**options))
            found, said = tried()
    if not budget.holds(said):
        raise InputError(_refusal(document, said, budget))
    return found, said


def _first(candidates: Sequence[Any], holds: Callable[[Any], bool]) -> int:
    """The first that holds, of candidates that get smaller and smaller; the last where none does."""
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if holds(candidates[middle]):
            high = middle
        else:
            low = middle + 1
    return low


def _skips(document: Document, found: Layout) -> list[tuple[int, ...]]:
    """The last picture or video left out, the last two, …, all."""
    seen = [p.span for p in found.pieces if p.views and patches_of(p.views[0])]
    return [tuple(seen[-n:]) for n in range(1, len(seen) + 1)]


def _refusal(document: Document, said: Report, budget: Budget) -> str:
    parts = ", ".join(f"{n} {kind}" for kind, n in said.tokens.items())
    limits = {"tokens": budget.tokens, "FLOPs": budget.flops, "bytes of cache": budget.cache}
    allowed = ", ".join(f"{limit:,} {name}" for name, limit in limits.items() if limit)
    done = f" after {', '.join(said.did)}" if said.did else ""
    return (
        f"Document {document.id!r} takes {said.total} tokens ({parts}, {said.headroom} for the answer), {said.flops:,} "
        f"FLOPs and {said.cache:,} bytes of cache{done}, over the budget of {allowed}; allow more, or another measure."
    )
