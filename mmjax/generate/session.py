"""Answers to documents, as they come: a model and its processor, and the cache of their last conversation.

    session = Session(model, processor)
    for row, text in session.stream([question], max_tokens=100):
        print(text, end="", flush=True)

A conversation of one row goes on where it stood: only what is new goes through the model, as long as the new writing
begins with the same tokens and the same pictures (the same objects, which must not be changed meanwhile).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from mmjax.convert.huggingface import Model
from mmjax.core.errors import InputError
from mmjax.core.store import Store
from mmjax.generate import engine, features, prompts, sample
from mmjax.generate.prompts import FEWEST, Read
from mmjax.generate.sample import GREEDY, Sampling
from mmjax.generate.stream import Reason, Stream
from mmjax.models import vlm
from mmjax.models.tower import Media
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Batch, Values
from mmjax.sequence.buckets import ladder
from mmjax.sequence.document import Document, Text

PART = 1024  # columns of a prompt that are read at once
LEAST = 128  # places of the smallest cache


@dataclass(frozen=True)
class Answer:
    """What was said to one document.

    ids: its tokens, without the one that ended it. reason: as of generate.stream.Stream.
    prompt: tokens of the document; reused: how many of them were in the cache already.
    """

    text: str
    ids: tuple[int, ...]
    reason: Reason
    prompt: int
    reused: int = 0


class Session:
    """Holds the parameters, the cache of the last documents, and their `answers` when all is said."""

    def __init__(
        self,
        model: Model,
        processor: Any,
        *,
        mesh: jax.sharding.Mesh | None = None,
        part: int = PART,
        unstack: bool = True,
        consume: bool = False,
        store: Store | None = None,
    ):
        """What answers.

        Args:
          model: a decoder or a vision-language model, as convert.huggingface.load gives it.
          processor: of the same directory (convert.processor.load).
          mesh: what the parameters are sharded over.
          part: how many columns of a prompt are read at once.
          unstack: whether to take the blocks' parameters apart (generate.engine.unstacked): tokens come sooner, and
            programs are compiled longer.
          consume: the model's own parameters of these blocks are deleted for it; else there are two of them.
          store: where the visual tokens of pictures are kept (generate.features); None: nowhere.

        Raises:
          InputError: a model that does not write text.
        """
        if not isinstance(model.cfg, engine.Config):
            raise InputError(f"This model ({model.of.__name__}) writes no text; give a decoder or a model around one.")
        self.cfg, self.processor, self.mesh, self.part = model.cfg, processor, mesh, part
        self._stacked, self.params = not unstack, model.params
        if unstack:
            self.params = self._on(engine.unstacked, model.params, self.cfg, consume=consume)
        inner = self.params["decoder"] if isinstance(self.cfg, vlm.Config) else self.params
        self._dtype = inner["embed"].dtype
        # What a connector makes of a picture that it reads a question beside is not the picture's alone.
        seen = isinstance(self.cfg, vlm.Config) and self.cfg.sees
        asks = seen and self.cfg.asks
        self.store = store if seen and not asks else None
        self._keeps = not (asks or engine.answers(self.cfg))
        self._tower = "" if self.store is None else self._on(features.tower, self.params, self.cfg)
        self._state: engine.State | None = None
        self._read: Read | None = None
        self._asked = 0  # how often
        self.answers: list[Answer] = []

    def answer(
        self,
        documents: Sequence[Document],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """The answers to documents, all at once; as of `stream`."""
        for _ in self.stream(documents, sampling, max_tokens=max_tokens, stop=stop, chunk=64):
            pass
        return self.answers

    def stream(
        self,
        documents: Sequence[Document],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        chunk: int = 8,
    ) -> Iterator[tuple[int, str]]:
        """(number of the document, what its answer goes on with), as it becomes final; `answers` has them whole.

        Args:
          documents: one in each row of the batch; what opens an answer is written behind them by the processor.
          sampling: of all documents, or of each.
          max_tokens: the longest answer.
          stop: texts that end an answer, and are no part of it.
          chunk: how many tokens are made before their text is looked at.

        Raises:
          InputError: what the processor refuses; another number of samplings than documents; an answer that is asked
            to go on after another question was asked; logits that are no numbers.
        """
        rows = [sampling] * len(documents) if isinstance(sampling, Sampling) else list(sampling)
        if len(rows) != len(documents):
            raise InputError(f"{len(rows)} samplings were given for {len(documents)} documents; give one for each.")
        if not documents:
            raise InputError("There is no document to answer; give at least one.")
        if not (1 <= max_tokens < 2**31 and chunk >= 1):
            raise InputError(f"max_tokens is {max_tokens} and chunk {chunk}; give at least 1 of each.")
        ends = np.array(sorted(self.processor.stops), np.int32)
        streams = [Stream(self.processor.chat.tokenizer, self.processor.stops, stop) for _ in documents]
        counts = self._prefill(documents, max_tokens)
        self._asked = mine = self._asked + 1
        switches, values = sample.prepare(rows)
        # A table of positions ends where it does: so does the longest answer.
        room = engine.language(self.cfg).longest
        most = np.array([max_tokens if room is None else min(max_tokens, room - count) for count, _ in counts])
        over = np.zeros(len(streams), bool)
        at, said, some = int(self._state.cache.at), 0, 1  # the first token at once
        while not over.all():
            if mine != self._asked:
                raise InputError("Another question was asked meanwhile; let one answer end, or use a session for each.")
            # Its memory is given away, and back: whoever interrupts this, or stops listening, may ask again.
            state, self._state = self._state, None
            run = {"cfg": self.cfg, "switches": switches}
            n = min(some, int(most[~over].min()) - said)  # no row says more than it may
            state = self._on(engine.run_decode, self.params, state, np.int32(n), ends, values, **run)
            self._state = state
            if not self._on(engine.run_sound, state.logits):
                raise InputError(
                    "The model's logits are no numbers: its weights are damaged, or too large for their format; try "
                    "bfloat16 or float32."
                )
            new = np.array(state.tokens)[:, at : int(state.cache.at)]
            texts = [s.add([t for t in row.tolist() if t >= 0]) for s, row in zip(streams, new, strict=True)]
            at, said, some = at + new.shape[1], said + n, chunk
            over = np.array([stream.reason is not None for stream in streams]) | (said >= most)
            self._state = state.replace(done=state.done | over)
            self._read = self._read and self._read.said(new[0])
            yield from ((row, text) for row, text in enumerate(texts) if text)
        for row, stream in enumerate(streams):
            text = stream.finish()
            if text:
                yield row, text
        self.answers = [Answer(s.text, tuple(s.ids), s.reason, *n) for s, n in zip(streams, counts, strict=True)]

    def _prefill(self, documents: Sequence[Document], max_tokens: int) -> list[tuple[int, int]]:
        """Reads the documents; gives for each how many tokens it has, and how many of them were there already."""
        frames = self.processor.frames(documents)
        layouts = [self.processor.layout(document) for document in documents]
        for document, of in zip(documents, layouts, strict=True):
            if not of.tokens:
                raise InputError(f"Document {of.id!r} has no tokens to go on from; give a text.")
            goes_on = document.spans[-1].role == "assistant" or any(piece.train for piece in of.pieces)
            if goes_on and engine.answers(self.cfg):
                raise InputError(
                    f"Document {of.id!r} begins the answer or has text to be learnt, and an encoder–decoder reads "
                    f"questions alone; end with the user's turn, and train no text."
                )
        asked, documents = documents, [self._settled(document) for document in documents]
        made = [self.processor.example(document, frames=frames) for document in documents]
        counts = [len(example.tokens) for example, _ in made]
        longest = engine.language(self.cfg).longest
        if longest is not None and max(counts) >= longest:
            raise InputError(
                f"Document {layouts[counts.index(max(counts))].id!r} has {max(counts):,} tokens, and this model has "
                f"{longest:,} positions, for its answer too; give less to read."
            )
        kept = seen = 0  # tokens in the cache, and media tokens that are looked at
        read = Read.of(made[0][0], asked[0], layouts[0]) if len(documents) == 1 else None
        if read is not None:
            layout = layouts[0]
            known = None if self._state is None or not self._keeps else self._read
            if known is not None and self.processor.sequence.canvas and not known.shows(read):
                known = None  # padding of the pictures before would stand between them and new ones
            kept = 0 if known is None else prompts.common(known, read, layout)
            rest = prompts.rest(*made[0], layout, kept)
            seen = made[0][0].media - rest[0].media
            if self.processor.sequence.canvas and seen and rest[0].media:
                kept, seen, rest = 0, 0, made[0]  # padding of the pictures before would stand between them and these
            made = [rest]
        sizes = [example.size for example, _ in made]
        values = Values(self.processor.values.patch * frames)
        bucket = self.processor.bucket(sizes)
        described = self.processor.described([example for example, _ in made])
        batch = batches.build([[one] for one in made], bucket, values, self.processor.vocab, described)
        if engine.answers(self.cfg):
            media = self._media(batch, documents, frames)
            self._state = self._read = None
            places = ladder(batch.answer.tokens.shape[1] + max_tokens, LEAST)
            self._state = self._on(engine.run_begin, self.params, batch, cfg=self.cfg, places=places, media=media)
            return [(count, 0) for count in counts]
        batch = prompts.moved_on(batch, kept, seen)
        rope = engine.language(self.cfg).blocks.rope
        whole = rope is not None and rope.needs_length
        cuts = prompts.parts(batch, batch.tokens.shape[1] if whole else self.part)
        wide = [ladder(stop - start, FEWEST) for start, stop in cuts]
        ends = [kept + start + n for (start, _), n in zip(cuts, wide, strict=True)]
        looks = engine.language(self.cfg).cross is not None
        media = self._media(batch, documents, frames)
        most = seen + media.tokens.shape[1] if looks and media else seen
        tokens = kept, max(*ends, max(counts) + max_tokens)
        state = self._room(len(documents), tokens, (seen, most), read)
        self._state = self._read = None  # its memory is given away
        for (start, stop), n in zip(cuts, wide, strict=True):
            part = prompts.columns(batch, start, stop, n)
            if looks:  # the cache has them after the first part
                part, media = (part, None) if start or media is None else (prompts.told(part, batch), media)
            state = self._on(engine.run_prefill, self.params, part, cfg=self.cfg, state=state, media=media)
        self._state, self._read = state, read
        return [(count, kept) for count in counts]

    def _settled(self, document: Document) -> Document:
        """The document with what its media are read from in hand: what is kept of them goes by the same bytes."""
        if self.store is None:
            return document
        spans = list(document.spans)
        for n, span in enumerate(spans):
            if not isinstance(span, Text):
                try:
                    spans[n] = replace(span, source=features.content(span))
                except InputError as error:
                    raise InputError(f"Document {document.id!r}, span {n}: {error}") from error
        return replace(document, spans=tuple(spans))

    def _room(self, rows: int, tokens: tuple[int, int], media: tuple[int, int], read: Read | None) -> engine.State:
        """A state that has read what is kept of tokens and media tokens, and has room for so many."""
        (kept, places), (seen, most) = tokens, media
        places, most = ladder(places, LEAST), ladder(most)
        try:
            if not kept:
                how = {"rows": rows, "places": places, "dtype": self._dtype, "stacked": self._stacked, "media": most}
                return self._on(engine.run_empty, self.cfg, **how)
            state = engine.rewound(self._state, kept, read.position(kept), seen)
            return engine.grown(state, places, most)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                f"There is no memory for a cache of {rows} × {places:,} tokens; ask for fewer, or shorter answers."
            ) from error

    def _media(self, batch: Batch, documents: Sequence[Document], frames: int) -> Media | None:
        if not isinstance(self.cfg, vlm.Config) or not np.asarray(batch.grid).any():
            return None
        if self.store is not None:
            its = self.processor
            how = features.How(its.sequence, clips=its.clips, frames=frames, other=its.preprocessing)
            views = (np.asarray(batch.grid).prod(-1) > 0).sum(1).tolist()
            names = [
                features.last(features.named(document, its.layout(document), self._tower, how), n)
                for document, n in zip(documents, views, strict=True)
            ]
            return self._on(features.media, self.params, batch, self.cfg, names, self.store)
        return self._on(engine.run_media, self.params, prompts.seen(batch), cfg=self.cfg)

    def _on(self, run: Callable, *args: Any, **kwargs: Any) -> Any:
        """run(…) where the parameters are."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return run(*args, **kwargs)
