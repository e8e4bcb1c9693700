"""tokenizer.json made safe: what is a control in it can be matched by no text, and no space is put in front unasked.

A pure function of the parsed file; `hub.Hub` runs what comes out.
"""

import copy
import re
import secrets
from dataclasses import dataclass
from typing import Any

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.tokenizers.base import BYTE_NAMES, MOST, SPACE, Prefix

MODELS = ("BPE", "WordPiece", "Unigram")
# Literal "<0x41>" is cut in two wherever "<0x41>" is the name of a byte; after all normalisation, so nothing evades it.
CUT = {
    "type": "Split",
    "pattern": {"Regex": "<(?=0x[0-9A-Fa-f]{2}>)"},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: those that can be printed stand for themselves, the others for U+0100 and on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(other)}


LETTERS = _alphabet()
LETTER_OF = {byte: letter for letter, byte in LETTERS.items()}


@dataclass(frozen=True)
class Rewritten:
    """spec, fronted: tokenizer.json without and with the space in front of text; names: of every id, in the file.

    controls, unknown: ids. prefix: as the file has it. spelling: how ids are bytes ("letters", "names", None where they
    are not). complete: every text can be spelled. lossless: nothing in the file is known to change text.
    """

    spec: dict[str, Any]
    fronted: dict[str, Any] | None
    names: list[str | None]
    added: dict[str, int]
    controls: dict[str, int]
    unknown: int | None
    prefix: Prefix
    spelling: str | None
    complete: bool
    lossless: bool


def rewrite(spec: dict[str, Any], named: dict[str, int], name: str) -> Rewritten:
    """Args: the file; symbols that are controls besides its own, with their ids; what to call it in errors.

    InputError for a file that is no tokenizer.json, or holds what cannot be made safe.
    """
    try:
        return _rewrite(spec, named, name)
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is not a tokenizer.json ({error!r}); download it again") from error


def _rewrite(spec: dict[str, Any], named: dict[str, int], name: str) -> Rewritten:
    spec = {**spec, "truncation": None, "padding": None, "post_processor": None}
    model = spec["model"] = dict(spec["model"])
    _refuse(model, name)
    ids = _ids(model, name)
    added = {token["content"]: token for token in spec.get("added_tokens") or []}
    names = _names(ids, {content: token["id"] for content, token in added.items()} | named, name)
    unknown = model.get("unk_id") if model["type"] == "Unigram" else ids.get(model.get("unk_token"))
    controls = {content: token["id"] for content, token in added.items() if token["special"]}
    controls = {content: token for content, token in controls.items() if token != unknown} | named
    kept = [token for content, token in added.items() if not token["special"] and content not in controls]
    spec["added_tokens"] = kept
    _hide(model, ids, {*controls.values(), unknown} - {None}, {t["content"]: t["id"] for t in kept}, names)

    steps = [*_steps(spec.get("normalizer")), *_steps(spec.get("pre_tokenizer"))]
    spelling = None
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        spelling, complete = "letters", set(LETTERS) <= ids.keys()
    else:
        complete = bool(model.get("byte_fallback")) and set(BYTE_NAMES) <= ids.keys()
        if complete and any(step["type"] in ("Metaspace", "Replace") for step in steps):
            spelling = "names"
    if model.get("byte_fallback"):
        _then(spec, CUT)
    prefix = _prefix(spec)
    return Rewritten(
        spec=_without_prefix(spec),
        fronted=_with_prefix(spec, prefix),
        names=names,
        added={content: token["id"] for content, token in added.items()},
        controls=controls,
        unknown=unknown,
        prefix=prefix,
        spelling=spelling,
        complete=complete,
        lossless=complete and spelling is not None and _lossless(spec, steps),
    )


def _refuse(model: dict[str, Any], name: str) -> None:
    if model.get("type") not in MODELS:
        raise InputError(f"{name} has a model of type {shown(model.get('type'))}; use one of {', '.join(MODELS)}")
    if model.get("dropout"):
        raise InputError(f"{name} drops merges at random (dropout {model['dropout']}), so ids vary; set it to null")
    if model.get("byte_fallback") and model.get("ignore_merges"):
        raise InputError(
            f"{name} has both byte_fallback and ignore_merges, which lets text name bytes; set one of them to false"
        )


def _ids(model: dict[str, Any], name: str) -> dict[str, int]:
    """Of the model's own entries."""
    if model["type"] == "Unigram":
        ids = {piece: i for i, (piece, _) in reversed(list(enumerate(model["vocab"])))}
    else:
        ids = dict(model["vocab"])
    if not ids or not all(type(token) is int and 0 <= token < MOST for token in ids.values()):
        raise InputError(f"{name} has no vocabulary, or an id outside 0 to {MOST - 1}; download it again")
    return ids


def _names(ids: dict[str, int], added: dict[str, int], name: str) -> list[str | None]:
    """The symbol of every id; InputError where two have one id, or one has two."""
    of = {token: piece for piece, token in ids.items()}
    clash = next((p for p, token in ids.items() if of[token] != p), None)
    for piece, token in added.items():
        if type(token) is not int or not 0 <= token < MOST:
            raise InputError(f"{name} gives {shown(piece)} the id {shown(token)}; ids are 0 to {MOST - 1}")
        if ids.get(piece, token) != token or (of.get(token, piece) != piece and _plain(of[token]) != piece):
            clash = piece
        of.setdefault(token, piece)
    if clash is not None:
        raise InputError(f"{name} gives {shown(clash)} an id twice, or an id that is another's; download it again")
    return [of.get(token) for token in range(max(of) + 1)]


def _plain(piece: str) -> str:
    """What a piece of either spelling stands for, to find symbols in the vocabulary."""
    if all(letter in LETTERS for letter in piece):
        return bytes(LETTERS[letter] for letter in piece).decode("utf-8", errors="replace")
    return piece.replace(SPACE, " ")


def _hide(
    model: dict[str, Any], ids: dict[str, int], hidden: set[int], kept: dict[str, int], names: list[str | None]
) -> None:
    """Gives hidden entries names that no text has, drops the merges that make them, and enters added text tokens.

    The library gives added tokens that the model lacks ids in their order, not those that they have in the file.
    """
    secret = {names[token]: f"\U0010fffe{secrets.token_hex(16)}" for token in hidden if names[token] in ids}
    if model["type"] == "Unigram":
        low = min((score for _, score in model["vocab"]), default=0.0)  # lower would move what unknown text costs
        entries = [[secret.get(piece, piece), score] for piece, score in model["vocab"]]
        by_id = {token: content for content, token in kept.items()}
        for token in range(len(entries), max([len(entries) - 1, *kept.values()]) + 1):
            entries.append([by_id.get(token, f"\U0010fffe{secrets.token_hex(16)}"), low])
        model["vocab"] = entries
        return
    model["vocab"] = {secret.get(piece, piece): token for piece, token in ids.items()} | kept
    if model.get("unk_token") in secret:
        model["unk_token"] = secret[model["unk_token"]]
    if model["type"] == "BPE":
        cut = len(model.get("continuing_subword_prefix") or "")
        unmade = set(secret) | (set(BYTE_NAMES) if model.get("byte_fallback") else set())
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [
            [left, right]
            for left, right in merges
            if not ({left, right} & secret.keys() or left + right[cut:] in unmade or left + right in unmade)
        ]


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Normalisers or pre-tokenizers in their order."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part["normalizers"] if "normalizers" in part else part["pretokenizers"]
        return [step for one in inner for step in _steps(one)]
    return [part]


def _then(spec: dict[str, Any], step: dict[str, Any]) -> None:
    """Adds a pre-tokenizer after all others."""
    steps = [*_steps(spec.get("pre_tokenizer")), step]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def _fronts(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a tokenizer that may put a space in front of text: of its words, every one may.

    A pre-tokenizer that is not the first puts one in front of each word (T5), which is no matter of where text stands.
    """
    normalizers = [step for step in _steps(spec.get("normalizer")) if step["type"] == "Prepend"]
    first = [step for step in _steps(spec.get("pre_tokenizer"))[:1] if step["type"] in ("Metaspace", "ByteLevel")]
    return normalizers + first


def _scheme(step: dict[str, Any]) -> Prefix:
    if step["type"] == "Prepend":
        return "always"
    if step["type"] == "ByteLevel":
        return "always" if step.get("add_prefix_space", True) else "never"
    return step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")


def _prefix(spec: dict[str, Any]) -> Prefix:
    schemes = {_scheme(step) for step in _fronts(spec)}
    return next((scheme for scheme in ("always", "first") if scheme in schemes), "never")


def _set(step: dict[str, Any], on: bool) -> None:
    step["add_prefix_space"] = on
    if step["type"] == "Metaspace":
        step["prepend_scheme"] = "always" if on else "never"


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    out = {**spec, **{part: copy.deepcopy(spec.get(part)) for part in ("normalizer", "pre_tokenizer")}}
    for step in _fronts(out):
        if step["type"] != "Prepend":
            _set(step, False)
    normalizers = [step for step in _steps(out["normalizer"]) if step["type"] != "Prepend"]
    out["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    return out


def _with_prefix(spec: dict[str, Any], prefix: Prefix) -> dict[str, Any] | None:
    """As the file has it; where it never puts a space there but has a step that can, that step does."""
    out = {**spec, **{part: copy.deepcopy(spec.get(part)) for part in ("normalizer", "pre_tokenizer")}}
    if prefix == "never":
        able = _fronts(out)
        for step in able[:1]:
            _set(step, True)
        return out if able else None
    return out


def _lossless(spec: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether the file has only steps that keep all of the text; a trial tells the rest."""
    for step in steps:
        kind = step["type"]
        if kind == "Replace":
            kept = step["pattern"] == {"String": " "} and step["content"] == SPACE
        elif kind == "Split":
            kept = step["behavior"] != "Removed"
        elif kind == "Metaspace":
            kept = step["replacement"] == SPACE
        else:
            kept = kind in ("Prepend", "ByteLevel", "Digits")
        if not kept:
            return False
    model = spec["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    return not any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"])


def regular_expressions(spec: dict[str, Any]) -> bool:
    """Whether text is searched with one, which takes memory and time that grow with what it matches."""
    steps = [*_steps(spec.get("normalizer")), *_steps(spec.get("pre_tokenizer"))]
    return any(
        re.search(r"Regex", str(step.get("pattern", ""))) or (step["type"] == "ByteLevel" and step.get("use_regex", 1))
        for step in steps
        if step != CUT
    )
