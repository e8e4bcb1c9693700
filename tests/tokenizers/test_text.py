import pickle
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import InputError
from mmjax.tokenizers.text import load, train
from mmjax.tokenizers.vocab import CONTROLS, Control

CORPUS = [f"The quick brown fox jumps over the lazy dog {i} times, <|image|> and <0x41> too." for i in range(200)]
CORPUS += ["Was kostet die schöne Welt?\n\tdef f(x):  return x\r\n", "日本語のテキスト"] * 20
CORPUS += [
    f"{a}{b} {b}{a}." for a in ("red", "blu", "gre", "yel") for b in ("circle", "square", "star", "house", "tree")
] * 3
SIZE = 340
INJECTIONS = [control.symbol for control in CONTROLS] + [
    "<image>",
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<|im_start|>user",
    "＜image＞",
    "<0x41>",
    "<|IMAGE|>",
]
ODDITIES = [
    "",
    " ",
    "   a    b   ",
    "\n",
    "\n\t \r\n\x0b\x0c",
    "\x00a\x00",
    "\u2581 under \u2581\u2581x",  # what SentencePiece stores a space as
    "\u2585\u2047\ufffd",  # what it marks the unknown with
    "e\u0301 \u00e9 \uff21 \ufb01 \u212b",  # changed by every Unicode normal form
    "\ufeff\u200b\u200d\u2028\x85\xa0",
    "👩‍👩‍👧 \U0010ffff \ufdd0",
    "ไทย العربية हिन्दी",
]


@pytest.fixture(scope="module")
def model():
    return train(CORPUS, SIZE)


@pytest.fixture(scope="module")
def tokenizer(model):
    return load(model)


def test_ids_follow_the_convention(tokenizer):
    vocab = tokenizer.vocab
    assert [getattr(vocab, control.name) for control in CONTROLS] == list(range(len(CONTROLS)))
    assert vocab.size == SIZE
    assert tokenizer.controls == {control.symbol: i for i, control in enumerate(CONTROLS)}


def test_it_has_learnt_words(tokenizer):
    # 266 ids are controls and bytes: a text of learnt words uses few tokens, all above those.
    ids = tokenizer.encode("The quick brown fox")
    assert len(ids) <= 6
    assert min(ids) > 265


@pytest.mark.parametrize("text", INJECTIONS + [f"a{x} {x}b" for x in INJECTIONS])
def test_no_text_gives_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.controls.values())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ODDITIES)
def test_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text() | st.lists(st.sampled_from(INJECTIONS + ODDITIES)).map("".join))
def test_any_text_comes_back_unchanged(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(CONTROLS) < token < SIZE for token in ids)


def test_decode_skips_controls_and_takes_arrays(tokenizer):
    vocab, fox = tokenizer.vocab, tokenizer.encode(" fox")
    ids = [vocab.begin, vocab.user, vocab.image_start, vocab.image, vocab.image_end, *fox, vocab.end, vocab.pad]
    assert tokenizer.decode(ids) == " fox"
    assert tokenizer.decode(np.array(ids, np.int32)) == " fox"
    assert tokenizer.decode([]) == ""
    # Cut in the middle of a character, as a model may: marked, not an error.
    assert tokenizer.decode(tokenizer.encode("\U0010ffff")[:-1]) == "\ufffd"


@pytest.mark.parametrize("token", [-1, SIZE, 10**9])
def test_decode_refuses_ids_it_does_not_have(tokenizer, token):
    with pytest.raises(InputError, match=rf"token id {token} at index 1 is outside 0 to {SIZE - 1}"):
        tokenizer.decode([20, token])


def test_a_lone_surrogate_is_refused_with_its_index(tokenizer):
    with pytest.raises(InputError, match=r"character 4 is a lone surrogate \(U\+D83D\)"):
        tokenizer.encode("abc \ud83d x")
    with pytest.raises(InputError, match=r"text 1 of the corpus: character 0 is a lone surrogate"):
        train(["fine", "\udc00"], SIZE)


def test_training_is_repeatable_and_silent(model, capfd):
    again = train(iter(CORPUS), SIZE)
    assert again == model
    assert load(again).fingerprint == load(model).fingerprint
    assert load(train(CORPUS[:-1], SIZE)).fingerprint != load(model).fingerprint
    assert len(load(model).fingerprint) == 64
    assert capfd.readouterr() == ("", "")


def test_repeated_training_text_keeps_its_weight():
    # The trainer is given words and counts: a rare and a frequent word of one shape must not come out alike.
    texts = ["zebra"] * 500 + [f"{a}{b} quux" for a in "abcdefgh" for b in "ijklmnop"] + ["wombat"]
    tokenizer = load(train(texts, 290))
    assert len(tokenizer.encode("zebra")) == 1 < len(tokenizer.encode("wombat"))


def test_text_without_spaces_is_learnt_from():
    # SentencePiece leaves out, without a word, what is longer than 4,192 bytes between two spaces.
    tokenizer = load(train(["".join(random.Random(0).choices(["日本語", "の", "テキスト", "です。"], k=5000))], 300))
    assert len(tokenizer.encode("テキスト日本語です")) <= 3
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_your_own_controls_get_ids_too():
    audio = Control("audio", "<|audio|>")
    tokenizer = load(train(CORPUS, SIZE, controls=(*CONTROLS, audio)))
    assert tokenizer.controls["<|audio|>"] == len(CONTROLS)
    assert len(CONTROLS) not in tokenizer.encode("<|audio|>")
    reordered = load(train(CORPUS, SIZE, controls=CONTROLS[::-1]))
    assert (reordered.vocab.pad, reordered.vocab.image_end) == (len(CONTROLS) - 1, 0)


@pytest.mark.parametrize(
    ("controls", "reason"),
    [
        (CONTROLS[1:], "name='pad'.* is missing"),
        ((*CONTROLS, Control("bos", "<|begin|>")), "blank or repeated"),
        ((*CONTROLS, Control("audio", "")), "blank or repeated"),
        ((*CONTROLS, Control("pad", "<|second|>")), "blank or repeated"),
    ],
)
def test_controls_that_clash_are_refused(controls, reason):
    with pytest.raises(InputError, match=reason):
        train(CORPUS, SIZE, controls=controls)


@pytest.mark.parametrize("corpus", [[], [""], ["\x00"], ["\t"]])
def test_a_corpus_without_text_is_refused(corpus):
    with pytest.raises(InputError, match="holds no text to learn from"):
        train(corpus, SIZE)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (-1, "out of range"),
        (266, "more than the 266 controls and bytes"),
        (2**40, "out of range"),
        (280, r"less than the controls, bytes and letters need; give at least \d+$"),
        (50_000, r"more than this corpus fills; give at most \d+, or more text$"),
    ],
)
def test_a_vocabulary_of_another_size_than_possible_is_refused(size, reason, capfd):
    with pytest.raises(InputError, match=reason):
        train(CORPUS, size)
    assert capfd.readouterr() == ("", "")


def test_the_size_that_the_message_advises_works():
    with pytest.raises(InputError) as refusal:
        train(CORPUS, 50_000)
    most = int(str(refusal.value).split("at most ")[1].split(",")[0])
    assert load(train(CORPUS, most)).vocab.size == most


def test_a_model_comes_back_from_a_file(model, tokenizer, tmp_path):
    path = tmp_path / "text.model"
    path.write_bytes(model)
    for loaded in (load(path), load(str(path)), pickle.loads(pickle.dumps(tokenizer))):
        assert loaded.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
        assert (loaded.vocab, loaded.model) == (tokenizer.vocab, model)


def test_broken_models_are_refused_in_silence(model, tmp_path, capfd):
    path = tmp_path / "empty.model"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"empty.model' is empty"):
        load(path)
    with pytest.raises(InputError, match=r"cannot read .*absent.model"):
        load(tmp_path / "absent.model")
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load(tmp_path)
    for broken in (b"", b"<html>", b"\x00", model + b"x", *(model[:n] for n in range(0, len(model), 97))):
        with pytest.raises(InputError):
            load(broken)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"control_symbols": ["<|image|>"]}, "no control token <|pad|>"),
        ({"user_defined_symbols": ["<|pad|>"]}, "no control token <|pad|>"),
        ({"remove_extra_whitespaces": True}, "unchanged"),
        ({"normalization_rule_name": "nmt_nfkc"}, "unchanged"),
        ({"byte_fallback": False}, "unchanged"),
    ],
)
def test_models_made_otherwise_are_refused(settings, reason):
    """Each setting that would lose text, or let text produce a control, alone."""
    import io

    import sentencepiece

    written = io.BytesIO()
    ours = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "control_symbols": [] if "user_defined_symbols" in settings else [control.symbol for control in CONTROLS],
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=400, hard_vocab_limit=False, minloglevel=2,
        **{**ours, **settings},
    )  # fmt: skip
    with pytest.raises(InputError, match=reason.replace("|", r"\|")):
        _ = load(written.getvalue(), exact=True).vocab
    if reason == "unchanged":
        assert not load(written.getvalue()).exact


@pytest.mark.parametrize("unit", ["a", "\u2581a", "日", " ", "\U0010ffff"])
def test_a_megabyte_without_a_break_takes_bounded_time(tokenizer, unit):
    text = unit * (1_000_000 // len(unit.encode()))
    start = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 10  # seconds; 0.1 to 1.5 measured, and quadratic would be hours


@pytest.mark.parametrize("text", ["x" * 1_000_000, " ".join(CORPUS * 4)], ids=["a word", "a repeated passage"])
def test_training_takes_bounded_time(text):
    start = time.perf_counter()
    train([text, *CORPUS], SIZE)
    assert time.perf_counter() - start < 10  # 0.1 measured; given whole, SentencePiece 0.2.2 takes minutes to hours


def test_a_long_text_is_encoded_as_its_words_are(tokenizer):
    # Scores are summed in single precision: over a long text the sum must not blur the choice of pieces.
    words = [" " + word for word in " ".join(CORPUS).split(" ")]
    text = random.Random(0).choices(words, k=50_000)
    assert tokenizer.encode("".join(text)) == [token for word in text for token in tokenizer.encode(word)]
