"""Tokenizer files and directories of strangers: broken, contradictory or malicious ones are refused in one sentence."""

import contextlib
import json
import os
import pickle
import random
from collections.abc import Iterator

import pytest
from tokenizer_files import FLAGS, letters, names, packed, pieces, ranks, unigram, wordpiece

from mmjax.core.errors import InputError
from mmjax.tokenizers import folder, proto, text


def refused(call, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"")
    assert "is empty" in refused(text.load, path)
    path.write_bytes(pickle.dumps({"model": 1}))
    assert "not a whole SentencePiece model" in refused(text.load, path)
    (tmp_path / "link").symlink_to(path)
    assert "symbolic link" in refused(text.load, tmp_path / "link")
    (tmp_path / "nowhere").symlink_to("none")
    refused(text.load, tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refused(text.load, tmp_path / "pipe")
    assert "no regular file" in refused(text.load, "/dev/zero")
    assert "cannot read" in refused(text.load, "a\0b")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(folder.MOST + 1)
    assert "more than 134,217,728 bytes" in refused(text.load, tmp_path / "huge")
    assert "neither" in refused(text.load, tmp_path)


def test_the_cache_of_hugging_face_is_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1f").write_bytes(packed(letters()))
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1f")
    assert text.load(snapshot).size == 321
    (tmp_path / "secret").write_bytes(packed(letters()))
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../secret")
    assert "symbolic link" in refused(text.load, snapshot)


def mutated(data: bytes, count: int, values: bytes) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] = rng.choice(values)
        yield bytes(changed)


@pytest.mark.parametrize("make", [letters, names, unigram, wordpiece, pieces])
def test_truncated_and_mutated_files(make):
    """What is left is a tokenizer that keeps its promise, or a sentence."""
    data, values = pieces() if make is pieces else packed(make()), b'0",:{}[]ax \xff'
    for end in range(1, len(data), len(data) // 40):
        refused(text.load, data[:end])
    for changed in mutated(data, 150, bytes(range(256)) if make is pieces else values):
        with contextlib.suppress(InputError):
            text.load(changed).encode("the <s> <0x41> [CLS]")


def test_what_is_written_is_what_is_read():
    model = pieces(user_defined_symbols=["<image>"])
    parts = proto.read(model, "it")
    place = [piece.text for piece in parts.pieces].index("<image>")
    again = proto.read(parts.written({place: ("x" * 300, proto.CONTROL)}, False), "it")
    assert (parts.prefix, again.prefix, parts.identity, again.identity) == (True, False, True, True)
    assert [p[:2] for p in again.pieces[:place]] == [p[:2] for p in parts.pieces[:place]]
    assert again.pieces[place][:2] == ("x" * 300, proto.CONTROL)
    assert parts.pieces[place].type == proto.USER_DEFINED
    for data in (b"\x0a\x05ab", b"\x0a", b"\x80" * 20, b"\x0d\x00", b"\x0b", b"\x02\x00"):
        with pytest.raises(proto._Broken):
            list(proto._fields(data))


def changed(spec: dict, **model) -> bytes:
    return packed({**spec, "model": {**spec["model"], **model}})


def added(spec: dict, token: int, content: str) -> bytes:
    return packed(
        {**spec, "added_tokens": [*spec["added_tokens"], {"id": token, "content": content, **FLAGS, "special": True}]}
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (packed({"version": "1.0"}), "not a tokenizer.json"),
        (packed({**letters(), "model": {"type": "Evil"}}), "model of type 'Evil'"),
        (changed(letters(), dropout=0.1), "at random"),
        (changed(names(), ignore_merges=True), "lets text name bytes"),
        (changed(letters(), vocab={}), "no vocabulary"),
        (changed(letters(), vocab={"a": -1}), "outside 0 to"),
        (changed(letters(), vocab={"a": 2**30}), "outside 0 to"),
        (changed(letters(), vocab={"a": 1, "b": 1}), "twice"),
        (changed(letters(), vocab={"a": 1.5}), "outside 0 to"),
        (changed(letters(), merges=[["a"]]), "not a tokenizer.json"),
        (added(letters(), 5, "<x>"), "another's"),
        (added(letters(), 2**40, "<x>"), "ids are 0 to"),
        (b"[" * 100_000, "SentencePiece"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "levels deep"),
        (b'{"model": NaN}', "not finite"),
        (b'{"model": {}, "model": {}}', "twice"),
    ],
)
def test_contradictory_tokenizers(data, says):
    assert says in refused(text.load, data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"", "empty"),
        (lambda data: b"!!! 0\n" + data, "line 1"),
        (lambda data: data + b"YWE= 1\n", "one rank twice"),
        (lambda data: data + data[:7], "line 319"),
        (lambda data: data + b"YWFhYQ== 99999999\n", "over"),
        (lambda data: data + b"YWFhYQ== -1\n", "line 319"),
        (lambda data: data[200:], "line 1|no rank for the byte"),
        (lambda data: pickle.dumps([1]), "line 1"),
        (lambda data: b'{"config": {}}', "not a tekken.json"),
    ],
)
def test_broken_rank_files(change, says):
    found = refused(text.load_ranks, change(ranks()), "gpt2", {})
    assert any(x in found for x in says.split("|")), found


def test_ranks_with_what_does_not_fit():
    assert "choose one of gpt2" in refused(text.load_ranks, ranks(), "gpt5", {})
    assert "cannot have the id 3" in refused(text.load_ranks, ranks(), "gpt2", {"<x>": 3})
    assert "cannot have the id 500" in refused(text.load_ranks, ranks(), "gpt2", {"<x>": 500, "<y>": 500})


def tekken(**config) -> bytes:
    entries = [line.split() for line in ranks().splitlines()]
    vocab = [{"rank": int(rank), "token_bytes": token.decode(), "token_str": None} for token, rank in entries]
    own = {"pattern": text.ranks.PATTERNS["tekken"].words, "default_num_special_tokens": 10, "default_vocab_size": 300}
    special = [{"rank": 1, "token_str": "<s>", "is_control": True}]
    return json.dumps({"config": {**own, **config}, "vocab": vocab, "special_tokens": special}).encode()


def test_tekken():
    tokenizer = text.load_ranks(tekken(), "tekken", {"</s>": 2})
    assert (tokenizer.size, tokenizer.controls) == (300, {"<s>": 1, "</s>": 2})
    assert tokenizer.encode("\x00") == [10]
    assert tokenizer.decode(tokenizer.encode("the <s> fox")) == "the <s> fox"
    assert "another pattern" in refused(text.load_ranks, tekken(), "gpt2", {})
    assert "not a tekken.json" in refused(text.load_ranks, tekken(default_num_special_tokens=400), "tekken", {})


@pytest.fixture
def directory(tmp_path):
    """Writes the files of a directory."""

    def write(data: bytes, name="tokenizer.json", **settings):
        (tmp_path / name).write_bytes(data)
        for file, content in settings.items():
            (tmp_path / f"{file}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def test_a_directory_says_what_is_a_control(directory, caplog):
    entry = {"content": "the", **FLAGS, "special": True}
    path = directory(
        packed(letters()),
        tokenizer_config={
            "added_tokens_decoder": {str(letters()["model"]["vocab"]["<s>"]): {**entry, "content": "<s>"}}
        },
        special_tokens_map={"pad_token": {"content": "<pad>"}, "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
        added_tokens={"<image>": 321},
    )
    tokenizer = text.load(path)
    assert tokenizer.controls["<image>"] == 321
    assert tokenizer.controls["<pad>"] == 322
    assert "<unk>" not in tokenizer.controls
    assert "from 322 to 323 rows" in caplog.text
    assert tokenizer.exact
    assert "321, where" not in caplog.text


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        ({"legacy": False}, "first"),
        ({"legacy": True}, "always"),
        ({"a": 1}, "always"),
        ({"add_prefix_space": False}, "never"),
        ({"tokenizer_class": "LlamaTokenizer"}, "always"),
        ({"tokenizer_class": "GemmaTokenizer"}, "first"),  # as the model itself has it
    ],
)
def test_a_directory_says_where_the_space_is_put(directory, config, prefix):
    path = directory(pieces(), "tokenizer.model", tokenizer_config=config, added_tokens={"<image>": 400})
    tokenizer = text.load(path, controls=["<pad>"])
    assert tokenizer.prefix == prefix
    assert (tokenizer.controls["<image>"], tokenizer.controls["<pad>"], tokenizer.size) == (400, 401, 402)
    assert text.load(path, prefix="never").prefix == "never"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer_config": []}, "not a JSON object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<a>", "special": True}}}}, "broken"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": {"content": 3, "special": True}}}}, "broken"),
        ({"added_tokens": {"<a>": "b"}}, "two ids"),
        ({"added_tokens": {"<s>": 7}}, "the id 7, where"),
        ({"added_tokens": {"<a>": 7}}, "id"),
        ({"added_tokens": {"<a>": 10**12}}, "id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"400": {"content": "<a>", "special": False}}}}, "as text"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_contradictory_directories(directory, files, says, name):
    path = directory(packed(letters()) if name == "tokenizer.json" else pieces(), name, **files)
    assert says in refused(text.load, path)
