"""Small tokenizers of every kind, made in a second."""

import base64
import io
import json

import sentencepiece

from mmjax.tokenizers import text
from mmjax.tokenizers.base import BYTE_NAMES
from mmjax.tokenizers.rewrite import LETTERS

CORPUS = [f"The quick brown fox jumps over the lazy dog {i} times, <|image|> and <0x41> too." for i in range(200)]
CORPUS += ["Was kostet die schöne Welt?\n\tdef f(x):  return x\r\n", "日本語のテキスト", "<s> </s> [CLS] <image>"] * 20
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<s>"]
LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def pieces(kind: str = "bpe", **settings) -> bytes:
    """A SentencePiece model; as Llama's without settings."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, model_type=kind, vocab_size=400, hard_vocab_limit=False,
        minloglevel=2, **{**LLAMA, **settings},
    )  # fmt: skip
    return written.getvalue()


def merges(count: int = 60) -> list[list[str]]:
    """Of a byte-level BPE."""
    import tokenizers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(LETTERS)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256 + count, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    return [list(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]


def letters(**model) -> dict:
    """A byte-level tokenizer.json, with a run of spaces added as text, and merges that would make "<s>" of text."""
    made = [*merges(), ["<", "s"], ["<s", ">"]]
    vocab = {piece: i for i, piece in enumerate([*sorted(LETTERS), *map("".join, made)])}
    vocab["<|endoftext|>"] = len(vocab)
    size = len(vocab)
    added = [
        {"id": vocab["<s>"], "content": "<s>", **FLAGS, "special": True},
        {"id": size - 1, "content": "<|endoftext|>", **FLAGS, "special": True},
        {"id": size, "content": "<|im_start|>", **FLAGS, "special": True},
        {"id": size + 1, "content": "    ", **FLAGS, "special": False},
    ]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": step,
        "post_processor": step,
        "decoder": step,
        "model": {"type": "BPE", "vocab": vocab, "merges": made, **model},
    }


def names() -> dict:
    """A tokenizer.json as Llama's: spaces as U+2581, bytes by name; with a merge that would make "<0x41>" of text."""
    made = [["\u2581", "t"], ["h", "e"], ["\u2581t", "he"], ["<", "0"], ["<0", "x"], ["<0x", "4"], ["<0x4", "1"]]
    made += [["<0x41", ">"], ["<", "s"], ["<s", ">"]]
    tokens = ["<unk>", "<s>", "</s>", *BYTE_NAMES, *"\u2581the<0x41>sqabc/"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*tokens, *map("".join, made)]))}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": x, **FLAGS, "special": True} for x, i in vocab.items() if i < 3],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]},
        "model": {
            **{"type": "BPE", "vocab": vocab, "merges": made, "unk_token": "<unk>"},
            **{"byte_fallback": True, "fuse_unk": True},
        },
    }


def unigram() -> dict:
    """A tokenizer.json as T5's, but with bytes."""
    tokens = [
        "<pad>",
        "<unk>",
        *BYTE_NAMES,
        "\u2581",
        "\u2581the",
        *"the<0x41>s",
        "<s>",
    ]
    vocab = [[piece, -float(len(piece) < 2)] for piece in dict.fromkeys(tokens)]
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": vocab[i][0], **FLAGS, "special": True} for i in (0, 1, len(vocab) - 1)],
        "normalizer": None,
        "pre_tokenizer": step,
        "decoder": step,
        "model": {"type": "Unigram", "vocab": vocab, "unk_id": 1, "byte_fallback": True},
    }


def wordpiece() -> dict:
    """A tokenizer.json as BERT's."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcthe", *("##" + x for x in "abcthe"), "the", "[", "]"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*tokens, "##C", "##L", "##S", "C"]))}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": x, **FLAGS, "special": True} for x, i in vocab.items() if i < 5],
        "normalizer": {"type": "BertNormalizer", "lowercase": True, "clean_text": True, "handle_chinese_chars": True},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            **{"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]"},
            **{"continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        },
    }


def ranks() -> bytes:
    """A file of ranks: the bytes and what the merges make."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(LETTERS[letter] for letter in left + right) for left, right in merges()]
    tokens += [b"<s", b"<s>"]
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


def packed(spec: dict) -> bytes:
    return json.dumps(spec, ensure_ascii=False).encode()


EXACT = {
    "trained": lambda: text.load(text.train(CORPUS, 340)),
    "llama": lambda: text.load(pieces()),
    "letters": lambda: text.load(packed(letters())),
    "names": lambda: text.load(packed(names())),
    "ranks": lambda: text.load_ranks(ranks(), "gpt2", {"<|endoftext|>": 318, "<|im_start|>": 330}),
}
OTHERS = {
    "nfkc": lambda: text.load(pieces("unigram", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)),
    "no bytes": lambda: text.load(pieces("unigram", byte_fallback=False)),
    "wordpiece": lambda: text.load(packed(wordpiece())),
    "unigram": lambda: text.load(packed(unigram())),
    "qwen": lambda: text.load_ranks(ranks(), "qwen", {"<|endoftext|>": 318}),
}
