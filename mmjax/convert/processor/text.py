"""The tokenizer of a Hugging Face directory, bound to the conventions that its documents are written in."""

import dataclasses
import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.convert.families.decoder import FAMILIES
from mmjax.convert.processor.family import Family
from mmjax.convert.processor.files import Found
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.sequence.document import Document, Text
from mmjax.tokenizers import text
from mmjax.tokenizers.base import Tokenizer
from mmjax.tokenizers.chat import Chat
from mmjax.tokenizers.convention import Convention, places, spelled
from mmjax.tokenizers.hub import Hub
from mmjax.tokenizers.parts import NOTHING, Around, Symbol
from mmjax.tokenizers.template import Template
from mmjax.tokenizers.template_marks import PRIVATE
from mmjax.tokenizers.vocab import Vocab


def load_tokenizer(found: Found) -> Tokenizer:
    """The tokenizer, with text beginning as transformers 5 has it: of Llama's models whatever tokenizer.json says.

    Raises:
      InputError: as `tokenizers.text.load`.
    """
    if os.path.lexists(found.path / "tokenizer.json"):
        out = text.load(found.path)
        pieces = isinstance(out, Hub) and out._spelling == "names" and found.config.text("model_type") == "llama"
        return text.load(found.path, prefix=found.prefix) if pieces and found.prefix not in (None, out.prefix) else out
    return text.load(found.path, prefix=found.prefix)


def edges_of(found: Found, tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The special tokens that transformers 5 writes before and after every text of its own accord.

    A tokenizer.json says it itself, whatever tokenizer_config.json says.

    Raises:
      InputError: it writes some after every text, and the model goes on with texts; or says it in a way that is none.
    """
    if not isinstance(tokenizer, Hub):
        return ((found.named.get("bos_token", "<s>"),) if found.tokens.flag("add_bos_token", False) else ()), ()
    before, after = around(tokenizer, found.path)
    if after and start_of(found) is None:
        raise InputError(f"The tokenizer in {found.path} writes a token after every text, so no prompt could go on")
    return before, after


def start_of(found: Found) -> int | None:
    """The id that begins every answer of an encoder–decoder; None where answers go on with the prompt."""
    inner = found.config.part("text_config")
    if "t5" not in (found.config.text("model_type"), inner.text("model_type")):
        return None
    sources = (found.generation, found.config, inner)
    said = (of.whole("decoder_start_token_id", least=0) for of in sources if "decoder_start_token_id" in of)
    pads = (of.whole("pad_token_id", least=0) for of in sources if "pad_token_id" in of)
    return next(said, next(pads, 0))


def around(tokenizer: Hub, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The special tokens that a tokenizer.json has before and after every text.

    Raises:
      InputError: it says it in a way that is none; `path` is its directory.
    """
    before: list[str] = []
    after: list[str] = []
    try:
        for step in _steps(tokenizer.post_processor):
            if step["type"] in ("BertProcessing", "RobertaProcessing"):
                before.append(step["cls"][0])
                after.append(step["sep"][0])
            if step["type"] == "TemplateProcessing":
                single = step["single"]
                at = next((n for n, item in enumerate(single) if "Sequence" in item), len(single))
                before += [item["SpecialToken"]["id"] for item in single[:at]]
                after += [item["SpecialToken"]["id"] for item in single[at + 1 :]]
        if not all(isinstance(symbol, str) for symbol in before + after):
            raise TypeError("a token is no text")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"The post_processor in {path}/tokenizer.json is broken ({error!r}); copy it") from error
    return tuple(before), tuple(after)


@dataclass(frozen=True, eq=False)
class Reader:
    """A tokenizer of its own for what the connector reads beside a picture (InstructBLIP: BERT's).

    before, after: ids around every text.
    """

    tokenizer: Tokenizer
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal: equal ones give equal ids."""
        return hashlib.sha256(f"{self.tokenizer.fingerprint} {self.before} {self.after}".encode()).hexdigest()

    def ids(self, text: str) -> list[int]:
        """The ids of a text; InputError where it cannot be encoded."""
        return [*self.before, *self.tokenizer.encode(text), *self.after]

    def beside(self, document: Document, pictures: int) -> np.ndarray:
        """A document's question beside each of its pictures, i32[pictures, words]: all its words but answers.

        Raises:
          InputError: they cannot be encoded; the message names the document.
        """
        said = "".join(s.text for s in document.spans if isinstance(s, Text) and s.role != "assistant")
        try:
            return np.tile(np.array(self.ids(said), np.int32), (pictures, 1))
        except InputError as error:
            raise InputError(f"Document {document.id!r}: {error}") from error


def reader(path: Path) -> Reader:
    """The tokenizer in a directory, with what it writes around every text.

    Raises:
      InputError: there is no tokenizer.json, or a broken one.
    """
    tokenizer = text.load(path)
    if not isinstance(tokenizer, Hub):
        raise InputError(f"{path} holds no tokenizer.json; download it with the model")
    parts = around(tokenizer, path)
    missing = [symbol for symbol in (*parts[0], *parts[1]) if symbol not in tokenizer.controls]
    if missing:
        raise InputError(f"The tokenizer in {path} writes {shown(missing[0])} around texts, and has no such token")
    return Reader(tokenizer, *(tuple(tokenizer.controls[symbol] for symbol in part) for part in parts))


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a part, which is one or a sequence of them."""
    if part is None:
        return []
    return [step for one in part["processors"] for step in _steps(one)] if "processors" in part else [part]


def chats(found: Found, family: Family | None, tokenizer: Any) -> tuple[Chat, Chat]:
    """The tokenizer that writes conversations, and the one that writes everything else."""
    known = tokenizer.controls
    pads = [found.named.get(name) for name in ("pad_token", "eos_token", "bos_token", "unk_token")]
    pad = next((symbol for symbol in [*pads, *known] if symbol in known), None)
    if pad is None:
        raise InputError(f"The tokenizer in {found.path} has no special token at all, so none to pad with; name one")
    media = {} if family is None else family.markers(found)
    lead, last = edges_of(found, tokenizer) if family is None or family.lead is None else (family.lead, ())
    behind = Around((), tuple(map(Symbol, last)))
    own = {
        "name": found.config.text("model_type"),
        "begin": tuple(map(Symbol, lead)),
        "pad": pad,
        "stop": found.named.get("eos_token", "") if found.named.get("eos_token") in known else "",
        **({"user": behind, "document": behind} if last else {}),
        **_places(media, family),
    }
    convention = Convention(**own | _writing(family, found, known))
    _refuse_missing(convention, tokenizer, found, () if family is None else family.adds)
    plain = Chat(tokenizer, convention)
    plain.vocab = _vocab(plain, found, family)
    for kind, symbol in (("image", convention.placeholder), ("video", convention.placeholder_video)):
        if not symbol:
            continue
        for key in (f"{kind}_token_id", f"{kind}_token_index"):
            if found.config.whole(key, plain.controls[symbol], least=0) != plain.controls[symbol]:
                raise InputError(
                    f"{found.config.where} says {key!r} is {found.config.values[key]}, and the tokenizer has "
                    f"{plain.controls[symbol]} for {shown(symbol)}; use the files that belong together"
                )
    if found.template is None:
        return plain, plain
    symbols = [s for s in plain.controls if not any(c.isspace() or ord(c) >= PRIVATE for c in s)]
    given = {name: symbol for name, symbol in found.named.items() if symbol in symbols}
    content = "string" if family is None else "list"
    template = Template(found.template, symbols, media=media, content=content, given=given)
    kept = () if family is None else ("image", "video") if family.cross else family.around
    nothing = {kind: NOTHING for kind in ("image", "video") if kind not in kept}
    begin = () if family is None or not lead or _begun(template, found) else convention.begin
    chat = Chat(plain.tokenizer, dataclasses.replace(convention, begin=begin, template=template, **nothing))
    chat.vocab = plain.vocab
    return chat, plain


def films_of(found: Found, family: Family | None, plain: Chat) -> Chat | None:
    """The tokenizer that writes conversations with videos, where that is not the template's matter."""
    if family is None or family.films is None:
        return None
    own = {"name": plain.convention.name, "pad": plain.convention.pad, "document": NOTHING}
    convention = dataclasses.replace(family.films, **own, **_writing(family, found, plain.tokenizer.controls))
    _refuse_missing(convention, plain.tokenizer, found)
    chat = Chat(plain.tokenizer, convention)
    chat.vocab = plain.vocab
    return chat


def _refuse_missing(convention: Convention, tokenizer: Any, found: Found, added: tuple[str, ...] = ()) -> None:
    fine = {*tokenizer.controls, *added}
    missing = [symbol for symbol in convention.symbols if symbol not in fine and tokenizer._find(symbol) is None]
    if missing:
        raise InputError(
            f"The tokenizer in {found.path} has no token {shown(missing[0])}, which this model is asked with; use the "
            f"tokenizer that belongs to it"
        )


def _writing(family: Family | None, found: Found, known: Collection[str]) -> dict[str, Any]:
    """What the family writes around media, as words where it may and the tokenizer has no such symbol."""
    if family is None:
        return {}
    writing = family.writing(found) if callable(family.writing) else family.writing
    if all(symbol in known for symbol in family.ends):
        writing = {**writing, **family.dialogue}
    words = {symbol for symbol in family.spelled if not any(one in known for one in places(symbol))}
    return {name: spelled(value, words) for name, value in writing.items()}


def _places(media: Mapping[str, str], family: Family | None) -> dict[str, Any]:
    """Fields of a convention: what stands where a medium's tokens go, or for a medium that is looked at from beside."""
    if family is not None and family.cross:
        return {kind: Around((Symbol(symbol),)) for kind, symbol in media.items()}
    return {"placeholder": media.get("image", ""), "placeholder_video": media.get("video", "")}


def _begun(template: Template, found: Found) -> bool:
    """Whether the template writes the first token itself: the tokenizer then writes none."""
    parts = template.parts(Document("the first", (Text("x"),)), answer=True)
    return parts[:1] == [Symbol(found.named.get("bos_token", ""))]


def _vocab(chat: Chat, found: Found, family: Family | None) -> Vocab:
    """The ids, in the model's own table of tokens: it may be longer than the tokenizer's."""
    inner = found.config.part("text_config")
    own = FAMILIES.get(inner.text("model_type"))  # where config.json has not even that
    size = found.config.whole("vocab_size", chat.size if own is None else own.vocab)
    size = inner.whole("vocab_size", size)
    size += found.config.whole("additional_vocab_size", 0, least=0)  # of Idefics, in a table of their own
    # As transformers counts them: the id of a picture stands there too, and the model knows its own ends of rows.
    newline = chat.vocab.image if family is not None and family.newline else chat.vocab.image_newline
    more = 0 if family is None else family.more
    return dataclasses.replace(chat.vocab, image_newline=newline, size=max(size, 1) + more)
