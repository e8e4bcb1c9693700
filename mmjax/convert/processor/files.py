"""What a Hugging Face directory says of its processor, in either layout: one file of parts, or one file for each part.

version 5        processor_config.json (image_processor, video_processor), chat_template.jinja
repositories     preprocessor_config.json, video_preprocessor_config.json, processor_config.json, chat_template.json
both             config.json, generation_config.json, tokenizer.json or .model, tokenizer_config.json

Only config.json and the tokenizer must be there.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmjax.convert.files import CONFIG, MAX_CONFIG, read_small
from mmjax.core import strict_json
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike
from mmjax.core.strict_json import shown
from mmjax.tokenizers import template as templates
from mmjax.tokenizers.base import Prefix

PROCESSOR, IMAGES, VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
GENERATION, TOKENS, SPECIAL = "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"
MAX_TOKENS = 16 << 20
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
LARGEST = 2**31  # of any number in a setting


@dataclass(frozen=True)
class Settings:
    """One part's settings. where: the file, for messages. Nothing but `get` and its kin reads a value unchecked."""

    values: Mapping[str, Any]
    where: str

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def _refuse(self, key: str, wants: str) -> None:
        raise InputError(f"{self.where} says {key!r} is {shown(self.values.get(key))}, where mmjax wants {wants}")

    def part(self, key: str) -> "Settings":
        """The settings inside; none where there are none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self._refuse(key, "an object")
        return Settings(value or {}, self.where)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self._refuse(key, "true or false")
        return default if value is None else value

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            self._refuse(key, "text")
        return default if value is None else value

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int | None:
        """A whole number within bounds, or the default."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self._refuse(key, f"a whole number from {least:,} to {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number above zero, or the default."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST:
            self._refuse(key, "a number above 0")
        return float(value)


@dataclass(frozen=True)
class Found:
    """All parts. `template` is None where there is none; `images` and `videos` are empty where no file says anything.

    named: what the tokenizer's files call bos_token, eos_token and the like. prefix: where it has text begin with a
    space, as far as settings say it.
    """

    path: Path
    config: Settings
    processor: Settings
    images: Settings
    videos: Settings
    generation: Settings
    tokens: Settings
    named: Mapping[str, str] = field(default_factory=dict)
    prefix: Prefix | None = None
    template: str | None = None


def look(path: PathLike) -> Found:
    """Reads all settings of a directory.

    Raises:
      InputError: there is no config.json or no tokenizer; a file is too large, or not what its name says.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is no directory; give the local directory that holds {CONFIG} and the tokenizer")
    config = _settings(path, CONFIG, needed=True)
    processor = _settings(path, PROCESSOR)
    images = processor.part("image_processor")
    images = images if images.values else _settings(path, IMAGES)
    videos = (processor.part("video_processor"), _settings(path, VIDEOS), _settings(path, IMAGES))
    videos = next((part for part in videos if part.values), images)
    tokens = _settings(path, TOKENS, MAX_TOKENS)
    named = {"bos_token": "<s>", "eos_token": "</s>"} if tokens.text("tokenizer_class") in LLAMA else {}
    named |= _named(_settings(path, SPECIAL, MAX_TOKENS)) | _named(tokens)
    return Found(
        path,
        config,
        processor,
        images,
        videos,
        _settings(path, GENERATION),
        tokens,
        named,
        _prefix(tokens),
        _template(path, processor),
    )


def _settings(path: Path, name: str, limit: int = MAX_CONFIG, needed: bool = False) -> Settings:
    file = path / name
    if not needed and not os.path.lexists(file):
        return Settings({}, str(file))
    out = strict_json.loads(read_small(file, limit), str(file), max_bytes=limit)
    if not isinstance(out, dict):
        raise InputError(f"{file} is not a JSON object; download it again")
    return Settings(out, str(file))


def _named(of: Settings) -> dict[str, str]:
    """Every token that settings name: {"bos_token": "<s>"}."""
    extra = of.values.get("extra_special_tokens")
    both = {**of.values, **(extra if isinstance(extra, dict) else {})}
    found = {k: v.get("content") if isinstance(v, dict) else v for k, v in both.items() if k.endswith("_token")}
    return {k: v for k, v in found.items() if isinstance(v, str) and v}


def _prefix(tokens: Settings) -> Prefix | None:
    """Where transformers 5 has text begin with a space: the classes of Llama have it from their settings."""
    if tokens.text("tokenizer_class") not in LLAMA:
        return None
    if not tokens.flag("add_prefix_space", True):
        return "never"
    return "always" if tokens.flag("legacy", False) else "first"


def _template(path: Path, processor: Settings) -> str | None:
    """The chat template, in the order in which transformers looks for it."""
    if "chat_template" in processor:
        return processor.text("chat_template")
    names = ["chat_template.json", "chat_template.jinja", TOKENS]
    for name in names:
        file = path / name
        if not os.path.lexists(file):
            continue
        read_small(file, templates.LARGEST)  # what is no file, or too large
        try:
            return templates.read(file)
        except InputError:
            if name != TOKENS:
                raise
    return None
