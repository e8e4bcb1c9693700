"""Ids to text as they come: nothing is given out before it is final, and a stop string is never given out at all."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

from mmjax.core.errors import InputError

UNKNOWN = "\ufffd"  # what a character of several tokens decodes to before the last of them is there
Reason = Literal["end", "stop", "length"]


class Stream:
    """The text of one answer.

        stream = Stream(tokenizer, ends={2}, stop=["\\n\\n"])
        print(stream.add(ids), end="")          # as often as there are ids
        print(stream.finish(), end="")

    text: all that was given out. ids: the tokens of the answer, without that which ended it.
    reason: why it ended: "end" (one of `ends` came), "stop" (a stop string did), "length" (`finish` before either);
      None while it goes on.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int] = (), stop: Sequence[str] = ()):
        """tokenizer: a `tokenizers.base.Tokenizer`. ends: ids that end an answer. stop: texts that do, and are cut off.

        Raises:
          InputError: a stop string that is empty, or one text where several belong.
        """
        if isinstance(stop, str):
            raise InputError(f"The stop strings are the text {stop!r}; give a list of texts.")
        if not all(stop):
            raise InputError("A stop string is empty, and would end every answer before it begins; leave it out.")
        self._tokenizer, self._ends, self._stop = tokenizer, frozenset(ends), tuple(stop)
        # Where a space is taken off in front of any text, ids are only what they are together.
        self._apart = tokenizer.joins and tokenizer.prefix != "always"
        self.ids: list[int] = []
        self.text = ""
        self.reason: Reason | None = None
        self._from = 0  # the ids before this one are in `_whole`
        self._whole = ""  # text that is final

    def add(self, ids: Iterable[int]) -> str:
        """The text that is final now and was not before. What comes after the end is not looked at."""
        before = len(self.text)
        for token in ids:
            if self.reason is not None:
                break
            if token in self._ends:
                self._read(True)
                self.reason = self.reason or "end"
                break
            self.ids.append(token)
            self._read(False)
        return self.text[before:]

    def finish(self) -> str:
        """The rest of the text; the answer has ended."""
        before = len(self.text)
        if self.reason is None:
            self._read(True)
            self.reason = self.reason or "length"
        return self.text[before:]

    def _read(self, last: bool) -> None:
        """Gives out what is final."""
        # Published tables of tokens are longer than their tokenizers; what lies past the end has no text.
        known = [token for token in self.ids[self._from :] if token < self._tokenizer.size]
        decoded = self._tokenizer.decode(known, start=False)
        text = self._whole + decoded
        if last:
            final = text
        elif self._tokenizer.joins:
            final = text.rstrip(UNKNOWN)
        else:
            # Such a tokenizer may still change the last word (" n't" joins the word before it).
            final = text[: max(text.rfind(" "), 0)].rstrip(UNKNOWN)
        if self._apart and final == text:
            self._from, self._whole = len(self.ids), text
        # What was given out holds no beginning of one.
        found = [at for at in (final.find(s, len(self.text)) for s in self._stop) if at >= 0]
        if found:
            final, self.reason = final[: min(found)], "stop"
        elif not last:
            final = final[: len(final) - self._begun(final)]
        if final.startswith(self.text):
            self.text = final

    def _begun(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop string."""
        sizes = (n for s in self._stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
        return max(sizes, default=0)
