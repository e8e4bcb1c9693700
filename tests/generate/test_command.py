"""The command line: one prompt as it comes, a batch of them, a conversation, and bad input in one sentence."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from talker import asked, made

from mmjax.core.errors import InputError
from mmjax.generate import __main__ as command
from mmjax.generate.sample import Sampling
from mmjax.generate.session import Session
from mmjax.sequence.document import Text

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(*made())


@pytest.fixture
def run(session, monkeypatch, capsys):
    """Runs the command on the tiny model; gives what it prints."""

    def go(*arguments: str, said: str = "") -> str:
        monkeypatch.setattr(command, "_session", lambda given: session)
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **how: None, raising=False)
        assert command.main(["DIR", *arguments]) == 0
        return capsys.readouterr().out

    return go


@pytest.fixture
def cat(tmp_path) -> Path:
    path = tmp_path / "cat.png"
    Pillow.fromarray(np.random.default_rng(3).integers(0, 256, (8, 12, 3), np.uint8)).save(path)
    return path


def plain(text: str) -> str:
    """As the command prints it."""
    return "".join(c if c in "\n\t" or not (c < " " or "\x7f" <= c < "\xa0") else "\ufffd" for c in text)


def test_one_prompt(run, session, cat):
    found = run("--image", str(cat), "the fox", "--max-tokens", "9", "--temperature", "1", "--seed", "3")
    pixels = command._image(str(cat))
    wanted = Session(*made()).answer([asked(pixels, "the fox")], Sampling(temperature=1.0, seed=3), max_tokens=9)[0]
    assert found == plain(wanted.text) + "\n"
    assert len(wanted.ids) >= 1
    assert wanted.prompt == session.answers[0].prompt


def test_a_batch_and_json(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the fox\n\nthe dog jumps\n")
    how = ("--prompts", str(file), "--max-tokens", "6", "--temperature", "1.5", "--top-p", "0.9")
    rows = [json.loads(line) for line in run(*how, "--json").splitlines()]
    assert [row["prompt"] for row in rows] == ["the fox", "the dog jumps"]
    assert all(row["tokens"] <= 6 and row["reason"] in ("end", "length") for row in rows)
    assert run(*how) == plain("".join(f"> {row['prompt']}\n{row['text']}\n\n" for row in rows))


def test_plain_goes_on_with_the_text(run, session):
    run("the fox", "--plain", "--max-tokens", "3")
    alone = session.answers[0]
    run("the fox", "--max-tokens", "3")
    assert session.answers[0].prompt > alone.prompt


def test_a_conversation(run, session, cat, capsys):
    said = f"the fox\n/image {cat}\n/image {cat}\nthe dog\n/nonsense\n/image {cat}x\n/help\nx\n/new\nthe fox\n/quit\nno"
    found = run("--chat", "--max-tokens", "4", said=said)
    answers = [part.partition("\n")[0] for part in found.split("> ")[1:]]
    assert answers[0] == answers[-2]  # a new conversation begins as the first did
    assert "/image FILE" in found
    # The same conversation at once: two pictures with the second thing said.
    pixels = command._image(str(cat))
    anew, spans = Session(*made()), []
    for turn in (["the fox"], [pixels, pixels, "the dog"], ["x"]):
        spans += [Text(s) if isinstance(s, str) else s for s in turn]
        answer = anew.answer([asked(*spans)], max_tokens=4)[0]
        spans.append(Text(answer.text, "assistant"))
        assert plain(answer.text).partition("\n")[0] in answers


def test_where_visual_tokens_are_kept(tmp_path):
    def store(*arguments):
        return command._store(command.parser().parse_args(["DIR", *arguments]))

    assert store("hello") is None
    assert store("--chat").folder is None
    assert store("--chat").memory == command.MEMORY
    found = store("hello", "--features", str(tmp_path), "--features-mib", "7", "--features-days", "2")
    assert (found.folder, found.disk, found.age) == (tmp_path, 7 * 2**20, 2 * 86400)


def test_an_escape_code_steers_nothing(capsys):
    command._print("a\x1b[31m\x9b\r\tb\n")
    assert capsys.readouterr().out == "a\ufffd[31m\ufffd\ufffd\tb\n"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "Give a PROMPT"),
        (["hello", "--prompts", "x"], "Give a PROMPT"),
        (["hello", "--chat", "--json"], "--chat is a conversation"),
        (["--chat", "--prompts", "x"], "--chat is a conversation"),
        (["hello", "--features-mib", "5"], "give it too"),
        (["hello", "--plain", "--system", "x"], "--plain goes on"),
        (["hello", "--max-tokens", "0"], "--max-tokens is 0"),
        (["hello", "--temperature", "-1"], "temperature is -1"),
        (["hello", "--image", "nowhere.jpg"], "nowhere.jpg"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["hello", "--tensor", "99"], "--tensor is 99"),
        (["hello", "--features", "x", "--features-mib", "0"], "keeps nothing"),
        (["hello", "--features", "x", "--features-days", "-1"], "keeps nothing"),
        (["hello"], "DIR"),
    ],
)
def test_bad_input_is_one_sentence(arguments, what, monkeypatch):
    with pytest.raises(InputError, match=what) as caught:
        command.main(["DIR", *arguments])
    assert "\n" not in str(caught.value)


def test_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "mmjax.generate", "/nowhere", "hello"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mmjax: ")
    assert done.stderr.count("\n") == 1
