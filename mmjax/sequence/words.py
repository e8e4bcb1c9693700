"""Parts of a conversation to runs of ids: neighbouring words are one string, and nothing but a control token is one."""

from dataclasses import dataclass, field
from typing import Any

from mmjax.core.errors import InputError
from mmjax.tokenizers.convention import Convention
from mmjax.tokenizers.parts import BORDER, Part, Symbol, Words
from mmjax.tokenizers.vocab import CONTROLS


@dataclass
class Run:
    """Tokens that belong together: text of one span that is learnt or not, or all that is written of one medium.

    slots: of a medium, which of its media tokens stands at each place, -2 where the next of `ids` does.
    """

    ids: list[int] = field(default_factory=list)
    train: bool = False
    span: int = -1
    slots: list[int] | None = None


class Writer:
    """Collects a document's parts in order; `runs` gives what they became."""

    def __init__(self, tokenizer: Any, convention: Convention, document: str):
        self.tokenizer, self.convention, self.document = tokenizer, convention, document
        self.first = {part for part in convention.begin if convention.opens and isinstance(part, Symbol)}
        self.offsets = getattr(tokenizer, "offsets", None)
        self.controls = controls(tokenizer)
        self.done: list[Run] = []
        self.opened: dict[int, int] = {}  # where the run of each medium is
        self.pending: list[Words] = []
        self.begun = False  # whether anything but the tokens before every document is written
        self.last: Symbol | None = None  # what was written just before, if it was a control token

    def add(self, part: Part) -> None:
        """InputError for a control token that the tokenizer does not have, or text that cannot be encoded."""
        if part is BORDER:
            self._flush()
        elif isinstance(part, Words):
            if not part.text:
                return
            gap = self.last is not None and self.last.symbol in self.convention.gap
            if gap and not part.text[0].isspace() and part.text[0] != "<":  # as the pattern "(?=[^\\s<])" there
                self.pending.append(Words(" "))
            self.pending.append(part)
            self.last = None
        elif part != self.last or part.symbol not in self.convention.once:
            self._flush()
            self.done.append(Run([self._id(part)], part.train))
            self.begun, self.last = self.begun or part not in self.first, part

    def view(self, span: int, slots: range) -> None:
        """Media tokens of a medium; the first may come to the end of what is written of the ones before."""
        self._flush()
        # What stands before everything is no beginning of the text.
        self.begun, self.last = self.begun or self.convention.media != "before_all", None
        opened = self.opened.get(span)
        if opened is None:
            self.opened[span] = len(self.done)
            self.done.append(Run(span=span, slots=list(slots)))
            return
        run, between = self.done[opened], self.done[opened + 1 :]
        ids = [i for other in between for i in other.ids]
        run.ids += ids
        run.slots += [-2] * len(ids) + list(slots)
        del self.done[opened + 1 :]

    def runs(self) -> list[Run]:
        self._flush()
        return self.done

    def _id(self, part: Symbol) -> int:
        try:
            return self.controls[part.symbol]
        except KeyError:
            raise InputError(
                f"Document {self.document!r}: the tokenizer has no control token {part.symbol!r}; bind it to the "
                f"convention (tokenizers.chat.Chat), which adds it."
            ) from None

    def _flush(self) -> None:
        if not self.pending:
            return
        words, self.pending = self.pending, []
        try:
            self.done += self._encoded(words)
        except InputError as error:
            for word in words:  # whose it is
                try:
                    self.tokenizer.encode(word.text)
                except InputError as own:
                    raise InputError(f"Document {self.document!r}, span {word.span}: {own}") from own
            raise InputError(f"Document {self.document!r}: {error}") from error
        self.begun = True

    def _encoded(self, words: list[Words]) -> list[Run]:
        if self.offsets is None:
            return [Run(self.tokenizer.encode(w.text), w.train, w.span) for w in words]
        text, start = "".join(w.text for w in words), not self.begun
        if len(words) == 1:
            return [Run(self.tokenizer.encode(text, start=start), words[0].train, words[0].span)]
        ids, covered = self.offsets(text, start=start)
        return _shared(words, ids, covered)


def _shared(words: list[Words], ids: list[int], covered: list[tuple[int, int]]) -> list[Run]:
    """The tokens of one string, to whom their characters belong; learnt where any of them is."""
    out: list[Run] = []
    stops, total = [], 0
    for word in words:
        total += len(word.text)
        stops.append(total)
    n = 0
    for token, (start, stop) in zip(ids, covered, strict=True):
        while start >= stops[n] and n + 1 < len(words):
            n += 1
        train, m = words[n].train, n
        while not train and m + 1 < len(words) and stops[m] < stop:
            m += 1
            train = words[m].train
        if not out or (out[-1].train, out[-1].span) != (train, words[n].span):
            out.append(Run(train=train, span=words[n].span))
        out[-1].ids.append(token)
    return out


def controls(tokenizer: Any) -> dict[str, int]:
    """Symbol → id; of a tokenizer with nothing but a `vocab`, those of the generic convention."""
    found = getattr(tokenizer, "controls", None)
    return {c.symbol: getattr(tokenizer.vocab, c.name) for c in CONTROLS} if found is None else found
