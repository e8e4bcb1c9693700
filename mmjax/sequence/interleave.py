"""A layout as arrays: the descriptor of every token of one document, numbered from its own start."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mmjax.core.errors import InputError
from mmjax.sequence import intervals, positions, windows
from mmjax.sequence.layout import AUDIO, EMPTY, TEXT, VIDEO, Layout, Piece, Size, patches_of
from mmjax.tokenizers.vocab import Vocab

PIXEL, HIDDEN = 1, 2  # what `patch_kind` says of a patch: its media token stands in the sequence, or it does not


@dataclass(frozen=True)
class Config:
    """Which descriptors a model wants.

    see: who sees whom in the sequence; "prefix" is both ways up to the first token that is learnt (prefix-LM).
    cross: which of its document's media text looks at by cross-attention (Flamingo: the last one so far; Llama 3.2
      Vision: the last ones that stand next to each other).
    position: "mrope", or "sequential": 0, 1, 2, … whatever stands there.
    rope: how M-RoPE counts.
    merge: the patches that become one media token, merge × merge of them, lie next to each other (Qwen).
    window: above 0, patches lie window by window, each of so many media tokens a side, and have a second interval,
      their window's (Qwen2.5-VL).
    canvas: above 0, a picture has the media tokens of so many windows whatever its size. Text looks at those of the
      windows that its patches lie in; the rest are padding, and their labels come behind all others of the document.
    frames: whether patches see all frames of their video.
    mixes: whether a place may hold a mix of media tokens (LLaVA-OneVision).
    answer: above 0, what is learnt or said is a second stream, that an encoder–decoder's decoder reads, with room for
      so many tokens in a row (of the buckets that a run makes: Bucket.answers has it): all from the first that is
      learnt on, behind the id `start`. The first stream ends there.
    instruction: above 0, the connector reads a text beside each picture, of at most so many tokens (InstructBLIP).
    """

    see: Literal["causal", "bidirectional_images", "prefix"] = "causal"
    cross: Literal["none", "last_image", "last_images", "all_images"] = "none"
    position: Literal["mrope", "sequential"] = "mrope"
    rope: positions.MRope = positions.ONE
    merge: int = 1
    window: int = 0
    canvas: int = 0
    frames: Literal["apart", "together"] = "apart"
    mixes: bool = False
    instruction: int = 0
    answer: int = 0
    start: int = 0


PLAIN = Config()


@dataclass(frozen=True)
class Answer:
    """One document's share of the second stream (Config.answer)."""

    tokens: np.ndarray  # i32[n]
    target: np.ndarray  # i32[n]
    weight: np.ndarray  # f32[n]


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
    media: int  # media tokens of pictures and videos
    sounds: int  # media tokens of sound
    media_lo: np.ndarray | None  # i32[n]
    media_hi: np.ndarray | None
    patch_raster: np.ndarray  # i32[p]; which patch, counted row by row through all views, lies at each place
    patch_lo: np.ndarray  # i32[p]
    patch_hi: np.ndarray  # i32[p]
    window_lo: np.ndarray | None  # i32[p]
    window_hi: np.ndarray | None
    patch_position: np.ndarray  # i32[p, 2]
    patch_image: np.ndarray  # i32[p]
    patch_kind: np.ndarray  # i8[p]
    grid: np.ndarray  # i32[images, 3]
    frame_lo: np.ndarray  # i32[f]
    frame_hi: np.ndarray  # i32[f]
    mix_slot: np.ndarray | None = None  # i32[n, 3]
    mix_share: np.ndarray | None = None  # f32[n, 4]
    instruction: np.ndarray | None = None  # i32[images, words]; what the connector reads beside each, -1 behind its end
    answer: Answer | None = None

    @property
    def size(self) -> Size:
        """As Layout.size."""
        answers = 0 if self.answer is None else len(self.answer.tokens)
        return len(self.tokens), len(self.patch_lo), len(self.grid), len(self.frame_lo), answers


def interleave(layout: Layout, vocab: Vocab, cfg: Config = PLAIN) -> Example:
    """The arrays of a layout.

    The target of a token is the next token; it weighs 1 where that next token is trained, else 0. Media are never
    targets.

    Raises:
      InputError: what `refuse` does; an id outside the vocabulary; a medium whose tokens are not what M-RoPE counts.
    """
    refuse(layout, cfg)
    n = sum(piece.length for piece in layout.pieces)
    tokens, modality = np.empty(n, np.int32), np.full(n, EMPTY, np.int8)
    slot, train = np.full(n, -1, np.int32), np.zeros(n, bool)
    at = 0
    mix = {}
    if cfg.mixes:
        mix = {"mix_slot": np.full((n, 3), -1, np.int32), "mix_share": np.eye(1, 4, dtype=np.float32).repeat(n, 0)}
    made = {AUDIO: 0, None: 0}  # media tokens so far, of sound and of everything seen
    spans = []  # places of everything seen
    for piece in layout.pieces:
        span = slice(at, at + piece.length)
        modality[span] = piece.modality
        if piece.modality == TEXT:
            tokens[span], train[span] = piece.ids, piece.train
        else:
            table = AUDIO if piece.modality == AUDIO else None
            try:
                within = _slots(piece, cfg)
            except InputError as error:
                raise InputError(f"Document {layout.id!r}: {error}") from error
            written = within == -2
            stands = _placeholder(piece, vocab) + (1 + within if vocab.numbered else 0)
            tokens[span] = np.where(within >= 0, stands, _newline(piece, vocab))
            tokens[span][written], modality[span][written] = piece.ids, TEXT
            slot[span] = np.where(within >= 0, within + made[table], -1)
            _mixed(piece, at, made[table], mix)
            made[table] += piece.features
            spans += _unbroken(at, written) if table is None else []
        at += piece.length
    _refuse_ids(layout.id, tokens, vocab)
    if cfg.see == "bidirectional_images":
        lo, hi = intervals.bidirectional_images(n, spans)
    else:
        lo, hi = intervals.prefix(n, layout.prefix) if cfg.see == "prefix" else intervals.causal(n)
    media_lo, media_hi = (None, None) if cfg.cross == "none" else looks(layout, cfg)
    next_is = np.append(train[1:], False) & (np.append(modality[1:], EMPTY) == TEXT)
    pieces = tuple(p for p in layout.pieces if p.length)
    if cfg.position == "mrope":
        try:
            position = positions.mrope(pieces, cfg.rope)
        except InputError as error:
            raise InputError(f"Document {layout.id!r}: {error}") from error
    else:
        position = np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1)
    target = np.where(next_is, np.append(tokens[1:], 0), 0).astype(np.int32)
    frame_lo, frame_hi = intervals.blocks([p.grid[0] for p in layout.pieces if p.modality == AUDIO])
    whole = Example(
        id=layout.id,
        tokens=tokens,
        modality=modality,
        lo=lo,
        hi=hi,
        position=position,
        slot=slot,
        target=target,
        weight=next_is.astype(np.float32),
        media=made[None],
        sounds=made[AUDIO],
        media_lo=media_lo,
        media_hi=media_hi,
        **_patches(layout, cfg),
        frame_lo=frame_lo,
        frame_hi=frame_hi,
        **mix,
    )
    return _parted(whole, layout.prefix, train, cfg) if cfg.answer else whole


def looks(layout: Layout, cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last of a document's media tokens that each of its tokens looks at by cross-attention."""
    begins, counts = [], []  # of everything seen: where text may look at it, and its media tokens
    at = made = 0
    for piece in layout.pieces:
        if piece.modality not in (TEXT, AUDIO):
            begins.append(max(at - 1, 0))  # its marker sees it already
            counts.append(_shown(piece, cfg))
            made += piece.features
        at += piece.length
    if cfg.cross == "last_images":
        return intervals.last_images(at, begins, counts, made - sum(counts))
    return (intervals.last_image if cfg.cross == "last_image" else intervals.all_images)(at, begins, counts)


def refuse(layout: Layout, cfg: Config) -> None:
    """Raises InputError for a document that no batch of these descriptors can hold, as its layout tells."""
    if bool(cfg.answer) != bool(layout.answers):
        raise InputError(
            f"Document {layout.id!r} has a layout of {'one stream' if cfg.answer else 'two streams'}, but "
            f"sequence.answer is {cfg.answer}; lay it out with parted={bool(cfg.answer)}."
        )
    at = 0
    for piece in layout.pieces:
        at += piece.length
        if cfg.answer and piece.modality != TEXT and at > layout.tokens:
            raise InputError(
                f"Document {layout.id!r} shows a picture behind the first token that is learnt; show it before."
            )
        if piece.mixes is not None and not cfg.mixes:
            raise InputError(
                f"Document {layout.id!r}: {piece.policy} mixes media tokens; set sequence.mixes to true for it."
            )
        if not cfg.canvas or not piece.views:
            continue
        count, rest = _windows(piece, cfg)
        if rest or count > cfg.canvas or len(piece.views) != 1 or piece.grid[0] != 1:
            raise InputError(
                f"Document {layout.id!r} has a picture of {piece.grid} patches, which are not one view of up to "
                f"{cfg.canvas} whole windows of {cfg.window} × {cfg.window}; use the model's own policy "
                f"(tokenizers.canvas.Canvas)."
            )


def refuse_instruction(id: str, said: np.ndarray | None, room: int) -> None:
    """Raises InputError where what the connector reads beside a document's pictures is not there, or too long."""
    if said is None:
        raise InputError(
            f"Document {id!r} has no text for the connector to read beside its pictures; give one of at most {room} "
            f"tokens (sequence.instruction)."
        )
    if len(said) and said.shape[1] > room:
        raise InputError(
            f"Document {id!r} has {said.shape[1]} tokens for the connector to read beside its pictures, and "
            f"sequence.instruction is {room}; set it to {said.shape[1]}, or ask less."
        )


def _parted(x: Example, n: int, train: np.ndarray, cfg: Config) -> Example:
    """A document as two streams: its first n tokens, all of which see each other, and the others behind a first id."""
    said, learnt = x.tokens[n:], train[n:].astype(np.float32)
    answer = Answer(
        np.append(np.int32(cfg.start), said[:-1])[: max(len(said), 1)].astype(np.int32),
        said if len(said) else np.zeros(1, np.int32),
        learnt if len(said) else np.zeros(1, np.float32),
    )
    cut = {f: getattr(x, f)[:n] for f in ("tokens", "modality", "position", "slot")}
    for f in ("media_lo", "media_hi", "mix_slot", "mix_share"):
        cut[f] = None if getattr(x, f) is None else getattr(x, f)[:n]
    see = dict(zip(("lo", "hi"), intervals.prefix(n, n), strict=True))
    return replace(x, **cut, **see, target=np.zeros(n, np.int32), weight=np.zeros(n, np.float32), answer=answer)


def unlearnt(x: Example) -> Example:
    """The same document with nothing to learn."""
    answer = None if x.answer is None else replace(x.answer, weight=np.zeros_like(x.answer.weight))
    return replace(x, weight=np.zeros_like(x.weight), answer=answer)


def _mixed(piece: Piece, at: int, before: int, mix: dict[str, np.ndarray]) -> None:
    """Enters what a medium's places from `at` on are mixed with; `before`: media tokens of the media before it."""
    if piece.mixes is None:
        return
    places = [n for n, found in enumerate(piece.mixes) if found is not None]
    mix["mix_slot"][[at + n for n in places]] = [[before + i for i in piece.mixes[n].others] for n in places]
    mix["mix_share"][[at + n for n in places]] = [piece.mixes[n].shares for n in places]


def _shown(piece: Piece, cfg: Config) -> int:
    """How many of a medium's media tokens text may look at; the rest are padding."""
    return piece.features // cfg.canvas * _windows(piece, cfg)[0] if cfg.canvas else piece.features


def _windows(piece: Piece, cfg: Config) -> tuple[int, int]:
    """How many windows a medium's patches are, and how many patches are left over."""
    return divmod(sum(map(patches_of, piece.views)), cfg.window**2)


def _no(token: int | None) -> int:
    return -1 if token is None else token


def _placeholder(piece: Piece, vocab: Vocab) -> int:
    """What stands where a medium's tokens go; -1, which is refused, where the family has nothing for it."""
    own = {VIDEO: vocab.video, AUDIO: vocab.audio}.get(piece.modality)
    return _no(vocab.image if own is None else own)


def _newline(piece: Piece, vocab: Vocab) -> int:
    """What stands where a row of its tokens ends: a token of its own, or the medium's placeholder again."""
    own = vocab.image_newline is None or vocab.image_newline != vocab.image
    return _no(vocab.image_newline) if own else _placeholder(piece, vocab)


def _unbroken(at: int, written: np.ndarray) -> list[tuple[int, int]]:
    """The runs of a medium's places that nothing is written between, from `at` on."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], written, [True]]).astype(np.int8)))
    return [(at + int(a), at + int(b)) for a, b in edges.reshape(-1, 2)]


def _slots(piece: Piece, cfg: Config) -> np.ndarray:
    """Which of its own media tokens stands at each of a medium's places, -1 for a newline, -2 for what is written."""
    reordered = cfg.merge > 1 or cfg.window > 0
    if piece.slots is not None:
        if piece.merge and (cfg.window or piece.merge != cfg.merge):
            raise InputError(
                f"a picture whose tokens are {piece.merge}×{piece.merge} patches in an order of its own needs "
                f"sequence.merge {piece.merge} and no windows."
            )
        return np.asarray(piece.slots, np.int32)
    if reordered and piece.views and piece.length:
        # Patches lie square by square and window by window, the sequence shows their tokens row by row.
        for which in (0, 1):  # a token for each patch, or for each square
            orders = [windows.order(view, cfg.merge, cfg.window)[which] for view in piece.views]
            if sum(map(len, orders)) == piece.length:
                before = np.cumsum([0, *map(len, orders)])
                return np.argsort(np.concatenate([n + own for n, own in zip(before, orders, strict=False)])).astype(
                    np.int32
                )
    return np.arange(piece.length, dtype=np.int32)


def _patches(layout: Layout, cfg: Config) -> dict[str, np.ndarray | None]:
    """The descriptors of all patches of all views."""
    raster, position, image, kind, grids = [], [], [], [], []
    apart, inside = [], []  # how many patches see each other, in general and in windows
    at = 0
    for piece in layout.pieces:
        shown = np.ones(sum(map(patches_of, piece.views)), bool)
        if not piece.length:
            shown[:] = False
        elif piece.slots is not None and piece.merge:
            square = piece.merge**2
            shown = np.isin(np.arange(len(shown) // square), piece.slots).repeat(square)  # as patches lie
        for view in piece.views:
            patches, _, cut = windows.order(view, cfg.merge, cfg.window)
            n = len(patches)
            raster.append(at + patches)
            position.append(positions.grid_positions(view)[patches, 1:])
            image.append(np.full(n, len(grids)))
            kind.append(np.where(shown[:n], PIXEL, HIDDEN))
            shown = shown[n:]
            apart += [n] if cfg.frames == "together" else [n // view[0]] * view[0]
            inside += cut
            grids.append(view)
            at += n
    lo, hi = intervals.blocks(apart)
    window_lo, window_hi = intervals.blocks(inside) if cfg.window else (None, None)

    def joined(parts: list[np.ndarray], dtype=np.int32, empty: tuple[int, ...] = (0,)) -> np.ndarray:
        return np.concatenate([*parts, np.zeros(empty, dtype)]).astype(dtype)

    return {
        "patch_raster": joined(raster),
        "patch_lo": lo,
        "patch_hi": hi,
        "window_lo": window_lo,
        "window_hi": window_hi,
        "patch_position": joined(position, empty=(0, 2)),
        "patch_image": joined(image),
        "patch_kind": joined(kind, np.int8),
        "grid": np.array(grids, np.int32).reshape(-1, 3),
    }


def _refuse_ids(id: str, tokens: np.ndarray, vocab: Vocab) -> None:
    wrong = tokens[(tokens < 0) | (tokens >= vocab.size)]
    if len(wrong):
        raise InputError(
            f"Document {id!r} holds the token id {wrong[0]}, outside the vocabulary of {vocab.size}; use the "
            f"tokenizer that the model was made for."
        )
