"""Rank files, as tiktoken reads them (a token in base64, a space, its rank), and Mistral's tekken.json.

They are written down as a tokenizer.json, so that everything said of that holds for them.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmjax.core import strict_json
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.tokenizers.base import MOST
from mmjax.tokenizers.hub import MAX_BYTES, MAX_ITEMS, Hub
from mmjax.tokenizers.rewrite import LETTER_OF

_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


class Family(NamedTuple):
    """How text is cut into words before ranks are looked at; nfc: it is brought into that normal form first."""

    words: str
    nfc: bool = False


PATTERNS = {
    "gpt2": Family(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    "cl100k": Family(_SHORT + "|" + _LEAD + r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END),
    "o200k": Family(
        f"{_LEAD}{_UPPER}*{_LOWER}+{_SHORT}?|{_LEAD}{_UPPER}+{_LOWER}*{_SHORT}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END
    ),
    "qwen": Family(_SHORT + "|" + _LEAD + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END, nfc=True),
    "tekken": Family(
        f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*" r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END
    ),
}
PATTERNS["llama3"] = PATTERNS["cl100k"]


def from_ranks(data: bytes, pattern: str, controls: Mapping[str, int], name: str) -> Hub:
    """The tokenizer of a rank file's bytes; see `text.load_ranks`."""
    if pattern not in PATTERNS:
        raise InputError(f"there is no pattern {shown(pattern)}; choose one of {', '.join(PATTERNS)}")
    if not data.strip():
        raise InputError(f"{name} is empty; copy it again")
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} has {len(data):,} bytes, where {MAX_BYTES:,} are allowed; it is no rank file")
    if data.lstrip()[:1] == b"{":
        ranks, special = _tekken(data, pattern, name)
    else:
        ranks, special = _lines(data, name), {}
    special |= controls
    taken = set(ranks.values())
    for symbol, token in special.items():
        if type(token) is not int or not 0 <= token < MOST or token in taken:
            raise InputError(f"{name}: {shown(symbol)} cannot have the id {shown(token)}; give one that no token has")
        taken.add(token)
    return Hub(json.dumps(_spec(ranks, PATTERNS[pattern], special)).encode(), name)


def _lines(data: bytes, name: str) -> dict[bytes, int]:
    """Token to id."""
    ranks = {}
    lines = data.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            # Whisper's file says "=" for a token of no bytes, which nothing can become.
            token = base64.b64decode(token, validate=True) if token != b"=" else b""
            if not (rank.isdigit() and len(rank) < 9) or token in ranks:
                raise ValueError
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f"{name}: line {number} is not a new token in base64, a space and its rank: {shown(line[:40])}"
            ) from error
        ranks[token] = int(rank)
    return _checked(ranks, name)


def _checked(ranks: dict[bytes, int], name: str) -> dict[bytes, int]:
    if len(set(ranks.values())) < len(ranks) or max(ranks.values(), default=0) >= MOST:
        raise InputError(f"{name} gives one rank twice, or one over {MOST - 1}; download it again")
    missing = [byte for byte in range(256) if byte.to_bytes() not in ranks]
    if missing:
        raise InputError(f"{name} has no rank for the byte {missing[0]}; download the whole file")
    return ranks


def _tekken(data: bytes, pattern: str, name: str) -> tuple[dict[bytes, int], dict[str, int]]:
    """Token to id, and the control tokens; in tekken.json they come first, and ranks are counted after them."""
    spec = strict_json.loads(data, name, max_bytes=MAX_BYTES, max_items=MAX_ITEMS)
    try:
        config = spec["config"]
        if config["pattern"] != PATTERNS[pattern].words:
            raise InputError(f"{name} cuts words by another pattern than {pattern!r}; choose the one it was made with")
        first, size = config["default_num_special_tokens"], config["default_vocab_size"]
        if not 0 <= first < size < MOST:
            raise ValueError(f"{first} control tokens of {size}")
        entries = [(base64.b64decode(e["token_bytes"], validate=True), e["rank"] + first) for e in spec["vocab"]]
        ranks = dict(entries)
        if len(ranks) < len(entries) or min(ranks.values()) < first:
            raise ValueError("a token or rank that is not its own")
        special = {entry["token_str"]: entry["rank"] for entry in spec.get("special_tokens") or []}
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name} is not a tekken.json ({error!r}); download it again") from error
    # More tokens are in the file than the models have.
    return _checked({token: rank for token, rank in ranks.items() if rank < size}, name), special


def _spec(ranks: dict[bytes, int], family: Family, special: Mapping[str, int]) -> dict[str, Any]:
    """The tokenizer.json of the same ids.

    tiktoken joins the two neighbours whose union has the lowest rank; so here every two whose union has a rank are a
    merge, in the order of that rank. Where two splits make one token, their order is of no matter: the parts of a token
    are joined as they would be if it stood alone, and that is in one way.
    """
    text = {token: "".join(LETTER_OF[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [[text[left], text[right]] for left, right in splits if left in ranks and right in ranks]
    split = {"type": "Split", "pattern": {"Regex": family.words}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": token, "content": symbol, **flags, "special": True} for symbol, token in special.items()]
    vocab = {text[token]: rank for token, rank in ranks.items()}
    return {
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": {"type": "NFC"} if family.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
        "decoder": letters,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }
