"""Chat templates as published models carry them (Jinja): a document becomes control tokens, words and media.

Templates are programs of strangers, and so are texts:

* A template runs in the sandbox that `transformers` runs it in, in a process of its own, with little time and memory
  and no files (`template_process`).
* Only characters that the template wrote can be a control token or the place of a medium. What a text says is words,
  also where it says `<|im_start|>`, and also where half of that stands at its edge (`template_marks`).
* Media are counted: as many places as the document has media, or the document is refused.
"""

import hashlib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmjax.core import strict_json
from mmjax.core.errors import InputError
from mmjax.sequence.document import Audio, Document, Image, Span, Text, Video
from mmjax.tokenizers import template_marks as marks
from mmjax.tokenizers import template_turns as conversation
from mmjax.tokenizers.parts import Medium, Part, Symbol, Words
from mmjax.tokenizers.template_process import LIMITS, Limits, Process

KINDS = {Image: "image", Video: "video", Audio: "audio"}
LARGEST = 2**26  # bytes of a file with a template in it
NOBODY = ("", "")
GIVEN = ("messages", "add_generation_prompt")  # variables that are made here
PLAIN, FULL = 0, 1  # of the sets of messages that are rendered


class Template:
    """A chat template, ready to write documents; its process starts at the first document.

    Args:
      source: the template (`read` finds it in a model's directory).
      symbols: control tokens. What the template writes of them is a `Symbol`, everything else `Words`.
      media: what the template writes for an item of each type: {"image": "<|image_pad|>", "video": …, "audio": …}.
      content: what it takes as a message's content: a list of items, or a string where a message is text alone.
      limits: what it may take.
      given: variables that it gets with every document (`parts`), as a model's directory says: bos_token …
    """

    def __init__(
        self,
        source: str,
        symbols: Collection[str],
        *,
        media: Mapping[str, str] | None = None,
        content: Literal["list", "string"] = "list",
        limits: Limits = LIMITS,
        given: Mapping[str, Any] | None = None,
    ):
        self.source, self.symbols, self.media = source, frozenset(symbols), dict(media or {})
        self.content, self.limits, self.given = content, limits, dict(given or {})
        _refuse_symbols(self.symbols, self.media)
        self._finder = marks.Finder(self.symbols | set(self.media.values()))
        self._process = Process(source, limits)
        self._apart: list[str] | None = None

    def __reduce__(self):  # for data loaders that are processes: each starts its own
        return _again, (self.source, self.symbols, self.media, self.content, self.limits, self.given)

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of all that what it writes depends on; limits are not among that."""
        told = [self.source, sorted(self.symbols), sorted(self.media.items()), self.content]
        told += [sorted(self.given.items())] if self.given else []
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def close(self) -> None:
        """Ends the process, as the end of the program does; the next document starts another."""
        self._process.end()

    def parts(self, document: Document, *, answer: bool = False, **variables: Any) -> list[Part]:
        """What the template makes of a document.

        Spans of one role in a row make one message. Of what the assistant says, that is trained whose `Text.train` is
        True: what stands between the template's generation tags, or, where it has none, what is written more when the
        message is there than when it is asked for; what the template adds in there goes with the text before it.

        Args:
          document: system, user and assistant spans.
          answer: ask for an answer at the end (`add_generation_prompt`).
          variables: what else the template takes, plain JSON: `tools`, `enable_thinking` … Control tokens are those
            whose names end in `_token` (`bos_token="<s>"`); whatever else says `<s>` says it in words.

        Raises:
          InputError: a document, or what the template makes of it, that does not fit.
        """
        try:
            return self._parts(document, answer, variables)
        except InputError as error:
            raise InputError(f"Document {document.id!r}: {error}") from error

    def _parts(self, document: Document, answer: bool, variables: Mapping[str, Any]) -> list[Part]:
        turns = conversation.turns(document.spans)
        given = self._variables({**self.given, **variables})
        read, prefixes = self._rendered(document.spans, turns, given, answer)
        conversation.refuse_missing(document.spans, read.owner, read.text)
        # Within a region, what is of no text goes with the text before it; where there is none, with the last flag.
        if self._process.about.generation:
            said = [turn for turn in turns if turn.role == "assistant"]
            ends = [conversation.train(document.spans, turn) for turn in said]
            alike = ends if len(ends) == len(read.regions) else [False] * len(read.regions)
            regions = list(zip(read.regions, alike, strict=True))
        else:
            regions = [(span, True) for span in prefixes]
        train = conversation.trained(document.spans, read.owner, regions)
        conversation.refuse_untrained(document.spans, read.owner, train)
        return self._split(document.spans, read, train)

    def _variables(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in variables.items():
            if name in GIVEN:
                raise InputError(f"the variable {name!r} is made from the document; leave it out.")
            if name.endswith("_token") and not (value is None or value in [*self.symbols]):
                raise InputError(f"{name} is {value!r}, which is not one of the symbols; give one of them.")
        try:
            # Plain copies: a template gets no object that could do something.
            return json.loads(json.dumps({"tools": None, "documents": None, **variables}))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the variables are not plain JSON ({error}); give texts and numbers.") from error

    def _rendered(
        self, spans: Sequence[Span], turns: Sequence[conversation.Turn], variables: Mapping[str, Any], answer: bool
    ) -> tuple[marks.Read, list[tuple[int, int]]]:
        """The rendering, and (begin, end) of each trained message by prefixes where those are wanted."""
        about = self._process.about
        texts = [span.text for span in spans if isinstance(span, Text)]
        codes = marks.Codes("".join((self.source, json.dumps(variables, ensure_ascii=False), *texts, *self.symbols)))
        tags = (codes.mark(("begin", "generation")), codes.mark(("end", "generation")))
        if self._apart is None:
            self._apart = marks.apart(about.strings, self._finder.strings)
        disguises = marks.Disguises(codes, self._finder, self._apart)

        def worn(disguise: marks.Disguise) -> dict[str, Any]:
            messages = [self._message(spans, turn, disguise) for turn in turns]
            given = {
                name: value if name.endswith("_token") else _worn(value, disguise, about.names.union(about.strings))
                for name, value in variables.items()
            }
            return {"messages": messages, "variables": given}

        whole = len(turns), answer
        asked = [] if about.generation else [n for n, turn in enumerate(turns) if conversation.train(spans, turn, any)]
        jobs = [(PLAIN, *whole, NOBODY), (FULL, *whole, tags)]
        jobs += [(PLAIN, n + more, not more, NOBODY) for n in asked for more in (0, 1)]
        plain, full, *parts = self._process.render([worn(disguises.plain), worn(disguises.everything)], jobs)
        expected = marks.read(plain, codes).text
        read = marks.read(full, codes)
        for disguise in (disguises.edges, disguises.strange):
            if read is not None and read.text == expected:
                break
            read = marks.read(self._process.render([worn(disguise)], [(PLAIN, *whole, tags)])[0], codes)
        if read is None or read.text != expected:
            other = "string" if self.content == "list" else "list"
            raise InputError(
                f"the chat template changes its texts, so that they cannot be told from its own words; "
                f"if it takes a {other} as a message's content, say so (content={other!r})."
            )
        return read, conversation.prefixes(plain, parts, asked)

    def _message(self, spans: Sequence[Span], turn: conversation.Turn, disguise: marks.Disguise) -> dict[str, Any]:
        inside = [(number, spans[number]) for number in turn.spans]
        if self.content == "string" and all(isinstance(span, Text) for _, span in inside):
            return {"role": turn.role, "content": "".join(disguise(span.text, number) for number, span in inside)}
        items = []
        for number, span in inside:
            if isinstance(span, Text):
                items.append({"type": "text", "text": disguise(span.text, number)})
                continue
            kind = KINDS[type(span)]
            if kind not in self.media:
                raise InputError(f"span {number} is of the type {kind!r}; name its marker (media).")
            items.append({"type": kind})
        return {"role": turn.role, "content": items}

    def _split(self, spans: Sequence[Span], read: marks.Read, train: np.ndarray) -> list[Part]:
        places = _Places(spans, self.media)
        out: list[Part] = []
        owned = read.owner > marks.TEMPLATE
        # What texts say is none of the template's: no symbol reaches into it.
        chars = np.frombuffer(read.text.encode("utf-32-le"), np.uint32)
        own = np.where(owned, marks.PRIVATE, chars).astype(np.uint32).tobytes().decode("utf-32-le", "replace")
        at = 0
        for begin, end in self._finder.runs(own):
            out += _words(read, train, at, begin)
            found = own[begin:end]
            if found in places.markers:
                out.append(Medium(places.next(found)))
            else:
                out.append(Symbol(found, bool(train[begin:end].all())))
            at = end
        out += _words(read, train, at, len(own))
        places.refuse_left()
        return out


class _Places:
    """Which medium stands at each marker: those of one marker in their order."""

    def __init__(self, spans: Sequence[Span], media: Mapping[str, str]):
        self.markers = {marker: [] for marker in media.values()}
        for number, span in enumerate(spans):
            if not isinstance(span, Text):
                self.markers[media[KINDS[type(span)]]].append(number)
        self.found = dict.fromkeys(self.markers, 0)

    def next(self, marker: str) -> int:
        self.found[marker] += 1
        numbers = self.markers[marker]
        return numbers[min(self.found[marker], len(numbers)) - 1] if numbers else -1

    def refuse_left(self) -> None:
        for marker, numbers in self.markers.items():
            if self.found[marker] != len(numbers):
                raise InputError(
                    f"the chat template writes {marker!r} {self.found[marker]} times where the document has "
                    f"{len(numbers)} such media; use the template and the markers that belong together."
                )


def read(path: str | Path, name: str = "default") -> str:
    """The template in a model's directory, or in one of its files.

    In a directory, chat_template.jinja (or additional_chat_templates/NAME.jinja) comes before chat_template.json, and
    that before tokenizer_config.json; name: where there are several.

    Raises:
      InputError: there is none of that name.
    """
    path = Path(path)
    first = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
    names = (first, "chat_template.json", "tokenizer_config.json") if path.is_dir() else ("",)
    for file in (path / inner for inner in names):
        found = _in_file(file, name) if file.is_file() else None
        if found is not None:
            return found
    raise InputError(f"{path} has no chat template {name!r}; give a directory or file that has one.")


def _in_file(file: Path, name: str) -> str | None:
    with file.open("rb") as opened:
        data = opened.read(LARGEST + 1)
    if file.suffix != ".json":
        try:
            return data[:LARGEST].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 at byte {error.start}; copy it again.") from error
    held = strict_json.loads(data, str(file), max_bytes=LARGEST)
    held = held.get("chat_template") if isinstance(held, dict) else None
    if isinstance(held, list):  # of {"name": …, "template": …}
        held = {item.get("name"): item.get("template") for item in held if isinstance(item, dict)}.get(name)
    elif isinstance(held, dict):
        held = held.get(name)
    elif name != "default":
        return None
    return held if isinstance(held, str) else None


def _again(source: str, symbols: frozenset, media: dict, content: str, limits: Limits, given: dict) -> Template:
    return Template(source, symbols, media=media, content=content, limits=limits, given=given)


def _refuse_symbols(symbols: Collection[str], media: Mapping[str, str]) -> None:
    unknown = sorted(set(media) - set(KINDS.values()))
    if unknown:
        raise InputError(f"media: {unknown[0]!r} is no type of item; give {', '.join(KINDS.values())}.")
    for symbol in (*symbols, *media.values()):
        # White space at the edge of a text is not disguised, because templates trim it.
        if not symbol or any(c.isspace() or ord(c) >= marks.PRIVATE for c in symbol):
            raise InputError(
                f"the symbol {symbol!r} is empty, or has white space or private characters in it; leave it out."
            )


def _worn(value: Any, disguise: marks.Disguise, names: Collection[str]) -> Any:
    """A variable whose texts wear a disguise; keys that the template asks for stay."""
    if isinstance(value, str):
        return disguise(value, marks.VARIABLE)
    if isinstance(value, list):
        return [_worn(v, disguise, names) for v in value]
    if isinstance(value, dict):
        return {k if k in names else disguise(k, marks.VARIABLE): _worn(v, disguise, names) for k, v in value.items()}
    return value


def _words(read: marks.Read, train: np.ndarray, begin: int, end: int) -> list[Words]:
    """Text between symbols, cut where it is of another span or learnt otherwise."""
    if begin == end:
        return []
    owner = np.maximum(read.owner[begin:end], -1)
    cuts = np.flatnonzero((np.diff(owner) != 0) | (np.diff(train[begin:end]) != 0)) + 1 + begin
    edges = [begin, *cuts.tolist(), end]
    return [Words(read.text[a:b], bool(train[a]), int(max(read.owner[a], -1))) for a, b in itertools.pairwise(edges)]
