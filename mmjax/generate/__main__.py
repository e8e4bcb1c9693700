"""Answers questions about pictures, or goes on with a text: a local Hugging Face directory in, text out.

    python -m mmjax.generate DIR --image cat.jpg "What is this?"
    python -m mmjax.generate DIR --chat
    python -m mmjax.generate DIR --prompts questions.txt --json

DIR holds config.json, safetensors and a tokenizer, as huggingface_hub downloads it. The prompt is written by the
directory's chat template; without one, or with --plain, it is a text to go on with (behind its pictures, for families
that never had one: BLIP-2). Sampling is greedy unless --temperature is above 0.
"""

import argparse
import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmjax.core import config
from mmjax.core.errors import InputError

LARGEST = 2**24  # bytes of a file of prompts
MIB, DAYS = 4096, 30.0  # of the folder of visual tokens
MEMORY = 2**28  # bytes of visual tokens that are kept in memory
HELP = """/image FILE   show a picture with what you say next
/new          begin a new conversation
/quit         end (so does Ctrl-D; Ctrl-C ends an answer)"""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m mmjax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("directory", metavar="DIR", help="the model's directory")
    out.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to ask; with --chat, the first thing said")
    out.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture; as often as there are")
    out.add_argument("--prompts", metavar="FILE", help="a prompt in each line, answered together in one batch")
    out.add_argument("--chat", action="store_true", help="a conversation; /help lists its commands")
    out.add_argument("--plain", action="store_true", help="go on with the prompt as it is, without the chat template")
    out.add_argument("--system", metavar="TEXT", help="what the model is told first")
    out.add_argument("--max-tokens", metavar="N", type=int, default=256, help="the longest answer (256)")
    out.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 takes the likeliest token (0)")
    out.add_argument("--top-k", metavar="K", type=int, default=0, help="draw from the K likeliest tokens; 0: all")
    out.add_argument("--top-p", metavar="P", type=float, default=1.0, help="from those that have this probability")
    out.add_argument("--min-p", metavar="P", type=float, default=0.0, help="from those at least so likely, as a share")
    out.add_argument("--repetition-penalty", metavar="X", type=float, default=1.0, help="above 1: fewer repetitions")
    out.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the draws; of several prompts, the n-th has N + n - 1"
    )
    out.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends an answer; may be repeated")
    out.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the parameters; else the files'")
    out.add_argument("--tensor", metavar="N", type=int, default=1, help="split the parameters over N devices")
    out.add_argument("--features", metavar="DIR", help="where visual tokens of pictures are kept, between runs too")
    out.add_argument("--features-mib", metavar="N", type=int, help=f"MiB that they take at most ({MIB})")
    out.add_argument("--features-days", metavar="N", type=float, help=f"days for which they are kept ({DAYS})")
    out.add_argument("--json", action="store_true", help="one JSON object for each answer, and nothing else")
    return out


def main(arguments: Sequence[str]) -> int:
    """The program; gives its exit status."""
    # Intermixed, or the prompt could not stand behind --image.
    given = parser().parse_intermixed_args(list(arguments))
    asked = [given.prompt is not None, given.prompts is not None]
    if sum(asked) != 1 and not (given.chat and not given.prompts):
        raise InputError("Give a PROMPT, --prompts FILE or --chat (which may begin with a PROMPT).")
    if given.chat and (given.json or given.plain or given.prompts):
        raise InputError("--chat is a conversation on the terminal; leave --json, --plain and --prompts out.")
    if given.features is None and (given.features_mib is not None or given.features_days is not None):
        raise InputError("--features-mib and --features-days bound what --features DIR keeps; give it too.")
    if given.plain and (given.system or given.image):
        raise InputError("--plain goes on with a text, in which --system and --image have no place; leave them out.")
    if given.max_tokens < 1:
        raise InputError(f"--max-tokens is {given.max_tokens}; give at least 1.")
    # Before minutes are spent on the weights.
    how, images, prompts = _sampling(given), [_image(path) for path in given.image], _prompts(given)
    sys.stdout.reconfigure(errors="replace")
    session = _session(given)
    from mmjax.tokenizers.parts import NOTHING

    convention = session.processor.chat.convention
    if given.chat and convention.template is None and convention.assistant == NOTHING:
        raise InputError(
            f"{given.directory} has no chat template to write conversations by; give a PROMPT and --plain."
        )
    try:
        if given.chat:
            return _chat(session, given, how, images)
        documents = [_document(session, given, n, prompt, images) for n, prompt in enumerate(prompts)]
        return _answer(session, given, how, prompts, documents)
    except BrokenPipeError:  # whoever reads this has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _sampling(given: argparse.Namespace) -> Any:
    from mmjax.generate.sample import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{name: getattr(given, name) for name in names})


def _image(path: str) -> Any:
    """A picture, its bytes read now: a conversation shows it again and again."""
    from mmjax.sequence.document import Image
    from mmjax.tokenizers import image as images

    data = images.read_bytes(path)
    try:
        return Image(*images.read_size(data), data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _prompts(given: argparse.Namespace) -> list[str]:
    if given.prompts is None:
        return [] if given.prompt is None else [given.prompt]
    try:
        with open(given.prompts, "rb") as file:
            data = file.read(LARGEST + 1)
        lines = [line.rstrip("\r") for line in data.decode("utf-8-sig").split("\n")]
    except (OSError, ValueError) as error:
        raise InputError(f"--prompts {given.prompts!r} cannot be read ({error}); give a text file.") from error
    if len(data) > LARGEST:
        raise InputError(f"--prompts {given.prompts!r} has more than {LARGEST:,} bytes; cut it up.")
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise InputError(f"--prompts {given.prompts!r} has no line with a prompt in it.")
    return lines


def _session(given: argparse.Namespace) -> Any:
    import jax

    from mmjax.convert import huggingface, processor
    from mmjax.core.meshes import MeshConfig, make_mesh
    from mmjax.generate.session import Session

    store = _store(given)  # whose bounds may be wrong
    mesh = None
    if given.tensor != 1:
        if not 1 <= given.tensor <= jax.device_count():
            raise InputError(f"--tensor is {given.tensor}, and there are {jax.device_count()} devices; give as many.")
        mesh = make_mesh(MeshConfig(data=1, tensor=given.tensor), jax.devices()[: given.tensor])
    model = huggingface.load(given.directory, mesh=mesh, dtype=given.dtype)
    its = processor.load(given.directory, model)
    return Session(processor.with_colours(model, its), its, mesh=mesh, store=store, consume=True)


def _store(given: argparse.Namespace) -> Any:
    """Where visual tokens are kept: in the folder that was named, and in memory for a conversation."""
    from mmjax.core.store import Store

    if given.features is None:
        return Store(memory=MEMORY) if given.chat else None
    return Store(
        folder=Path(given.features),
        disk=(MIB if given.features_mib is None else given.features_mib) * 2**20,
        memory=MEMORY,
        age=(DAYS if given.features_days is None else given.features_days) * 86400,
    )


def _document(session: Any, given: argparse.Namespace, n: int, prompt: str, images: Sequence[Any]) -> Any:
    """A question, or a text to go on with."""
    from mmjax.sequence.document import Document, Text

    its = session.processor
    asked = its.chat.convention.template is not None or its.prompts or images or given.system
    if given.plain or not asked:
        return Document(f"prompt {n + 1}", (Text(prompt, "document"),))
    system = () if given.system is None else (Text(given.system, "system"),)
    return Document(f"prompt {n + 1}", (*system, *images, Text(prompt)))


def _answer(session: Any, given: argparse.Namespace, how: Any, prompts: Sequence[str], documents: Sequence[Any]) -> int:
    """Answers all prompts: one as it comes, several when all are there."""
    began = time.monotonic()
    alone = len(documents) == 1 and not given.json
    # Equal prompts are to have answers of their own.
    how = [replace(how, seed=(how.seed + n) % 2**32) for n in range(len(documents))]
    stream = session.stream(documents, how, max_tokens=given.max_tokens, stop=given.stop, chunk=8 if alone else 64)
    for _, text in stream:
        if alone:
            _print(text)
    seconds = time.monotonic() - began
    for prompt, answer in zip(prompts, session.answers, strict=True):
        if given.json:
            found = {"prompt": prompt, "text": answer.text, "reason": answer.reason, "tokens": len(answer.ids)}
            print(json.dumps(found | {"prompt_tokens": answer.prompt, "seconds": round(seconds, 3)}), flush=True)
        elif not alone:
            _print(f"> {prompt}\n{answer.text}\n\n")
    if alone:
        print(flush=True)
    return 0


def _chat(session: Any, given: argparse.Namespace, how: Any, images: Sequence[Any]) -> int:
    """A conversation, until its input ends."""
    from mmjax.sequence.document import Document, Text

    system = () if given.system is None else (Text(given.system, "system"),)
    said, shown = list(system), list(images)
    for line in _lines(given.prompt):
        command, _, rest = line.partition(" ")
        try:
            if command == "/new":
                said, shown = list(system), []
            elif command == "/help":
                print(HELP)
            elif command == "/image":
                shown.append(_image(rest.strip()))
            elif command.startswith("/") and command[1:].isalpha():
                raise InputError(f"There is no command {command}; /help lists them.")
            else:
                turn = [*said, *shown, Text(line)]
                answer = _turn(session, given, how, Document("the conversation", tuple(turn)))
                said, shown = [*turn, Text(answer, "assistant")], []
        except InputError as error:
            print(f"mmjax: {error}", file=sys.stderr, flush=True)
            if shown and not command.startswith("/"):
                shown = []
                print("mmjax: its pictures are taken back; say it without them, or give others", file=sys.stderr)
    return 0


def _turn(session: Any, given: argparse.Namespace, how: Any, document: Any) -> str:
    """Prints the answer as it comes; what was said of it until Ctrl-C."""
    text = ""
    try:
        for _, more in session.stream([document], how, max_tokens=given.max_tokens, stop=given.stop):
            text += more
            _print(more)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return text


def _lines(first: str | None) -> Iterator[str]:
    """What is said, line by line."""
    if first is not None:
        print(f"> {first}")
        yield first
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"mmjax: this line is not text ({error})", file=sys.stderr)
            continue
        if line == "/quit":
            return
        if line:
            yield line


def _print(text: str) -> None:
    """Prints a model's words, without what would steer the terminal."""
    safe = (c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
    print("".join(safe), end="", flush=True)


if __name__ == "__main__":
    config.main(main)
