"""The small files beside the weights that a model is used with: tokenizer, processor, chat template, licence.

They are carried as bytes and not understood here. Nothing that can run is among them: no weights, no pickles, and none
of the Python files that `auto_map` names.
"""

import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path

from mmjax.convert.files import listed, read_small
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown

PATTERNS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *(
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "tokenizer.model.v*",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
    ),
    *("chat_template.json", "chat_template.jinja", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "audio_preprocessor_config.json"),
    *("README.md", "LICENSE", "LICENSE.*", "LICENCE", "LICENCE.*", "NOTICE", "NOTICE.*", "USE_POLICY.md"),
)
# Folders with a tokenizer of their own (InstructBLIP's, of what its Q-Former reads); others are left where they are.
FOLDERS = ("qformer_tokenizer",)
MAX_FILE, MAX_ALL, MAX_FILES = 64 << 20, 128 << 20, 64  # the largest tokenizer.json published has 33 MB


def carried(name: str) -> bool:
    """Whether a file of this name, perhaps in one of `FOLDERS`, is one of ours."""
    folder, slash, name = name.rpartition("/")
    plain = name.isprintable() and len(name) <= 100 and "\\" not in name and (not slash or folder in FOLDERS)
    return plain and any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def read(path: Path, names: list[str]) -> dict[str, bytes]:
    """Those of a directory's files that are carried.

    Raises:
      InputError: one is too large, not a regular file, or a link that leads elsewhere: what it leads to would be
        copied, and perhaps published.
    """
    out, room = {}, MAX_ALL
    inner = [folder for folder in FOLDERS if folder in names and (path / folder).is_dir()]
    for folder in inner:
        _refuse_links(path / folder)
    for name in filter(carried, [*names, *(f"{folder}/{name}" for folder in inner for name in listed(path / folder))]):
        file = path / name
        _refuse_links(file)
        out[name] = read_small(file, min(MAX_FILE, room))
        room -= len(out[name])
        if len(out) > MAX_FILES:
            raise InputError(f"{path} has more than {MAX_FILES} files beside its weights; remove those of no use")
    return out


def _refuse_links(file: Path) -> None:
    if file.is_symlink() and not _at_home(file):
        raise InputError(f"{file} is a link to a file elsewhere, which is not copied; put the file in its place")


def _at_home(file: Path) -> bool:
    """Whether a link leads into its own directory, or to the blobs of the cache of huggingface_hub.

    There, models--<owner>--<name>/snapshots/<commit>/<file> leads to models--<owner>--<name>/blobs/<hash>.
    """
    folder, target = (
        Path(os.path.realpath(p)) for p in (file.parent, file)
    )  # which stops where a link leads to itself
    # Older ones made links to it in a folder of the reader's own.
    hub = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return hub or target.parent == folder


def refuse(files: Mapping[str, int], where: str) -> None:
    """Raises InputError where files, given by their sizes, are not such as `read` gives."""
    wrong = [name for name in files if not carried(name)]
    if wrong or len(files) > MAX_FILES or sum(files.values()) > MAX_ALL or max(files.values(), default=0) > MAX_FILE:
        what = f"the file {shown(wrong[0])}" if wrong else "files that are too many or too large"
        raise InputError(f"{where} carries {what}, which no model needs; make it again with mmjax.convert")
