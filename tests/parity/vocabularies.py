"""Tokenizers as both sides read them: one tokenizer.json each, made of vocabularies that come with packages."""

import functools
import importlib.util
import io
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.llama import LlamaTokenizer

SHORT = 3000  # of Qwen's tokens: a vocabulary that is read in no time
DIGITS = {"qwen": r"\p{N}", "short": r"\p{N}", "llama3": r"\p{N}{1,3}"}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FILES = {
    "qwen": ("dashscope", "resources/qwen.tiktoken"),
    "llama3": ("llama_models", "llama3/tokenizer.model"),
    "llama": ("mistral_common", "data/tokenizer.model.v1"),
    "bert": ("cn_clip", "clip/vocab.txt"),
}


def file(family: str) -> Path:
    """A family's vocabulary inside an installed package; skips, and names the package, where it is not installed."""
    name, path = FILES[family]
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(found.submodule_search_locations[0]) / path


@functools.cache
def _json(family: str) -> str:
    if family == "gemma":
        return _trained()
    path = file("qwen" if family == "short" else family)
    if family == "llama":
        return _llama(path)
    if family == "bert":
        from transformers.models.bert import BertTokenizer

        return BertTokenizer(vocab=str(path)).backend_tokenizer.to_str()
    with tempfile.TemporaryDirectory() as folder:
        if family == "short":
            ranks = path.read_bytes().splitlines(keepends=True)[:SHORT]
            path = Path(folder) / "short.tiktoken"
            path.write_bytes(b"".join(ranks))
        out = TikTokenConverter(str(path), pattern=PATTERN.replace("DIGITS", DIGITS[family])).converted()
    if family in ("qwen", "short"):
        out.normalizer = normalizers.NFC()
    return out.to_str()


def _llama(path: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, f"{folder}/tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder).backend_tokenizer.to_str()


def _trained() -> str:
    """As Gemma's: byte fallback, no space before; no package has the real one."""
    written = io.BytesIO()
    corpus = ["the cat sat on a mat", "and said hello to you,", "who is it? What colour has it?\n", "user model\n\n"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 30),
        model_writer=written,
        model_type="bpe",
        vocab_size=360,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(f"{folder}/tokenizer.model").write_bytes(written.getvalue())
        made = LlamaTokenizer.from_pretrained(folder, add_prefix_space=False)
        return made.backend_tokenizer.to_str()


def pair(
    folder: Path, family: str, symbols: Sequence[str], begin: str = "", **names: str
) -> tuple[Path, PreTrainedTokenizerFast]:
    """A tokenizer.json with these control tokens, and transformers' tokenizer of the same.

    begin: what transformers writes before every text. names: bos_token="<s>", image_token="<image>" …
    """
    made = Tokenizer.from_str(_json(family))
    made.add_special_tokens([AddedToken(symbol, special=True, normalized=False) for symbol in symbols])
    if begin:
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B:1", special_tokens=[(begin, made.token_to_id(begin))]
        )
    else:
        made.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    path = folder / f"{family}-{begin.strip('<|>')}.json"
    made.save(str(path))
    known = ("bos_token", "eos_token", "pad_token", "unk_token")
    extra = {name: symbol for name, symbol in names.items() if name not in known}
    own = {name: symbol for name, symbol in names.items() if name in known}
    return path, PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=extra, **own)
