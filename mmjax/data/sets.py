"""Which datasets a run learns from, and in which convention they are written: named in its config."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmjax.core.errors import InputError
from mmjax.data import drawings
from mmjax.data.mixture import Mixture, permute
from mmjax.sequence.document import Document
from mmjax.tokenizers.convention import Convention

GENERIC = "generic"
KEY = b"held out"  # of the order from whose end documents are held out: it must never change


@dataclass(frozen=True)
class Files:
    """A dataset on disk; see data.formats.open_dataset.

    name: in ids and results; "": the file's own. weight: how many documents of it come, in proportion to the others.
    schema: how its records are read; "": what the first record speaks for. root: the folder of its pictures, None: its
    own. errors: how many places may be left out: records, and damaged parts of a file (a row group is one). place:
    where LLaVA's pictures go; "bare" for LLaVA's own conventions. missing: what becomes of a page whose picture is not
    there.
    """

    path: Path
    name: str = ""
    weight: float = 1.0
    schema: str = ""
    root: Path | None = None
    errors: int = 0
    place: Literal["as_written", "front", "bare"] = "as_written"
    missing: Literal["refuse", "skip_image"] = "refuse"


@dataclass(frozen=True)
class Drawings:
    """The built-in questions about drawings, without end."""

    questions: drawings.Config = field(default_factory=drawings.Config)
    name: str = "drawings"
    weight: float = 1.0


@dataclass(frozen=True)
class Mixed:
    """A mixture of datasets.

    sources: of documents.
    tokenizer: a SentencePiece model, a tokenizer.json or a Hugging Face directory; None: that of the run's base.
    convention: how conversations are written, by name (tokenizers.conventions), or in a way of one's own
      (tokenizers.convention); a base writes them by its own template.
    epochs: 0: the sources are mixed by their weights and begun again as often as it takes; above 0: each is used so
      many times, in proportion to its size.
    reader: a directory with the tokenizer.json of what the connector reads beside each picture, the question
      (InstructBLIP: BERT's); None: it reads none.
    held_out: documents of each source that are never trained on; their loss is the run's result.
    evaluation: datasets that are never trained on, which judge the run too.
    """

    sources: tuple[Files | Drawings, ...]
    tokenizer: Path | None = None
    convention: str | Convention = GENERIC
    epochs: int = 0
    held_out: int = 64
    reader: Path | None = None
    evaluation: tuple[Files, ...] = ()


class Some(Sequence):
    """Documents of another list, by number; `shuffled`: of all of them in an order that depends on their number."""

    def __init__(self, of: Sequence[Document], start: int, stop: int, shuffled: bool = True):
        self.of, self.start, self.stop, self.shuffled = of, start, stop, shuffled

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, n: int) -> Document:
        if not 0 <= n < len(self):
            raise IndexError(n)
        place = self.start + n
        return self.of[permute(place, len(self.of), KEY) if self.shuffled else place]


@dataclass(frozen=True)
class Opened:
    """What a config names.

    training: all that may be trained on. held_out: by source. fingerprints: of each source: the same for the same
    documents.
    """

    training: Mixture
    held_out: dict[str, Sequence[Document]]
    fingerprints: dict[str, str]


def open_sources(cfg: Mixed, seed: int, length: int) -> Opened:
    """Opens every source and parts what is held out from what is trained on.

    Args:
      cfg: names them.
      seed: of the order.
      length: of the mixture, and of drawings: more than a run can use; not used with cfg.epochs.

    Raises:
      InputError: a source that cannot be opened, has no more documents than are held out, or no end where epochs are
        asked for.
    """
    if not cfg.sources:
        raise InputError("data.sources is empty; name at least one dataset.")
    if cfg.held_out < 0 or cfg.epochs < 0:
        raise InputError(f"data.held_out is {cfg.held_out} and data.epochs {cfg.epochs}; give 0 or more of each.")
    if cfg.epochs and any(isinstance(source, Drawings) for source in cfg.sources):
        raise InputError(
            f"data.epochs is {cfg.epochs}, but there is no end to drawings; leave them out, or mix by weights (epochs "
            f"0)."
        )
    if cfg.epochs and any(source.weight != 1.0 for source in cfg.sources):
        raise InputError(
            f"data.epochs is {cfg.epochs}, so every source comes whole, and weights say nothing; leave them "
            f"out, or mix by them (epochs 0)."
        )
    training, held_out, fingerprints, names = [], {}, {}, []
    for source in cfg.sources:
        name, documents, told = open_source(source, seed, length)
        if name in names:
            raise InputError(f"Two of data.sources are called {name!r}; give each a name of its own.")
        names.append(name)
        if len(documents) <= cfg.held_out:
            raise InputError(
                f"Source {name!r} has {len(documents)} documents, and data.held_out is {cfg.held_out}; hold out fewer."
            )
        if isinstance(source, Drawings):
            # As many as the run could use: an order of them all would hold out others where a run is longer.
            training.append(Some(documents, cfg.held_out, len(documents), shuffled=False))
            grown = drawings.Training(dataclasses.replace(source.questions, grow=0), length, seed)
            apart = Some(grown, 0, cfg.held_out, shuffled=False)
        else:
            training.append(Some(documents, cfg.held_out, len(documents)))
            apart = Some(documents, 0, cfg.held_out)
        held_out |= {name: apart} if cfg.held_out else {}
        fingerprints[name] = told
    for source in cfg.evaluation:
        name, documents, told = open_source(source, seed, length)
        if name in held_out:
            raise InputError(f"Two datasets that judge the run are called {name!r}; give each a name of its own.")
        held_out[name], fingerprints[f"evaluation {name}"] = documents, told
    if cfg.epochs:
        mixture = Mixture(training, names=names, epochs=cfg.epochs, seed=seed)
    else:
        mixture = Mixture(training, [s.weight for s in cfg.sources], names=names, length=length, seed=seed)
    return Opened(mixture, held_out, fingerprints)


def open_source(source: Files | Drawings, seed: int = 0, length: int = 0) -> tuple[str, Sequence[Document], str]:
    """Name, documents and fingerprint of a source."""
    if isinstance(source, Drawings):
        return source.name, drawings.Training(source.questions, length, seed), f"drawings {seed} {source.questions}"
    from mmjax.data import formats  # with what reads Parquet and archives

    found = formats.open_dataset(
        source.path,
        schema=source.schema or None,
        root=source.root,
        errors=source.errors,
        place=source.place,
        missing=source.missing,
    )
    return source.name or found.name, found, found.fingerprint
