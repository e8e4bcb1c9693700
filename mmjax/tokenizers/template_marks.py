"""Who wrote which character of a rendered chat template: the template, or the texts it was given.

Texts are given to a template in disguise, their characters replaced by private ones that stand for a character and its
text. What comes back says of every character where it is from. A template that looks into its texts could be misled,
so there are several disguises, and each is held against the rendering of the plain texts.
"""

import secrets
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from mmjax.core.errors import InputError

PRIVATE = 0xF0000  # planes 15 and 16 of Unicode are for private use
LAST = (0xFFFE, 0xFFFF)  # of each plane: no characters
TEMPLATE, VARIABLE = -2, -1  # owners that are no text; the others are numbers of spans
QUOTED = '"\\'  # JSON, as which tools are written, has other ways for these: variables keep them
Disguise = Callable[[str, int], str]  # of a text and its owner


class Finder:
    """Finds strings in a text, the longest at each place; as fast with thousands of them as with ten."""

    def __init__(self, strings: Collection[str]):
        self.strings = frozenset(strings)
        self._lengths: dict[str, list[int]] = {}
        for first in {s[0] for s in self.strings}:
            self._lengths[first] = sorted({len(s) for s in self.strings if s[0] == first}, reverse=True)

    def at(self, text: str, place: int) -> int:
        """The length of the longest that begins here, 0 for none."""
        lengths = self._lengths.get(text[place], ())
        here = (text[place : place + n] for n in lengths if place + n <= len(text))
        return next((len(s) for s in here if s in self.strings), 0)

    def places(self, text: str) -> list[int]:
        """Where any of them begins, also within another."""
        found = []
        for first in self._lengths:
            place = text.find(first)
            while place >= 0:
                if self.at(text, place):
                    found.append(place)
                place = text.find(first, place + 1)
        return sorted(found)

    def runs(self, text: str) -> Iterator[tuple[int, int]]:
        """(begin, end) of each from left to right, none within another."""
        end = 0
        for place in self.places(text):
            if place >= end:
                end = place + self.at(text, place)
                yield place, end


class Codes:
    """Private characters and what they stand for: a text's character, or a mark between characters.

    taken: text whose own private characters are not used.
    """

    def __init__(self, taken: str):
        self._taken = {ord(c) for c in set(taken) if ord(c) >= PRIVATE}
        # A stranger who writes a text cannot know which they will be.
        self._next, self._left = secrets.randbelow(0x20000), 0x20000
        self._known: dict[tuple[int, str], str] = {}
        self.marks: dict[str, object] = {}
        self._chars = np.arange(PRIVATE, PRIVATE + 0x20000, dtype=np.uint32)
        self._owners = np.full(0x20000, TEMPLATE, np.int32)

    def of(self, char: str, owner: int) -> str:
        if (owner, char) not in self._known:
            code = self._known[owner, char] = self._new()
            self._chars[ord(code) - PRIVATE], self._owners[ord(code) - PRIVATE] = ord(char), owner
        return self._known[owner, char]

    def mark(self, meaning: object) -> str:
        """One that stands for nothing but this."""
        code = self._new()
        self.marks[code] = meaning
        return code

    def _new(self) -> str:
        while self._left:
            code, self._next, self._left = PRIVATE + self._next, (self._next + 1) % 0x20000, self._left - 1
            if code not in self._taken and code & 0xFFFF not in LAST:
                return chr(code)
        raise InputError("There are more different characters than can be told apart; split the document.")

    def read(self, rendered: str) -> tuple[np.ndarray, np.ndarray]:
        """The characters' numbers and owners; marks are still among them."""
        chars = np.frombuffer(rendered.encode("utf-32-le"), np.uint32).copy()
        owners = np.full(len(chars), TEMPLATE, np.int32)
        private = chars >= PRIVATE
        index = chars[private] - PRIVATE
        chars[private], owners[private] = self._chars[index], self._owners[index]
        return chars, owners


class Disguises:
    """The disguises for one document: `plain`, which only hides symbols, and those that say where characters are from.

    everything: all characters but white space, which templates trim; of variables also but quotes.
    edges: a mark at either end. For templates that change characters (upper case, JSON).
    strange: as everything, but not the words that the template itself compares with. For those that look for
      "</think>".
    """

    def __init__(self, codes: Codes, symbols: Finder, known: Collection[str]):
        self._codes, self._symbols = codes, symbols
        self._bare = frozenset(QUOTED).difference(*symbols.strings)  # what no symbol has is safe as it is
        self._known = known
        self._edges: dict[int, tuple[str, str]] = {}

    def plain(self, text: str, owner: int) -> str:
        """No symbol begins anywhere in what is returned."""
        return self._hidden(text, self._symbols.places(text), owner)

    def _hidden(self, text: str, places: Collection[int], owner: int) -> str:
        chars = list(text)
        for place in places:
            chars[place] = self._codes.of(chars[place], owner)
        return "".join(chars)

    def everything(self, text: str, owner: int) -> str:
        bare = self._bare if owner == VARIABLE else frozenset()
        return text.translate(
            {ord(c): self._codes.of(c, owner) for c in set(text) if not c.isspace() and c not in bare}
        )

    def edges(self, text: str, owner: int) -> str:
        text = self.plain(text, owner)
        inner = text.strip()
        if not inner:
            return text
        if owner not in self._edges:
            self._edges[owner] = self._codes.mark(("begin", owner)), self._codes.mark(("end", owner))
        begin = text.index(inner)
        before, after = self._edges[owner]
        return f"{text[:begin]}{before}{inner}{after}{text[begin + len(inner) :]}"

    def strange(self, text: str, owner: int) -> str:
        out, at = [], 0
        for begin, end in Finder([word for word in self._known if word in text]).runs(text):
            out += [self.everything(text[at:begin], owner)]
            hidden = [place - begin for place in self._symbols.places(text) if begin <= place < end]
            out += [self._hidden(text[begin:end], hidden, owner)]
            at = end
        return "".join(out) + self.everything(text[at:], owner)


def apart(words: Collection[str], symbols: Collection[str]) -> list[str]:
    """Those words that no symbol can overlap, whatever stands before and after them."""
    joined = "\n".join(symbols)
    heads = {s[:n] for s in symbols for n in range(1, len(s) + 1)}
    tails = {s[-n:] for s in symbols for n in range(1, len(s) + 1)}

    def free(word: str) -> bool:
        parts = range(1, len(word) + 1)
        return word not in joined and not any(word[:n] in tails or word[-n:] in heads for n in parts)

    return [word for word in words if word and not word.isspace() and free(word)]


@dataclass(frozen=True)
class Read:
    """A rendering without its disguise.

    text: as it would be without any.
    owner: i32[n], of each character the span it is of, `VARIABLE` or `TEMPLATE`.
    regions: (begin, end) of what stands between the generation tags.
    """

    text: str
    owner: np.ndarray
    regions: tuple[tuple[int, int], ...]


def read(rendered: str | None, codes: Codes) -> Read | None:
    """None where there is nothing, or marks are left without their partners."""
    if rendered is None:
        return None
    chars, owner = codes.read(rendered)
    places = [place for place, char in enumerate(rendered) if char in codes.marks] if codes.marks else []
    regions, opened = [], []
    for number, place in enumerate(places):
        kind, whose = codes.marks[rendered[place]]
        if kind == "begin":
            opened.append((place - number, place, whose))
            continue
        if not opened or opened[-1][2] != whose:
            return None
        begin, since, _ = opened.pop()
        if whose == "generation":
            regions.append((begin, place - number))
        else:
            owner[since:place] = whose
    if opened:
        return None
    chars, owner = np.delete(chars, places), np.delete(owner, places)
    return Read(chars.tobytes().decode("utf-32-le"), _filled(chars, owner), tuple(sorted(regions)))


def _filled(chars: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """White space between two characters of one text is that text's too."""
    known = np.flatnonzero(owner != TEMPLATE)
    if not len(known):
        return owner
    light = np.array([c for c in np.unique(chars).tolist() if chr(c).isspace()], np.uint32)
    heavy = np.cumsum((owner == TEMPLATE) & ~np.isin(chars, light))
    after = np.searchsorted(known, np.arange(len(owner)))
    before, after = known[np.maximum(after - 1, 0)], known[np.minimum(after, len(known) - 1)]
    between = (owner == TEMPLATE) & (owner[before] == owner[after]) & (heavy[before] == heavy[after])
    # Before the first and after the last, both neighbours are the same one.
    between &= before != after
    return np.where(between, owner[before], owner)
