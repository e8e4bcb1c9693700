"""Documents as parts, as a convention says: turns in order, media where they belong, and what ends each."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

from mmjax.core.errors import InputError
from mmjax.sequence.document import Audio, Document, Image, Span, Text, Video
from mmjax.tokenizers.parts import BORDER, Around, Medium, Part, Words, plain

Fuse = Literal["sequence", "cross"]
Numbered = tuple[int, Span]
IN_PLACE = ("in_place", "before_begin")  # of Convention.media: where a turn's media stand where they are


def written_around(around: Around, span: Span, fuse: Fuse) -> Around:
    """What is written around a medium: where text looks at it by cross-attention, its marker alone."""
    if fuse == "sequence" or isinstance(span, Audio):
        return around
    return Around(around.before) if around.cross is None else around.cross


class Writer:
    """Writes one document."""

    def __init__(self, convention: Any, document: Document, fuse: Fuse):
        self.of, self.id, self.fuse = convention, document.id, fuse
        self.document = document
        self.media = 0  # written so far
        self.train = False  # whether the last span is text that is learnt

    def write(self, answer: bool, skip: Collection[int]) -> list[Part]:
        of, out = self.of, []
        turns = self._turns(skip)
        roles = [role for role, _ in turns]
        if of.default_system is not None and roles[:1] not in (["system"], ["document"]):
            turns.insert(0, ("system", [(-1, Text(of.default_system, "system"))]))
        if of.system_into_user:
            turns = self._moved(turns)
        if of.one_turn and any(roles.count(role) > 1 for role in ("user", "assistant")):
            raise InputError(
                f"Document {self.id!r} has several turns of one role, but {of.name} has one question and one answer; "
                f"split the document."
            )
        for n, (role, spans) in enumerate(turns):
            if n and of.apart:
                out.append(BORDER)
            out += self._turn(role, spans)
        if answer:
            return [*out, *plain(of.assistant.before if of.prompt is None else of.prompt)]
        return [*out, *plain(of.chunk, self.train), *plain(of.end, self.train)]

    def _turns(self, skip: Collection[int]) -> list[tuple[str, list[Numbered]]]:
        out: list[tuple[str, list[Numbered]]] = []
        for number, span in enumerate(self.document.spans):
            if span.role not in ("system", "user", "assistant", "document"):
                raise InputError(
                    f"Document {self.id!r}, span {number} has the role {span.role!r}; give one of system, user, "
                    f"assistant, document."
                )
            if number in skip:
                continue
            if not out or out[-1][0] != span.role or span.turn:
                out.append((span.role, []))
            out[-1][1].append((number, span))
        return [(role, spans if role == "document" else self._ordered(role, spans)) for role, spans in out]

    def _ordered(self, role: str, spans: list[Numbered]) -> list[Numbered]:
        """A turn's spans in the order in which they are written, without the white space that is left out."""
        out = spans if self.of.media in IN_PLACE else sorted(spans, key=lambda s: isinstance(s[1], Text))
        if self.of.strip == "nothing" or (role == "system" and self.of.system_into_user):
            return out
        for cut, places in ((str.lstrip, range(len(out))), (str.rstrip, reversed(range(len(out))))):
            for at in places:
                number, span = out[at]
                if isinstance(span, Text):
                    out[at] = (number, replace(span, text=cut(span.text)))
                if self.of.strip == "turn" and (not isinstance(span, Text) or out[at][1].text):
                    break  # no further: it was the edge of the turn
        return out

    def _moved(self, turns: list[tuple[str, list[Numbered]]]) -> list[tuple[str, list[Numbered]]]:
        """The system's text at the beginning of the first turn of the user."""
        first, rest = turns[:1], turns[1:]
        system = bool(first) and first[0][0] == "system"
        if any(role == "system" for role, _ in rest) or (system and [role for role, _ in rest[:1]] != ["user"]):
            raise InputError(
                f"Document {self.id!r} has a system turn that is not the first or that no user turn follows, which "
                f"{self.of.name} cannot write; put it before the user's first turn."
            )
        if not system:
            return turns
        words = [(n, replace(s, role="user")) for n, s in first[0][1]]
        between = [(-1, Text(item, "user")) for item in self.of.system.after if isinstance(item, str)]
        return [("user", [*words, *between, *rest[0][1]]), *rest[1:]]

    def _turn(self, role: str, spans: list[Numbered]) -> list[Part]:
        of = self.of
        around = getattr(of, role)
        seen = [s for s in spans if not isinstance(s[1], Text)]
        said = [s for s in spans if isinstance(s[1], Text)]
        if of.media in IN_PLACE or role == "document":
            lead = of.lead if role != "document" and spans and not isinstance(spans[0][1], Image) else ()
            written = [part for s in spans for part in self._span(*s)]
            return [*plain(around.before), *plain(lead), *written, *plain(around.after, self.train)]
        media = [part for s in seen for part in self._span(*s)]
        words = [part for s in said for part in self._span(*s)]
        opened = [*media, *plain(around.before)] if of.media == "ahead" else [*plain(around.before), *media]
        return [*opened, *words, *plain(around.after, self.train)]

    def _span(self, number: int, span: Span) -> list[Part]:
        if isinstance(span, Text):
            around = self.of.text
            self.train = span.train
            said = [Words(span.text, span.train, number)]
            return [*plain(around.before), *said, *plain(around.after, span.train)]
        around = {Image: self.of.image, Video: self.of.video, Audio: self.of.audio}[type(span)]
        chunk = plain(self.of.chunk, self.train) if self.media else ()
        self.media, self.train = self.media + 1, False
        around = written_around(around, span, self.fuse)
        return [*chunk, Medium(number, plain(around.before), plain(around.after))]
