"""From a Hugging Face directory to batches: its tokenizer, its chat template and its processors of pictures and videos.

    processor = load("path/to/llava-1.5-7b-hf")
    question = Document("q", (Image(h, w, "cat.jpg"), Text("What is this?")))
    batch = processor.batch([question])       # token ids, patches, grids and positions as transformers gives them

A conversation is written by the directory's template; a document outside of conversations (`role="document"`) as its
text is, behind the token that the tokenizer begins every text with. Media enter where they stand in the document: text
that says "<image>" is text.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mmjax.convert.huggingface import Model
from mmjax.convert.processor import files
from mmjax.convert.processor import images as settings
from mmjax.convert.processor.families import family_of
from mmjax.convert.processor.family import Family, stops
from mmjax.convert.processor.files import Found
from mmjax.convert.processor.text import Reader, chats, films_of, load_tokenizer, reader, start_of
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike
from mmjax.nn.patch_embed import HALF, Colours
from mmjax.sequence import batch as batches
from mmjax.sequence import interleave, media
from mmjax.sequence.batch import Batch, Bucket, Values
from mmjax.sequence.buckets import ladder
from mmjax.sequence.document import Document, Image, Text, Video
from mmjax.sequence.interleave import Example
from mmjax.sequence.layout import Clips, Grid, Layout, layout, patches_of
from mmjax.tokenizers.canvas import Canvas
from mmjax.tokenizers.chat import Chat
from mmjax.tokenizers.patches import Pixels
from mmjax.tokenizers.resolution import Ended, Fixed, Policy
from mmjax.tokenizers.tiles import AnyRes, Splits, Tiles
from mmjax.tokenizers.vocab import Vocab

FEWEST = 16  # tokens and patches of the smallest bucket


@dataclass(frozen=True, eq=False)
class Processor:
    """Documents to what a model reads.

    chat: writes conversations; `chat.convention.template` is None where the directory has no template.
    plain: the same tokenizer, for documents outside of conversations.
    sequence: which descriptors the model wants.
    stops: token ids that end an answer.
    resolution, clips: the policies of pictures and videos; None: the model takes none.
    several: the policy of pictures where a document has more than one (LLaVA-OneVision); None: the same.
    colours: mean and deviation that its encoder normalises bytes with (`with_colours`).
    per_picture: media tokens of a picture, where their number is fixed.
    prompts: whether a question is written as its text is, where the directory has no template.
    reader: tokenizes what the connector reads beside each picture, the question (InstructBLIP).
    patch: pixels a side. group: pictures of a clip in a patch.
    films: writes conversations with videos; None: `chat` does.
    """

    chat: Chat
    plain: Chat
    sequence: interleave.Config
    stops: tuple[int, ...]
    resolution: Policy | None = None
    clips: Clips | None = None
    colours: Colours = HALF
    patch: int = 0
    group: int = 1
    several: Ended | None = None
    per_picture: int = 0
    prompts: bool = False
    reader: Reader | None = None
    films: Chat | None = None

    @property
    def vocab(self) -> Vocab:
        """The ids that the sequence code asks for by name."""
        return self.chat.vocab

    @property
    def values(self) -> Values:
        """Bytes in a patch of a picture. With a video in a batch there are `group` times as many."""
        return Values(self.patch * self.patch * 3)

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal: equal ones make equal arrays of every document."""
        counted = f"{self.sequence} {self.per_picture}"
        parts = (self.chat.fingerprint, self.plain.fingerprint, self.preprocessing, counted)
        parts += tuple(other.fingerprint for other in (self.reader, self.films) if other is not None)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def preprocessing(self) -> str:
        """All that a picture's or a video's patches depend on besides its own pixels, in words."""
        parts = (self.resolution, self.several, self.clips, self.colours, self.patch, self.group, self.sequence.merge)
        return " ".join(map(str, parts))

    def at(self, resolution: Policy | None) -> "Processor":
        """The same with pictures of another resolution, those that are not alone too: `several` becomes alike.

        Where it is another kind of policy than the directory's, all pictures are shown by it.
        """
        several = self.several
        if resolution != self.resolution and several is not None:
            several = _alike(several, resolution) if isinstance(resolution, AnyRes) else None
        return dataclasses.replace(self, resolution=resolution, several=several)

    def media_tokens(self, grid: Grid) -> int:
        """Tokens that a grid of patches takes in the sequence."""
        return self.per_picture or patches_of(grid) // self.sequence.merge**2

    def layout(
        self,
        document: Document,
        answer: int = 0,
        *,
        ask: bool | None = None,
        resolution: Policy | None = None,
        clips: Clips | None = None,
        skip: Collection[int] = (),
    ) -> Layout:
        """What a document takes, before any pixel is decoded.

        Args:
          document: a conversation, or a text outside of conversations.
          answer: so many empty places after what opens an answer.
          ask: whether what opens an answer stands at the end. None: where the last turn is not the assistant's.
          resolution, clips: the policies of this document, where not the processor's; `several` stays what it is.
          skip: numbers of spans to leave out.

        Raises:
          InputError: the directory has no template for conversations; text or media that the model does not take.
        """
        seen = [n for n, span in enumerate(document.spans) if not isinstance(span, Text)]
        if seen and self.resolution is None:
            raise InputError(
                f"Document {document.id!r}, span {seen[0]} is no text, and this model reads nothing else; leave it out."
            )
        policies = {"resolution": resolution, "clips": self.clips if clips is None else clips, "skip": skip}
        roles = {span.role for span in document.spans}
        if roles == {"document"}:
            return self._laid(document, self.plain, answer, ask=False, **policies)
        film = self.films is not None and any(isinstance(span, Video) for span in document.spans)
        if self.chat.convention.template is None and not self.prompts and not film:
            raise InputError(
                f"Document {document.id!r} is a conversation, but the model's directory has no chat template; write "
                f"the prompt yourself as spans of the role 'document'."
            )
        asked = document.spans[-1].role != "assistant" if ask is None else ask
        return self._laid(document, self.films if film else self.chat, answer, ask=asked, **policies)

    def _laid(self, document: Document, chat: Chat, answer: int, *, resolution: Policy | None, **how: Any) -> Layout:
        pictures = sum(isinstance(s, Image) for n, s in enumerate(document.spans) if n not in how["skip"])
        policy = self.several if self.several is not None and pictures > 1 else resolution or self.resolution
        fuse = "sequence" if self.sequence.cross == "none" else "cross"
        parted = self.sequence.answer > 0
        return layout(document, chat, policy, self.media_tokens, answer, fuse=fuse, parted=parted, **how)

    def example(
        self, document: Document, answer: int = 0, *, ask: bool | None = None, frames: int | None = None
    ) -> tuple[Example, list[Pixels]]:
        """A document's descriptor, and its media as `sequence.batch.build` wants them.

        Args:
          document, answer, ask: as for `layout`.
          frames: pictures in a patch. None: `group` where the document has a video, else 1.

        Raises:
          InputError: as for `layout`, and where a medium cannot be read.
        """
        laid = self.layout(document, answer, ask=ask)
        example = interleave.interleave(laid, self.vocab, self.sequence)
        if self.reader is not None:
            example = dataclasses.replace(example, instruction=self.reader.beside(document, len(example.grid)))
        frames = self.frames([document]) if frames is None else frames
        return example, media.read(document, laid, self.patch, frames)

    def described(self, examples: Sequence[Example]) -> interleave.Config:
        """The descriptors of a batch of these, one in a row: `sequence`, with room for what the connector reads."""
        if self.reader is None:
            return self.sequence
        longest = max(x.instruction.shape[1] for x in examples)
        return dataclasses.replace(self.sequence, instruction=max(FEWEST, ladder(longest)))

    def frames(self, documents: Sequence[Document]) -> int:
        """How many pictures a patch has in a batch of these documents."""
        film = any(isinstance(span, Video) for document in documents for span in document.spans)
        return self.group if film else 1

    def batch(
        self,
        documents: Sequence[Document],
        bucket: Bucket | None = None,
        *,
        answer: int = 0,
        ask: bool | None = None,
    ) -> Batch:
        """One document in each row, as NumPy arrays.

        Args:
          documents: at least one; different lengths and numbers of pictures are padded at the end of their rows.
          bucket: the sizes; left out, the smallest of `buckets` that holds them.
          answer, ask: as for `layout`.

        Raises:
          InputError: as for `example`; there is no document; or they do not fit the bucket.
        """
        if not documents:
            raise InputError("There is no document to make a batch of; give at least one.")
        frames = self.frames(documents)
        made = [self.example(document, answer, ask=ask, frames=frames) for document in documents]
        bucket = self.bucket([example.size for example, _ in made]) if bucket is None else bucket
        values = Values(self.values.patch * frames)
        cfg = self.described([example for example, _ in made])
        return batches.build([[one] for one in made], bucket, values, self.vocab, cfg)

    def bucket(self, sizes: Sequence[tuple[int, ...]]) -> Bucket:
        """The smallest bucket with a row for each document of these sizes (Layout.size).

        Tokens (of answers, too), patches and pictures are powers of two or one and a half times one, patches times what
        a picture has where all are of one size (or of whole tiles): so that a few compiled programs serve all lengths.
        """
        tokens, patches, images, _, answers = (max(of) for of in zip(*sizes, strict=True))
        unit = FEWEST
        if isinstance(self.resolution, Fixed | AnyRes | Splits | Tiles | Canvas):
            side = self.resolution.grid(1, 1)
            unit = side[0] * side[1]
        most = ladder(-(-patches // unit)) * unit if patches else 0
        answers = ladder(answers) if answers else 0
        return Bucket(len(sizes), max(FEWEST, ladder(tokens)), most, ladder(images) if images else 0, answers=answers)


def _alike(several: Ended, of: AnyRes) -> Ended:
    """The policy of pictures that are not alone, with the patch, tile and filter of the policy of single ones."""
    changes = {"patch": of.patch, "height": of.tile, "width": of.tile, "filter": of.filter, "drop": of.drop}
    return Ended(dataclasses.replace(several.whole, **changes))


def load(path: PathLike, model: Model | None = None) -> Processor:
    """The processor in a local directory, of either layout.

    Args:
      path: the directory of a model of text, or of one of the families in `convert.processor.families.FAMILIES`.
      model: what `huggingface.load` made of it, if it has: whether both are of one size is then checked.

    Raises:
      InputError: a file is missing, too large, or not what it should be; settings that mmjax does not reproduce, or
        that contradict each other; a tokenizer without the tokens that stand for media.
    """
    found = files.look(path)
    family = family_of(found)
    tokenizer = load_tokenizer(found)
    chat, plain = chats(found, family, tokenizer)
    _refuse_model(chat.vocab, model, found)
    ends = stops(found, tokenizer, chat.vocab, family)
    start = start_of(found)
    stream = {} if start is None else {"answer": 1, "start": start}
    if family is None:
        sequence = interleave.Config(position="sequential", **stream)
        return Processor(chat, plain, sequence, ends, prompts=start is not None)
    tower = family.tower(found.config)
    policy, colours = settings.still(found.images, tower, family.processors, family.readers)
    family.check(found, policy, tower)
    policy = family.refined(found, policy)
    clips = None
    if family.videos is not None:
        clips, other = family.videos(found, tower)
        if other != colours:
            raise InputError(
                f"{found.path} normalises pictures by {colours} and videos by {other}, but the encoder has one mean "
                f"and one deviation; use one directory's own files"
            )
    return Processor(
        chat,
        plain,
        dataclasses.replace(family.sequence(found.config, tower), **stream),
        ends,
        policy,
        clips,
        colours,
        tower.patch,
        tower.group,
        None if family.several is None else family.several(found, tower, policy, colours),
        family.per_picture(found.config),
        family.prompts,
        _reader(found, family, model),
        films_of(found, family, plain),
    )


def _reader(found: Found, family: Family, model: Model | None) -> Reader | None:
    """The tokenizer of what the connector reads; InputError where the model's words are fewer."""
    if not family.reader:
        return None
    out = reader(found.path / family.reader)
    rows = getattr(getattr(None if model is None else model.cfg, "connector", None), "vocab", None)
    if rows is not None and rows < out.tokenizer.size:
        raise InputError(
            f"The model's connector has a table of {rows:,} words, and the tokenizer in {found.path / family.reader} "
            f"{out.tokenizer.size:,}; use the files that belong together"
        )
    return out


def _refuse_model(vocab: Vocab, model: Model | None, found: Found) -> None:
    """Raises InputError where a model has other numbers than the directory."""
    decoder = getattr(None if model is None else model.cfg, "decoder", None if model is None else model.cfg)
    rows = getattr(decoder, "vocab", None)
    if rows is not None and rows != vocab.size:
        raise InputError(
            f"The model has a table of {rows:,} tokens, and {found.config.where} says {vocab.size:,}; give the model "
            f"that was loaded from this directory"
        )


def with_colours(model: Model, processor: Processor) -> Model:
    """The model whose encoder normalises pictures as the processor's directory says.

    Weights do not say what they were trained with: families have a default, and the directory may have another.
    """
    cfg = model.cfg
    if processor.resolution is None or getattr(cfg, "vision", None) is None:
        return model
    mean, deviation = processor.colours
    embed = dataclasses.replace(cfg.vision.embed, mean=mean, deviation=deviation)
    cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, embed=embed))
    origin = model.origin
    if origin is not None:
        origin = dataclasses.replace(origin, found=dataclasses.replace(origin.found, cfg=cfg))
    return dataclasses.replace(model, cfg=cfg, origin=origin)
