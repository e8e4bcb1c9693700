"""What a conversation is written as before it is tokenized: control tokens, words and media, in order.

Control tokens and media are things of their own here, never characters: no text can become one.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple


class Symbol(NamedTuple):
    """A control token, by the symbol that the tokenizer's model stores for it ("<|im_start|>")."""

    symbol: str
    train: bool = False


class Words(NamedTuple):
    """Ordinary text. Neighbours are tokenized as one string, whatever each is for.

    span: the document's span it is of, -1 for what the convention adds.
    """

    text: str
    train: bool = False
    span: int = -1


class Medium(NamedTuple):
    """The place of a picture, clip or sound: the document's span of this number.

    before, after: what is written around its tokens, unless the convention writes something around each of its views.
    """

    span: int
    before: tuple[Symbol | Words, ...] = ()
    after: tuple[Symbol | Words, ...] = ()


Part = Symbol | Words | Medium
BORDER = Words("", span=-2)  # no text: where two strings are tokenized apart


Writing = tuple[Symbol | str, ...]  # control tokens and words


@dataclass(frozen=True)
class Around:
    """What is written around a turn, a text or a medium.

    cross: the same of a medium that text looks at by cross-attention; it does from the last of `before` on. None:
      `before` alone.
    """

    before: Writing = ()
    after: Writing = ()
    cross: "Around | None" = None


NOTHING = Around()


@functools.lru_cache(maxsize=4096)  # there are few, and every document has a dozen of them
def plain(writing: Writing, train: bool = False) -> tuple[Part, ...]:
    """What a convention writes, of which at most the first is learnt."""
    out: list[Part] = []
    for n, item in enumerate(writing):
        learnt = train and n == 0
        out.append(Words(item, learnt) if isinstance(item, str) else Symbol(item.symbol, learnt))
    return tuple(out)
