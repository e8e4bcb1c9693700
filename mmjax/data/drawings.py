"""The built-in dataset: questions about 1,594 emoji in three drawing styles, one of which is never trained on."""

import functools
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from mmjax.core.errors import InputError
from mmjax.data import augment as augmentation
from mmjax.sequence.document import Document, Image, Text
from mmjax.tokenizers import image as images

STYLES = ("twemoji", "fluent", "noto")
NAMING = "What is this?"
SAME = "Are these the same thing?"
WHICH = "Which one is the {}?"
KIND = "What kind of thing is this?"


@dataclass(frozen=True)
class Config:
    """Which concepts are asked about, and how often which question.

    The concepts are drawn by `seed` from all names of one word, or from all names. Questions with two pictures also use
    the other concepts, with the probability `others`: what makes two drawings the same thing is learnt from all of
    them.
    """

    concepts: int = 62
    names: Literal["words", "all"] = "words"  # drawn from 512 names of one word, or from all 1,594
    seed: int = 0
    held_out: str = "noto"
    naming: float = 0.9  # shares of the questions; they need not add up to one
    same: float = 0.05
    which: float = 0.05
    kind: float = 0.2  # probability that a naming document goes on to ask for the kind
    others: float = 0.5
    blend: float = 0.3  # probability that a training picture is a mixture of both training styles
    beyond: float = 0.0  # how far a mixture may go past either style, as a share of their difference
    grow: int = 0  # documents over which augmentation grows to its full strength (Tan & Le 2021, EfficientNetV2)
    shortest: int = 32  # a training picture's longer side is drawn from here …
    longest: int = 48  # … to here
    augment: augmentation.Config = field(default_factory=augmentation.Config)


@dataclass(frozen=True)
class Concept:
    """One emoji; `size` is (height, width) by style."""

    code: str
    name: str
    group: str
    size: dict[str, tuple[int, int]] = field(hash=False)


@functools.cache
def archive() -> tuple[tuple[Concept, ...], dict[str, bytes]]:
    """All concepts and all encoded drawings by "style/code", read once from the package."""
    data = resources.files("mmjax.data.samples").joinpath("drawings.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        rows = json.loads(z.read("drawings.json"))
        files = {name.removesuffix(".webp"): z.read(name) for name in z.namelist() if name.endswith(".webp")}
    concepts = tuple(
        Concept(r["code"], r["name"], r["group"], {style: tuple(r[style]) for style in STYLES}) for r in rows
    )
    return concepts, files


@functools.cache
def pixels(style: str, code: str) -> UInt8[np.ndarray, "h w 3"]:
    """A drawing, decoded once (all of them take 20 MB)."""
    return images.decode(archive()[1][f"{style}/{code}"])


def tokenizer_model() -> bytes:
    """The SentencePiece model made for this dataset's words (samples/build.py)."""
    return resources.files("mmjax.data.samples").joinpath("text.model").read_bytes()


def named(cfg: Config) -> tuple[Concept, ...]:
    """The concepts that are asked by name: drawn by cfg.seed from all names of one word, or from all names."""
    words = [c for c in archive()[0] if cfg.names == "all" or c.name.isalpha()]
    if not 2 <= cfg.concepts <= len(words):
        raise InputError(
            f"data.concepts is {cfg.concepts}; give 2 to {len(words)}, the number of "
            f"{'one-word ' * (cfg.names == 'words')}names."
        )
    picked = np.random.default_rng(cfg.seed).choice(len(words), cfg.concepts, replace=False)
    return tuple(words[i] for i in sorted(picked))


def corpus() -> list[str]:
    """Every sentence the dataset can say: what its tokenizer is trained on."""
    concepts = archive()[0]
    names = [c.name for c in concepts]
    fixed = [NAMING, SAME, KIND, "yes", "no", "first", "second", *sorted({c.group for c in concepts})]
    # Weighted roughly as the questions are asked, so that common words become one token.
    return 300 * fixed + 3 * [n for n in names if n.isalpha()] + names + [WHICH.format(n) for n in names]


class Training(Sequence):
    """An endless list of training documents, of which the first `length` are used: number n depends on the seed alone.

    Never shows a drawing in the held-out style.
    """

    def __init__(self, cfg: Config, length: int, seed: int):
        if cfg.held_out not in STYLES:
            raise InputError(f"data.held_out is {cfg.held_out!r}; give one of the styles {', '.join(STYLES)}.")
        self.cfg, self.length, self.seed = cfg, length, seed
        self.styles = tuple(s for s in STYLES if s != cfg.held_out)
        self.named = named(cfg)
        self.all = archive()[0]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> Document:
        if not 0 <= n < self.length:
            raise IndexError(n)
        rng = np.random.default_rng((self.seed, n))
        strength = min(1.0, n / self.cfg.grow) if self.cfg.grow else 1.0
        shares = np.array([self.cfg.naming, self.cfg.same, self.cfg.which])
        ask = (self._naming, self._same, self._which)[rng.choice(3, p=shares / shares.sum())]
        return Document(f"drawings/{self.seed}/{n}", tuple(ask(rng, functools.partial(self._image, strength=strength))))

    def _two(self, rng: np.random.Generator) -> tuple[Concept, Concept]:
        pool = self.all if rng.random() < self.cfg.others else self.named
        a, b = rng.choice(len(pool), 2, replace=False)
        return pool[a], pool[b]

    def _image(self, concept: Concept, rng: np.random.Generator, style: str | None = None, *, strength: float) -> Image:
        style = style or self.styles[rng.integers(len(self.styles))]
        height, width = concept.size[style]
        scale = rng.integers(self.cfg.shortest, self.cfg.longest + 1) / max(height, width)
        height, width = max(12, round(height * scale)), max(12, round(width * scale))
        key = int(rng.integers(2**63))
        return Image(height, width, functools.partial(self._draw, concept, style, height, width, key, strength))

    def _draw(self, concept: Concept, style: str, height: int, width: int, key: int, strength: float) -> np.ndarray:
        rng = np.random.default_rng(key)
        picture = pixels(style, concept.code)
        if rng.random() < self.cfg.blend:
            other = self.styles[1 - self.styles.index(style)]
            picture = mix(picture, pixels(other, concept.code), self.cfg.beyond, rng)
        return augmentation.augment(picture, height, width, self.cfg.augment, rng, strength)

    def _naming(self, rng: np.random.Generator, image: Callable[..., Image]) -> list[Image | Text]:
        concept = self.named[rng.integers(len(self.named))]
        spans = [image(concept, rng), Text(NAMING), Text(concept.name, "assistant", True)]
        if rng.random() < self.cfg.kind:
            spans += [Text(KIND), Text(concept.group, "assistant", True)]
        return spans

    def _same(self, rng: np.random.Generator, image: Callable[..., Image]) -> list[Image | Text]:
        first, second = self._two(rng)
        same = rng.random() < 0.5
        # The same thing in the other style, so that comparing pixels does not answer.
        styles = [self.styles[i] for i in rng.permutation(2)]
        pictures = [image(first, rng, styles[0]), image(first if same else second, rng, styles[1])]
        return [*pictures, Text(SAME), Text("yes" if same else "no", "assistant", True)]

    def _which(self, rng: np.random.Generator, image: Callable[..., Image]) -> list[Image | Text]:
        first, second = self._two(rng)
        answer = int(rng.integers(2))
        name = (first, second)[answer].name
        pictures = [image(first, rng), image(second, rng)]
        return [*pictures, Text(WHICH.format(name)), Text(("first", "second")[answer], "assistant", True)]


def mix(a: np.ndarray, b: np.ndarray, beyond: float, rng: np.random.Generator) -> np.ndarray:
    """Two drawings of one thing laid over each other, at a's size: a drawing in a style between both, or past one."""
    share = np.float32(rng.uniform(-beyond, 1 + beyond))
    other = images.resize(b, *a.shape[:2])
    return np.clip(share * a + (1 - share) * other + np.float32(0.5), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Question:
    """A held-out question: the document up to the answer, and the answer."""

    document: Document
    question: str
    answer: str
    concept: Concept


def held_out(cfg: Config) -> list[Question]:
    """Naming every concept from its drawing in the held-out style, at its own size, unaltered."""
    style = cfg.held_out
    out = []
    for c in named(cfg):
        picture = Image(*c.size[style], archive()[1][f"{style}/{c.code}"])
        document = Document(f"drawings/{style}/{c.code}", (picture, Text(NAMING)))
        out.append(Question(document, NAMING, c.name, c))
    return out


def nearest_neighbour(cfg: Config, side: int = 32) -> float:
    """The baseline: the share of held-out drawings whose nearest training drawing, pixel by pixel, has their name.

    All drawings are resized to side × side; the distance is Euclidean.
    """

    def table(style: str) -> np.ndarray:
        drawings = [images.resize(pixels(style, c.code), side, side) for c in named(cfg)]
        return np.stack(drawings).reshape(len(drawings), -1).astype(np.float64)

    queries = table(cfg.held_out)
    distance = np.stack(
        [np.square(queries[:, None] - table(style)[None]).sum(-1) for style in STYLES if style != cfg.held_out]
    )
    return float((distance.min(0).argmin(1) == np.arange(len(queries))).mean())
