"""All that is known before anything is compiled or written: documents, their plan, and what the run is judged by."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from mmjax.convert.processor.text import reader
from mmjax.core.errors import InputError
from mmjax.data import drawings, index, sets
from mmjax.data.memory import Memory
from mmjax.data.source import Holes, Source
from mmjax.models import vlm
from mmjax.sequence import interleave
from mmjax.sequence.batch import Bucket
from mmjax.sequence.budget import Budget, Limited
from mmjax.sequence.document import Document
from mmjax.sequence.layout import Layout, layout, patches_of
from mmjax.sequence.split import split
from mmjax.tokenizers import conventions, text
from mmjax.tokenizers.chat import Chat
from mmjax.train import start
from mmjax.train.answers import Answers, asked
from mmjax.train.config import Config
from mmjax.train.evaluate import HeldOut, Questions


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run is fed with.

    tokenizer: of its texts (with a convention, where the config names one). writing: the fingerprint of all that turns
    documents into arrays: of the tokenizer, or of the base's processor. training: its batches. evaluation: what it
    is judged by. fingerprints: of its datasets, by name.
    """

    tokenizer: Any
    writing: str
    training: Source
    evaluation: Questions | HeldOut | Answers
    fingerprints: dict[str, str]


def prepare_data(cfg: Config, parts: tuple[int, ...] = (0,), of: int = 1) -> Data:
    """Tokenizer, documents, plans: on the host, from lengths and headers alone.

    `parts` of `of` are the shares of every batch's rows that this process loads (train.cluster.parts).

    Raises:
      InputError: a setting that does not fit another (vocabulary, patch size, rows and devices), a dataset that cannot
        be read.
    """
    its = start.processor(cfg) if cfg.base else None
    own = isinstance(cfg.data, sets.Mixed) and (
        cfg.data.tokenizer or cfg.data.reader or cfg.data.convention != sets.GENERIC
    )
    if its and own:
        raise InputError(
            f"The base {cfg.base} writes documents with its own tokenizer and template; leave data.tokenizer, "
            f"data.reader and data.convention out."
        )
    tokenizer, lay = _writer(cfg) if its is None else (its.chat, start.layout_of(its))
    _refuse(cfg, tokenizer, of)
    plain = lay
    if cfg.budget != Budget():
        clips = None if its is None else its.clips
        lay = Limited(lay, cfg.budget, cfg.resolution, clips, costs=vlm.costs(cfg.model, cfg.sequence))
    packing = cfg.packing
    # More documents than any packing could use: they cost nothing until they are read.
    most = cfg.steps * packing.rows * (packing.tokens + cfg.sequence.answer)
    if isinstance(cfg.data, drawings.Config):
        documents, held_out, fingerprints = drawings.Training(cfg.data, most, cfg.seed), {}, {}
    else:
        opened = sets.open_sources(cfg.data, cfg.seed, most)
        documents, held_out, fingerprints = opened.training, opened.held_out, opened.fingerprints
    epochs = 0 if isinstance(cfg.data, drawings.Config) else cfg.data.epochs
    said = _said(cfg) if its is None else its.reader and its.reader.beside
    fitting = _fitting(cfg, lay, said)
    plan = index.training(
        documents,
        fitting,
        steps=None if epochs else cfg.steps,
        k=packing.buckets,
        tokens=packing.tokens,
        rows=packing.rows,
        seed=cfg.seed,
        patches=packing.patches,
        fixed=fixed_buckets(cfg),
        long=packing.long,
        answers=cfg.sequence.answer,
    )
    if epochs and len(plan.steps) != cfg.steps:
        give = "give --stages whose steps add up to" if cfg.stages else "set steps to"
        raise InputError(
            f"data.epochs is {epochs}, which takes {len(plan.steps)} steps of these documents, but steps is "
            f"{cfg.steps}; {give} {len(plan.steps)}, or mix by weights (data.epochs 0)."
        )
    made = functools.partial(
        Source,
        vocab=tokenizer.vocab,
        patch=cfg.patch,
        cfg=cfg.sequence,
        latents=cfg.model.per_picture,
        merge=cfg.sequence.merge,
        memory=Memory(packing.memory * 2**20),
        reduced=packing.reduced,
        said=said,
        parts=parts,
        of=of,
    )
    training = made(documents, lay, plan, holes=Holes(packing.holes))
    if isinstance(cfg.data, drawings.Config):
        evaluation = _questions(cfg, plain, made, tokenizer)
    else:
        evaluation = _held_out(cfg, held_out, fitting, functools.partial(made, layout=lay))
    if its is not None and isinstance(evaluation, HeldOut):
        evaluation = Answers(evaluation, {name: asked(of) for name, of in held_out.items()}, its)
    writing = tokenizer.fingerprint if its is None else its.fingerprint
    return Data(tokenizer, writing, training, evaluation, fingerprints)


def _said(cfg: Config) -> Callable[[Document, int], Any] | None:
    """What the connector reads beside pictures, from documents, where there is no base that says so."""
    path = None if isinstance(cfg.data, drawings.Config) else cfg.data.reader
    if cfg.model.asks != (path is not None):
        raise InputError(
            f"The connector {'reads' if path is None else 'does not read'} a text beside each picture, and data.reader "
            f"is {path}; give the directory of its tokenizer where it does."
        )
    if path is None:
        return None
    its = reader(path)
    if its.tokenizer.size > cfg.model.connector.vocab:
        raise InputError(
            f"model.connector.vocab is {cfg.model.connector.vocab}, and the tokenizer in {path} has "
            f"{its.tokenizer.size} ids; set it to that, or more."
        )
    return its.beside


def _fitting(cfg: Config, lay: Callable[[Document], Layout], said: Callable | None) -> Callable[[Document], Layout]:
    """The layout of documents that a batch can hold: others are refused when they are measured, not when they come."""

    def laid(document: Document) -> Layout:
        out = lay(document)
        interleave.refuse(out, cfg.sequence)
        if said is not None and out.images:
            interleave.refuse_instruction(document.id, said(document, out.images), cfg.sequence.instruction)
        return out

    return laid


def fixed_buckets(cfg: Config) -> tuple[Bucket, ...]:
    """The buckets that `packing.shapes` gives; none where they are to be chosen. For text alone there is one."""
    rows, tokens = cfg.packing.rows, cfg.packing.tokens
    shapes = cfg.packing.shapes if cfg.model.sees else ((0, 0),)
    return tuple(Bucket(rows, tokens, *shape, answers=cfg.sequence.answer) for shape in shapes)


def _writer(cfg: Config) -> tuple[Any, Callable[..., Layout]]:
    """The tokenizer, and what lays documents out."""
    tokenizer = _tokenizer(cfg.data, cfg.model.newline)
    lay = functools.partial(
        layout,
        tokenizer=tokenizer,
        resolution=cfg.resolution,
        media_tokens=cfg.model.connector.tokens if cfg.model.sees else patches_of,
        fuse="sequence" if cfg.model.decoder.cross is None else "cross",
        parted=cfg.sequence.answer > 0,
    )
    return tokenizer, lay


def _tokenizer(data: drawings.Config | sets.Mixed, newline: bool) -> Any:
    """`newline`: the model has a vector for the ends of a picture's rows, which any id may mark: the picture's does."""
    if isinstance(data, drawings.Config):
        return text.load(drawings.tokenizer_model(), exact=True)
    if data.tokenizer is None:
        raise InputError("data.tokenizer is None, and there is no base whose own could be used; name one.")
    chat = Chat(text.load(data.tokenizer), conventions.find(data.convention))
    if newline:
        chat.vocab = dataclasses.replace(chat.vocab, image_newline=chat.vocab.image)
    return chat


def _refuse(cfg: Config, tokenizer: Any, of: int) -> None:
    if cfg.questions < 0:
        raise InputError(f"questions is {cfg.questions}; give how many of each dataset are asked, or 0 for all.")
    # Published models have more: their tables are padded to a round number.
    if tokenizer.vocab.size > cfg.model.decoder.vocab:
        raise InputError(
            f"model.decoder.vocab is {cfg.model.decoder.vocab} but the tokenizer has {tokenizer.vocab.size} ids; "
            f"set it to {tokenizer.vocab.size}, or more."
        )
    refuse_model(cfg)
    refuse_rows(cfg, of)
    if not cfg.model.sees and isinstance(cfg.data, drawings.Config):
        raise InputError(
            "The built-in drawings are pictures, and the model reads text alone; train it on files (data.sources)."
        )
    if cfg.model.decoder.answers and isinstance(cfg.data, drawings.Config):
        raise InputError(
            "The built-in drawings are judged by answers that go on with the question, which an encoder–decoder's do "
            "not; train it on files (data.sources)."
        )
    given = cfg.model.placeholder
    if given is not None and tokenizer.vocab.image not in ((given,) if isinstance(given, int) else given):
        raise InputError(
            f"model.placeholder is {given} but the tokenizer's image token is {tokenizer.vocab.image}; set it to that."
        )


def refuse_model(cfg: Config) -> None:
    """Raises InputError where the model does not fit its inputs, whatever the mesh and the documents."""
    told = cfg.resolution is not None, bool(cfg.packing.patches or cfg.packing.shapes)
    if not cfg.model.sees and any(told):
        name = "resolution" if told[0] else "packing.patches or packing.shapes"
        raise InputError(f"The model reads text alone, and {name} is of pictures; leave it out (resolution: None).")
    if cfg.model.sees and cfg.resolution is None:
        raise InputError("The model sees pictures, and resolution is None; give a policy of theirs.")
    if cfg.model.sees and cfg.resolution.patch != cfg.model.vision.embed.patch:
        raise InputError(
            f"resolution.patch is {cfg.resolution.patch} but model.vision.embed.patch is "
            f"{cfg.model.vision.embed.patch}; set both to the same number of pixels."
        )
    longest = cfg.model.decoder.longest
    if longest is not None and cfg.packing.tokens > longest:
        raise InputError(
            f"packing.tokens is {cfg.packing.tokens}, but the decoder has learned positions of {longest} tokens; set "
            f"it to {longest} at most, or model.decoder.positions.rows higher."
        )
    cfg.model.refuse(cfg.sequence)


def refuse_rows(cfg: Config, of: int) -> None:
    """Raises InputError where `of` devices cannot share a batch's rows."""
    parts = of * cfg.update.accumulate
    if cfg.packing.rows % parts:
        raise InputError(
            f"packing.rows is {cfg.packing.rows}, which {of} devices of the data and fsdp axes cannot share evenly in "
            f"each of {cfg.update.accumulate} parts (update.accumulate); set it to a multiple of {parts}."
        )


def _questions(cfg: Config, plain: Callable, made: Callable[..., Source], tokenizer: Any) -> Questions:
    """The held-out drawings."""
    questions = drawings.held_out(cfg.data)
    ask = functools.partial(plain, answer=cfg.answer)
    asked = [q.document for q in questions]
    once = index.once(asked, ask, tokens=cfg.packing.tokens, rows=cfg.packing.rows)
    return Questions(questions, made(asked, ask, once), tokenizer, drawings.nearest_neighbour(cfg.data))


def _held_out(
    cfg: Config, held_out: dict[str, Sequence[Document]], lay: Callable, made: Callable[..., Source]
) -> HeldOut:
    """The documents held out of every source, all in one shape, so that one program judges them."""
    if cfg.packing.long == "split":
        unlimited = index.NO_LIMIT, index.NO_LIMIT
        room = (cfg.packing.tokens, cfg.packing.patches or index.NO_LIMIT, *unlimited, cfg.sequence.answer)
        held_out = {name: [part for d in of for part in split(d, lay, room)] for name, of in held_out.items()}
    every = [document for name in held_out for document in held_out[name]]
    if not every:
        return HeldOut({})
    room = {"tokens": cfg.packing.tokens, "rows": cfg.packing.rows, "answers": cfg.sequence.answer}
    shape = index.once(every, lay, **room).buckets[0] if cfg.model.sees else fixed_buckets(cfg)[0]
    plans = {name: index.once(documents, lay, shape=shape, **room) for name, documents in held_out.items()}
    return HeldOut(
        {
            name: made(documents, plan=plans[name], holes=Holes(cfg.packing.holes))
            for name, documents in held_out.items()
        }
    )
