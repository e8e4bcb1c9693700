"""What a conversation is written as before it is tokenized: control tokens, words and media, in order.

Control tokens and media are things of their own here, never characters: no text can become one.
"""

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
