"""Tokenizer files on disk: read whole or refused, and directories as Hugging Face lays them out.

tokenizer.json, or else tokenizer.model
tokenizer_config.json, special_tokens_map.json, added_tokens.json      which of its tokens are controls
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmjax.core import strict_json
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.tokenizers.base import Prefix

MOST, MOST_CONFIG = 128 << 20, 16 << 20  # bytes
ROLES = ("bos_token", "eos_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Folder:
    """file: the tokenizer's. controls: symbol to id, None where no file says it. text: added tokens that are none.

    prefix: what the configuration says of a tokenizer.model; None for a tokenizer.json, which says it itself.
    """

    file: Path
    controls: dict[str, int | None]
    text: dict[str, int]
    prefix: Prefix | None


def read(path: Path, most: int = MOST) -> bytes:
    """A file's bytes; InputError if it is absent, a link, no regular file, empty, or has more than `most` bytes.

    Links are followed in the cache of Hugging Face alone, where a snapshot's files are links into ../../blobs.
    """
    try:
        if path.is_symlink() and path.resolve().parent != path.parent.resolve().parents[1] / "blobs":
            raise InputError(f"{str(path)!r} is a symbolic link; give the file itself")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"cannot read {str(path)!r}, which is no regular file; give the path of a tokenizer file")
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {str(path)!r} ({error}); give the path of a tokenizer file") from error
    if not data:
        raise InputError(f"the tokenizer file {str(path)!r} is empty; copy it again")
    if len(data) > most:
        raise InputError(f"{str(path)!r} has more than {most:,} bytes; it is no tokenizer file")
    return data


def look(path: Path) -> Folder:
    """What a directory says of its tokenizer; InputError if it has none, or files that contradict each other."""
    json, model = path / "tokenizer.json", path / "tokenizer.model"
    file = json if os.path.lexists(json) else model
    if not os.path.lexists(file):
        raise InputError(f"{str(path)!r} has neither tokenizer.json nor tokenizer.model; download one of them")
    config = _object(path / "tokenizer_config.json")
    controls: dict[str, int | None] = {}
    text: dict[str, int] = {}
    try:
        for token, entry in config.get("added_tokens_decoder", {}).items():
            (controls if entry.get("special") else text)[_symbol(entry)] = int(token)
        for symbol, token in _object(path / "added_tokens.json").items():
            if text.get(symbol, token) != token or (controls.get(symbol) or token) != token or type(token) is not int:
                raise InputError(f"{str(path)!r} gives {shown(symbol)} two ids; download the directory again")
            if symbol not in text:
                controls[symbol] = token
        unknown = set()
        for source in (config, _object(path / "special_tokens_map.json")):
            entries = [source[role] for role in ROLES if source.get(role)]
            for role in LISTS:
                found = source.get(role) or []
                entries += found.values() if isinstance(found, dict) else found
            for entry in entries:
                controls.setdefault(_symbol(entry), None)
            unknown |= {_symbol(source["unk_token"])} if source.get("unk_token") else set()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the settings of the tokenizer in {str(path)!r} are broken ({error!r}); copy it") from error
    for symbol in unknown:  # what unknown characters become; a control only where the tokenizer file says so
        controls.pop(symbol, None)
    prefix = None
    if file == model and config and str(config.get("tokenizer_class", LLAMA[0])) in LLAMA:
        # As LlamaTokenizer: the older behaviour, which stays the default, puts a space in front of every text.
        prefix = "first" if config.get("legacy") is False else "always"
        prefix = "never" if config.get("add_prefix_space") is False else prefix
    return Folder(file, {s: i for s, i in controls.items() if s not in text}, text, prefix)


def _object(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    out = strict_json.loads(read(path, MOST_CONFIG), str(path), max_bytes=MOST_CONFIG)
    if not isinstance(out, dict):
        raise InputError(f"{str(path)!r} is not a JSON object; download it again")
    return out


def _symbol(entry: Any) -> str:
    out = entry["content"] if isinstance(entry, dict) else entry
    if not isinstance(out, str):
        raise TypeError(f"a token called {shown(out)}")
    return out
