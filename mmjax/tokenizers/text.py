"""Text tokenizers: loading every kind of file behind one interface (`Tokenizer`), and training one of your own."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.tokenizers import folder, ranks
from mmjax.tokenizers.base import Prefix, Tokenizer
from mmjax.tokenizers.hub import Hub
from mmjax.tokenizers.learn import train
from mmjax.tokenizers.pieces import Text

__all__ = ["Hub", "Prefix", "Text", "Tokenizer", "load", "load_ranks", "train"]


def load(
    source: str | os.PathLike | bytes,
    *,
    exact: bool = False,
    controls: Sequence[str] = (),
    prefix: Prefix | None = None,
) -> Tokenizer:
    """The tokenizer in a file, in a directory as Hugging Face lays it out, or in the bytes of a file.

    Args:
      source: a SentencePiece model, or a tokenizer.json; in a directory, tokenizer.json before tokenizer.model.
      exact: refuse a tokenizer that changes any text.
      controls: symbols that are to be control tokens besides those of the files (`Tokenizer.with_controls`).
      prefix: whether text gets a space in front, where it is not to be as the files say (`Tokenizer`). A SentencePiece
        model alone does not say it: "first".

    Raises:
      InputError: what is not there, empty, broken or too large; what cannot be made safe; what is not exact.
    """
    if isinstance(source, bytes):
        out = _made(source, "the tokenizer model", prefix)
    else:
        path = Path(source)
        try:
            is_folder = path.is_dir()
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {str(source)!r} ({error}); give the path of a tokenizer file") from error
        out = _from_folder(path, prefix) if is_folder else _made(folder.read(path), _called(path), prefix)
    out = out.with_controls(controls)
    if exact and not out.exact:
        raise InputError(
            f"{out._name} does not give text back unchanged (it normalises, or has no byte fallback); "
            "use a model made by mmjax.tokenizers.text.train"
        )
    return out


def load_ranks(source: str | os.PathLike | bytes, pattern: str, controls: Mapping[str, int]) -> Tokenizer:
    """The tokenizer in a rank file as tiktoken reads them, or in Mistral's tekken.json.

    Args:
      source: the file, or its bytes.
      pattern: how text is cut into words, a name of `ranks.PATTERNS`.
      controls: symbols and ids of the control tokens, which rank files do not hold.

    Raises:
      InputError: a file that is absent, empty or broken; an unknown pattern; an id that a token has already.
    """
    if isinstance(source, bytes):
        return ranks.from_ranks(source, pattern, controls, "the rank file")
    return ranks.from_ranks(folder.read(Path(source)), pattern, controls, f"the rank file {str(source)!r}")


def _called(path: Path) -> str:
    return f"the tokenizer model {str(path)!r}"


def _made(data: bytes, name: str, prefix: Prefix | None, named: dict[str, int] | None = None) -> Tokenizer:
    kind = Hub if data.lstrip()[:1] == b"{" else Text
    return kind(data, name, prefix, named)


def _from_folder(path: Path, prefix: Prefix | None) -> Tokenizer:
    found = folder.look(path)
    data, name = folder.read(found.file), _called(found.file)
    out = _made(data, name, prefix or found.prefix)
    for symbol, token in found.text.items():
        if out._find(symbol) != token:
            raise InputError(
                f"{str(path)!r} adds {shown(symbol)} as text with the id {token}, which {found.file.name} does not "
                "have; use a directory with a whole tokenizer.json"
            )
    named = {}
    for symbol, token in found.controls.items():
        known = out.controls.get(symbol, out._find(symbol))
        if token is not None and known not in (None, token):
            raise InputError(f"{str(path)!r} gives {shown(symbol)} the id {token}, where {name} has {known}")
        if token is not None and symbol not in out.controls:
            named[symbol] = token
    if named:
        out = _made(data, name, prefix or found.prefix, named)
    return out.with_controls([symbol for symbol, token in found.controls.items() if token is None])
