"""Fine-tunes a model on datasets: a Hugging Face directory and files in, a run out.

    python -m mmjax.train finetune --model DIR --data train.jsonl --eval test.jsonl --stages connector:200

DIR is a vision-language model's or a language model's alone, whose documents have no pictures. Its processor writes the
documents: tokenizer, chat template, pictures. Each stage trains some of the parameters for some steps, and the next one
goes on with them. The same command again resumes a run that was stopped.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmjax.convert.processor import Processor
from mmjax.core import config as configs
from mmjax.core import processes
from mmjax.core.errors import InputError
from mmjax.data import sets
from mmjax.models import vlm
from mmjax.nn import lora
from mmjax.sequence.buckets import ladder
from mmjax.sequence.document import Document, Image, Text
from mmjax.train import cluster, export, loop, presets, start
from mmjax.train.config import Config, Optimizer, Packing

LOOK = 1024  # documents of a dataset that are measured for a row's default size

DESCRIPTION = """STAGES are NAME:STEPS or NAME:STEPS:RATE, where NAME is a preset ({presets}), a pattern of parameters'
paths as 'decoder/blocks/*/q/kernel', or several of them joined by '+'. '!' in front of one takes it back from those
before: 'everything+!vision', 'connector+!connector/down'."""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m mmjax.train finetune",
        description=f"{__doc__}\n{DESCRIPTION.format(presets=', '.join(presets.PRESETS))}",
        epilog="With --model and --data, --help lists every other field of the run that can be set.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add = out.add_argument
    add("-h", "--help", action="store_true", help="show this message")
    add("--model", metavar="DIR", help="a Hugging Face directory, or a checkpoint that mmjax.convert made of one")
    add(
        "--data",
        metavar="PATH[=WEIGHT]",
        nargs="+",
        default=[],
        help="datasets (data.formats); shares, if several",
    )
    add("--eval", metavar="PATH", nargs="+", default=[], help="datasets that judge the run, before and after")
    add("--export", choices=("merged", "adapter"), help="what the run leaves beside its checkpoints (train.export)")
    add("--stages", metavar="STAGE", nargs="+", default=["connector:200"], help="one after the other")
    return out


def config_of(arguments: Sequence[str]) -> tuple[Config, export.To | None]:
    """The run that a command line asks for, and what it is to leave.

    Raises:
      InputError: no model, no data, a stage that cannot be, or what `start.both` and `data.formats` refuse.
    """
    given, rest = parser().parse_known_args(list(arguments))
    if given.help and not (given.model and given.data):
        parser().print_help()
        raise SystemExit(0)
    if not given.model or not given.data:
        raise InputError(f"Give --{'data PATH' if given.model else 'model DIR'}; --help shows how.")
    stages = presets.stages(given.stages)
    if "--steps" in _named(rest):
        raise InputError("The steps of a fine-tuning are those of its --stages; leave --steps out.")
    model, its = start.both(given.model)
    place = _place(its)
    sources = tuple(_source(text, place) for text in given.data)
    evaluation = tuple(sets.Files(Path(path), place=place) for path in given.eval)
    packing, words = _packing(its, sources + evaluation, model.cfg.decoder.longest)
    default = Config(
        model=model.cfg,
        data=sets.Mixed(sources, held_out=0, evaluation=evaluation),
        out=Path("runs/finetune"),
        base=Path(given.model),
        lora=lora.Config(targets=_targets(model.cfg))
        if any("lora" in stage.name.split("+") for stage in stages)
        else None,
        stages=stages,
        steps=sum(stage.steps for stage in stages),
        resolution=its.resolution,
        packing=packing,
        sequence=dataclasses.replace(
            its.sequence,
            answer=packing.tokens if its.sequence.answer else 0,  # all of a row may be answers
            instruction=ladder(words, 16) if words else 0,
        ),
        optimizer=Optimizer(learning_rate=1e-4, warmup=0.03, final=0.0, b2=0.999, weight_decay=0.0),
        answer=64,
    )
    if given.help:
        rest = [*rest, "--help"]
    cfg = configs.changed(default, rest, "python -m mmjax.train finetune")
    if "--optimizer.learning-rate" in _named(rest) and all(stage.learning_rate for stage in cfg.stages):
        raise InputError(
            f"Every stage has a learning rate of its own, and optimizer.learning-rate would be ignored; say it in the "
            f"stage, as {cfg.stages[0].name}:{cfg.stages[0].steps}:{cfg.optimizer.learning_rate:g}."
        )
    return dataclasses.replace(cfg, steps=sum(stage.steps for stage in cfg.stages)), given.export


def run(arguments: Sequence[str]) -> int:
    """The command; gives its exit status."""
    cfg, to = config_of(arguments)
    target = cfg.out / (to or "")
    if to and target.exists():
        raise InputError(f"{target} is there already; remove it, or leave --export out.")
    if to == "adapter":
        export.refuse(cfg)
    with cluster.joined(cfg.cluster):  # the first process exports, and the others wait for it
        status = loop.run(cfg)
        if to and not status:
            processes.from_first(lambda: _export(cfg, to, target))
    return status


def _export(cfg: Config, to: export.To, target: Path) -> None:
    export.export(cfg.out, target, to, base=cfg.base)
    print(f"{to}: {target}")


def _named(arguments: Sequence[str]) -> set[str]:
    """The fields that a command line sets."""
    return {a.partition("=")[0].replace("_", "-") for a in arguments}


def _targets(model: vlm.Config) -> tuple[str, ...]:
    """The kernels that are adapted if nothing else is said: all products in the blocks of the language model."""
    if model.decoder.answers:
        return ("decoder/encoder/blocks/*", "decoder/answer/blocks/*")
    return lora.TARGETS if model.decoder.cross is None else lora.CROSSED


def _place(its: Processor) -> Literal["as_written", "bare"]:
    """How LLaVA's JSON is read, which has a newline behind a picture: without it, where the template writes one."""
    if its.chat.convention.template is None or its.resolution is None:
        return "as_written"
    probe = its.layout(Document("a probe", (Image(64, 64, b""), Text("x"))))
    behind = itertools.dropwhile(lambda piece: not piece.views, probe.pieces)
    written = its.plain.decode([i for piece in behind if not piece.views for i in piece.ids])
    return "bare" if written.startswith("\n") else "as_written"


def _source(text: str, place: Literal["as_written", "bare"]) -> sets.Files:
    """A dataset from PATH or PATH=WEIGHT."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return sets.Files(Path(text), place=place)
    try:
        return sets.Files(Path(path), weight=float(weight), place=place)
    except ValueError as error:
        raise InputError(f"The weight of {path} is {weight!r}; give a number, as {path}=0.5.") from error


def _packing(its: Processor, sources: Sequence[sets.Files], most: int | None) -> tuple[Packing, int]:
    """Rows with room for two of the longest documents among the first of every dataset, of at most so many tokens.

    And the tokens of the longest text that the connector reads beside their pictures; 0 where it reads none.

    Raises:
      InputError: there is nothing to learn in any of those of a dataset.
    """
    longest, words, lay = 0, 0, start.layout_of(its)
    for source in sources:
        documents = sets.open_source(source)[1]
        first = [documents[n] for n in range(min(LOOK, len(documents)))]
        some = [lay(document) for document in first]
        if not any(piece.train for laid in some for piece in laid.pieces):
            raise InputError(
                f"In none of the {len(some)} first documents of {source.path} is there anything to learn, as what an "
                f"assistant says; give others."
            )
        longest = max(longest, *(laid.tokens + laid.answers for laid in some))
        words = max(words, *(start.beside(its, document) for document in first))
    tokens = ladder(2 * longest, 64)
    return Packing(rows=8, tokens=tokens if most is None else min(tokens, most)), words
