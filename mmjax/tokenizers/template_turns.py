"""The messages that a document is to a chat template, and what of a rendering is learnt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmjax.core.errors import InputError
from mmjax.sequence.document import Span, Text


@dataclass(frozen=True)
class Turn:
    """Spans that make one message: their numbers."""

    role: str
    spans: tuple[int, ...]


def turns(spans: Sequence[Span]) -> list[Turn]:
    turns: list[Turn] = []
    for number, span in enumerate(spans):
        if span.role == "document":
            raise InputError(f"span {number} stands outside of any conversation; chat templates write conversations.")
        if isinstance(span, Text) and span.train and span.role != "assistant":
            raise InputError(
                f"span {number} is of the role {span.role!r} and trained, but chat templates train what the assistant "
                f"says; set train=False."
            )
        if turns and turns[-1].role == span.role and not span.turn:
            turns[-1] = Turn(span.role, (*turns[-1].spans, number))
        else:
            turns.append(Turn(span.role, (number,)))
    return turns


def train(spans: Sequence[Span], turn: Turn, of=lambda flags: [False, *flags][-1]) -> bool:
    """Whether a turn's last text is trained; with `any`, whether any is."""
    return of([spans[n].train for n in turn.spans if isinstance(spans[n], Text)])


def prefixes(plain: str, parts: Sequence[str], asked: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) of each message: what is written more with it than when it is asked for."""
    out = []
    for message, before, through in zip(asked, parts[::2], parts[1::2], strict=True):
        if not (plain.startswith(through) and through.startswith(before)):
            raise InputError(
                f"the chat template writes what comes before message {message} in another way when more follows, so "
                f"what is learnt cannot be found; use a template with generation tags."
            )
        out.append((len(before), len(through)))
    return out


def trained(spans: Sequence[Span], owner: np.ndarray, regions: Sequence[tuple[tuple[int, int], bool]]) -> np.ndarray:
    """bool[n]: which characters are learnt."""
    learnt = np.array([isinstance(span, Text) and span.train for span in spans])
    train = np.zeros(len(owner), bool)
    for (begin, end), otherwise in regions:
        own = owner[begin:end]
        known = np.flatnonzero(own >= 0)
        if not len(known):
            train[begin:end] = otherwise
            continue
        last = np.searchsorted(known, np.arange(len(own)), side="right") - 1
        train[begin:end] = learnt[own[known[np.maximum(last, 0)]]]
    return train


def refuse_missing(spans: Sequence[Span], owner: np.ndarray, text: str) -> None:
    there = set(np.unique(owner).tolist())
    for number, span in enumerate(spans):
        # A text all of whose words the template knows may wear no disguise.
        if isinstance(span, Text) and span.text.strip() and number not in there and span.text.strip() not in text:
            raise InputError(f"the chat template leaves out span {number}; take it out, or use another template.")


def refuse_untrained(spans: Sequence[Span], owner: np.ndarray, train: np.ndarray) -> None:
    for number, span in enumerate(spans):
        own = owner == number
        if isinstance(span, Text) and span.train and own.any() and not (own & train).any():
            raise InputError(
                f"span {number} is to be learnt, but the chat template writes it outside of its generation tags; use "
                f"another template, or set train=False."
            )
