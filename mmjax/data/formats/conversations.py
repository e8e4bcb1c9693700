"""Conversations: LLaVA's JSON, the messages of OpenAI's API, and Hugging Face's `images` with `messages`."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.data.formats import draft, wav
from mmjax.data.formats.draft import Draft, Options, Picture
from mmjax.data.formats.record import Record
from mmjax.sequence.document import Audio, Role, Span, Text

MARKER = "<image>"
SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
Pieces = list[Span | Picture]
# What records and messages may say that no span here says: to pass it over would change what is learnt.
MEDIA = ("videos", "video", "audios", "audio")
TOOLS = ("tools", "functions")
CALLS = ("tool_calls", "function_call")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
ASIDE = frozenset((*MEDIA, "images", "image", *THOUGHTS, "weight"))  # of a message


def llava(record: Record, options: Options) -> Draft:
    """{"id", "image": path or paths, "conversations": [{"from": "human" | "gpt" | "system", "value"}]}.

    Each `<image>` in a value stands for the next of the images and becomes a span; the counts must agree. In a tar
    archive they are the pictures beside the JSON if there are any, which its "image" may name but need not. A turn of
    "weight" 0 is not learnt. A record with video or sound is refused.

    options.place: "as_written" keeps pictures where the markers are, and every character around them. "front" does what
    LLaVA's own training does (`preprocess_multimodal` in llava/train/train.py): a value's pictures come first, then a
    newline and the rest without the space at its ends. LLaVA keeps one picture of a value there; here all are kept.
    "bare" does the same without the newline: for the conventions that write it themselves (all of LLaVA's).
    """
    fields = record.fields
    id = draft.own_id(fields, "id", "__key__")
    images = _images(record, options, "image", "images")
    left, before, spans = deque(images), None, []
    turns = draft.list_of(fields.get("conversations"), "conversations")
    for n, turn in enumerate(turns):
        turn = draft.dict_of(turn, f"conversations.{n}")
        role = _role(turn.get("from"), f"conversations.{n}.from")
        value = draft.text_of(turn.get("value"), f"conversations.{n}.value")
        if options.place != "as_written" and MARKER in value:
            words = value.replace(MARKER, "").strip()
            line = "\n" if options.place == "front" and words else ""
            value = MARKER * value.count(MARKER) + line + words
        spans += _begun(_weighed(_marked(value, left, role, id), turn, f"conversations.{n}", role), role, before)
        before = role
    _require_used(left, len(images), id)
    return Draft(id, tuple(spans))


def messages(record: Record, options: Options) -> Draft:
    """{"messages": [{"role", "content": text or a list of parts}], and perhaps "images" (or "image")}.

    Parts are {"type": "text", "text"}, {"type": "image_url", "image_url": {"url"}} with a relative path or a data: URL,
    {"type": "image", "image": the same, or "index": of one in images, or neither: the next of them}, and
    {"type": "input_audio", "input_audio": {"data", "format": "wav"}}.

    Where the record has images, each `<image>` in contents that are text alone stands for the next of them, as in
    LLaMA-Factory; if there is none in the whole record they come first in the first user message, as TRL has it. Where
    it has no such field, and in parts, `<image>` is text like any other.

    What the assistant says in a message of "weight" 0 is not learnt. Refused are records that offer or call tools, keep
    thoughts apart from contents, or have video or sound in files.
    """
    fields = record.fields
    id = draft.own_id(fields, "id", "__key__")
    listed = "images" in fields or "image" in fields or bool(draft.pictures_beside(record))
    images = _images(record, options, "images", "image")
    _refuse(fields, TOOLS, f"record {shown(id)}", "which cannot be learnt here")
    said = [draft.dict_of(m, f"messages.{n}") for n, m in enumerate(draft.list_of(fields.get("messages"), "messages"))]
    reader = _Contents(record, options, images, id)
    marked = any(isinstance(m.get("content"), str) and MARKER in m["content"] for m in said)
    ahead = bool(images) and not marked and all(isinstance(m.get("content"), str) for m in said)
    before, spans = None, []
    for n, message in enumerate(said):
        role = _role(message.get("role"), f"messages.{n}.role")
        content = message.get("content")
        _refuse(message, CALLS, f"record {shown(id)}, messages.{n}", "so it calls tools, which cannot be learnt here")
        if isinstance(content, str):
            pieces: Pieces = []
            if ahead and role == "user":
                pieces, ahead = [replace(i, role=role) for i in images], False
                reader.left.clear()
            if content or not pieces:
                pieces += _marked(content, reader.left, role, id) if listed else [_text(content, role)]
        else:
            pieces = reader.parts(draft.list_of(content, f"messages.{n}.content"), ("messages", n, "content"), role)
        spans += _begun(_weighed(pieces, message, f"messages.{n}", role), role, before)
        before = role
    _require_used(reader.left, len(images), id)
    return Draft(id, tuple(spans))


class _Contents:
    """Messages' contents that are lists of parts; the images that are not used yet are `left`."""

    def __init__(self, record: Record, options: Options, images: list[Picture], id: str | None):
        self.record, self.options, self.images, self.id = record, options, images, id
        self.left = deque(images)

    def parts(self, parts: list, keys: tuple[str | int, ...], role: Role) -> Pieces:
        if not parts:
            raise InputError(f"{'.'.join(map(str, keys))} is empty; give the message a text")
        return [self.part(draft.dict_of(part, "a part"), (*keys, n), role) for n, part in enumerate(parts)]

    def part(self, part: dict, keys: tuple[str | int, ...], role: Role) -> Span | Picture:
        where, kind = ".".join(map(str, keys)), part.get("type")
        if kind == "text":
            return _text(draft.text_of(part.get("text"), f"{where}.text"), role)
        if kind == "image_url":
            given = part.get("image_url")
            if isinstance(given, dict):
                return draft.picture(given.get("url"), (*keys, "image_url", "url"), self.record, self.options, role)
            return draft.picture(given, (*keys, "image_url"), self.record, self.options, role)
        if kind == "image":
            if part.get("image") is not None:
                return draft.picture(part["image"], (*keys, "image"), self.record, self.options, role)
            return self.listed(part.get("index"), where, role)
        if kind == "input_audio":
            given = draft.dict_of(part.get("input_audio"), f"{where}.input_audio")
            samples, rate = wav.decode_base64(given.get("data"), given.get("format"), self.options.limits.record_bytes)
            return Audio(len(samples), rate, samples, role)
        raise InputError(f"{where} is of type {shown(kind)}; known are text, image_url, image and input_audio")

    def listed(self, index: Any, where: str, role: Role) -> Picture:
        """An image of the record's list: by its number, or the next."""
        if index is None:
            return replace(_next(self.left, self.id), role=role)
        if not isinstance(index, int) or not 0 <= index < len(self.images):
            raise InputError(f"{where}.index is {shown(index)}, but the record has {len(self.images)} images")
        if self.images[index] in self.left:
            self.left.remove(self.images[index])
        return replace(self.images[index], role=role)


def _images(record: Record, options: Options, *names: str) -> list[Picture]:
    """The record's list of images: pictures beside it, or what the one of these fields says that is not empty.

    Pictures beside it are in the order in which the field names them, if it does, and else in that of their names.

    Raises:
      InputError: both fields say something; there are pictures beside it and others in a field; video or sound.
    """
    where = f"record {shown(draft.own_id(record.fields, 'id', '__key__'))}"
    _refuse(record.fields, MEDIA, where, "which are not read from files yet")
    fields = {name: given for name in names if _holds(given := record.fields.get(name))}
    found = [list(_items(name, given)) for name, given in fields.items()]
    if any([item for _, item in other] != [item for _, item in found[0]] for other in found[1:]):
        raise InputError(f"{where} has {' and '.join(fields)}, which differ; keep one of them")
    given = found[0] if found else []
    beside = draft.pictures_beside(record)
    if not beside:
        return [draft.picture(item, keys, record, options) for keys, item in given]
    if not given:
        return beside
    written = [item for _, item in given if isinstance(item, str) and item[:5].lower() != "data:"]
    if not len(written) == len(given) == len(beside):
        raise InputError(
            f"{where} has {len(given)} images in its JSON and {len(beside)} beside it; keep one kind, or name in the "
            f"JSON those that are beside it"
        )
    key = str(record.fields.get("__key__")).rpartition("/")[2].lower()
    named = {f"{key}.{picture.name}": picture for picture in beside}
    ordered = [name.rpartition("/")[2].lower() for name in written]
    return [named[name] for name in ordered] if sorted(ordered) == sorted(named) else beside


def _items(name: str, given: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """What a field gives, one or a list, each with where it is found."""
    if isinstance(given, list):
        yield from (((name, n), item) for n, item in enumerate(given))
    else:
        yield (name,), given


def _holds(given: Any) -> bool:
    """Whether a field says anything: tables have all fields in every row."""
    if isinstance(given, dict):
        return any(value is not None for value in given.values())
    return given is not None and given != "" and given != []


def _refuse(fields: Mapping[str, Any], names: tuple[str, ...], where: str, why: str) -> None:
    if fields.keys().isdisjoint(names):
        return
    found = next((name for name in names if _holds(fields.get(name))), None)
    if found:
        raise InputError(f"{where} has {found}, {why}; leave the record out")


def _weighed(pieces: Pieces, message: Mapping[str, Any], where: str, role: Role) -> Pieces:
    """A message's spans, not learnt where its weight is 0; InputError for what of it is in none of them."""
    if message.keys().isdisjoint(ASIDE):  # as in nearly all
        return pieces
    _refuse(message, ("images", "image", *MEDIA), where, "which belong in the record's own fields or in the content")
    _refuse(message, THOUGHTS, where, "which no convention writes (put it into the content if it is to be learnt)")
    weight = message.get("weight")
    if weight is None:
        return pieces
    if weight not in ((0, 1) if role == "assistant" else (0,)):
        can = "0 and 1" if role == "assistant" else f"0, for what the {role} says is not learnt"
        raise InputError(f"{where}.weight is {shown(weight)}; known are {can}")
    return [replace(p, train=p.train and weight == 1) if isinstance(p, Text) else p for p in pieces]


def _marked(value: str, left: deque[Picture], role: Role, id: str | None) -> Pieces:
    """A text with its markers replaced by the next images."""
    out: Pieces = []
    for n, words in enumerate(value.split(MARKER)):
        if n:
            out.append(replace(_next(left, id), role=role))
        if words:
            out.append(_text(words, role))
    return out or [_text("", role)]


def _next(left: deque[Picture], id: str | None) -> Picture:
    if not left:
        raise InputError(f"record {shown(id)} has more places for images than images; add the missing or leave it out")
    return left.popleft()


def _require_used(left: deque[Picture], images: int, id: str | None) -> None:
    if left:
        raise InputError(
            f"record {shown(id)} has {images} images, but places for {images - len(left)} of them; add {MARKER!r} "
            f"where the others belong, or leave it out"
        )


def _text(words: str, role: Role) -> Text:
    return Text(words, role, role == "assistant")


def _begun(pieces: Pieces, role: Role, before: Role | None) -> Pieces:
    """A message's spans; the first begins a turn of its own where the message before has the same role."""
    return [replace(pieces[0], turn=True), *pieces[1:]] if role == before else pieces


def _role(given: Any, where: str) -> Role:
    if not isinstance(given, str) or given not in SPEAKERS:
        raise InputError(f"{where} is {shown(given)}; known are {', '.join(SPEAKERS)}, so rename it or leave it out")
    return SPEAKERS[given]
