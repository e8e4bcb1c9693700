"""Copies a model from one form to another: a Hugging Face directory, or a checkpoint of mmjax.

    python -m mmjax.convert SRC DST                     the other form than SRC has
    python -m mmjax.convert SRC DST --to hf             a Hugging Face directory, whatever SRC is
    python -m mmjax.convert SRC DST --dtype bfloat16    every floating-point parameter in this format

One tensor is in memory at a time. What is not changed is the same bytes, there and back: weights, config.json,
tokenizer and the like. DST is new; it is whole, or it is not there. Exit status 2 for bad input.
"""

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax

from mmjax.convert import huggingface, orbax
from mmjax.convert.files import CONFIG
from mmjax.convert.huggingface import Model
from mmjax.core import config, tree
from mmjax.core.errors import InputError
from mmjax.core.meshes import MESH_AXES

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: list[str]) -> int:
    """The program; gives its exit status."""
    given = _parser().parse_args(arguments)
    sizes = {name: getattr(given, name) for name in MESH_AXES if getattr(given, name) is not None}
    source = Path(given.source)
    theirs = (source / CONFIG).exists()
    if not theirs and not (source / "done").is_dir():
        what = "is neither a Hugging Face directory (it has no config.json) nor a checkpoint of mmjax"
        raise InputError(f"{source} {what}; give the local directory of one")
    to = given.to or ("orbax" if theirs else "hf")
    _refuse(given, theirs, to, sizes)
    if theirs:
        model = huggingface.opened(source, dtype=given.dtype)
    else:
        model = orbax.opened(source, step=given.step, dtype=given.dtype)
    if to == "orbax":
        orbax.write(given.target, model, sizes=sizes)
    else:
        if given.shard_bytes is not None:
            model = dataclasses.replace(model, origin=dataclasses.replace(model.origin, headers={}, index=None))
        huggingface.save(given.target, model, shard_bytes=given.shard_bytes or huggingface.SHARD_BYTES)
    print(f"{given.target}\t{_summary(model)}")
    return 0


def _refuse(given: argparse.Namespace, theirs: bool, to: str, sizes: dict[str, int]) -> None:
    """Raises InputError for what would change nothing."""
    if theirs and given.step is not None:
        raise InputError(f"{given.source} is a Hugging Face directory, which has no steps; leave --step out")
    if to == "hf" and sizes:
        raise InputError("A Hugging Face directory is written for no mesh; leave --mesh out")
    if to == "orbax" and given.shard_bytes is not None:
        raise InputError("--shard-bytes is for files of a Hugging Face directory; leave it out")
    wrong = [name for name, n in {**sizes, "shard-bytes": given.shard_bytes}.items() if n is not None and n < 1]
    if wrong:
        raise InputError(f"{wrong[0]} is less than 1; give a number of devices, or of bytes")


def _summary(model: Model) -> str:
    flat = tree.flatten(model.params)
    kinds = ", ".join(sorted({str(x.dtype) for x in flat.values()}))
    return f"{model.origin.raw['model_type']}\t{tree.count(model.params):,} parameters\t{kinds}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmjax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="a Hugging Face directory (config.json, safetensors), or a checkpoint of mmjax")
    add("target", metavar="DST", help="a directory that is not there yet")
    add("--to", choices=("orbax", "hf"), help="what DST becomes; otherwise what SRC is not")
    add("--dtype", choices=DTYPES, help="of the floating-point parameters; otherwise as they are")
    add("--step", type=int, metavar="N", help="of a checkpoint; otherwise the newest")
    add("--shard-bytes", type=int, metavar="N", help="new files of so many bytes; otherwise the files that there were")
    for name in MESH_AXES:
        text = f"devices along `{name}` of the mesh that will read DST: a checkpoint is cut so that each reads its part"
        add(f"--mesh.{name}", dest=name, type=int, metavar="N", help=text)
    return parser


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)  # which leaves `with` blocks: nothing half written stays


if __name__ == "__main__":
    # The host alone: an accelerator may be busy, and its memory is not needed.
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(config.main(main))
