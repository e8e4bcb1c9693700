"""python -m mmjax.plan CONFIG --topology v5e:16x16 [--all] [--documents N] [--memory GIB] [--stage N]
[--decode ROWS PLACES] [--json] [--field value …]
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence

from mmjax.core import config
from mmjax.core.errors import InputError
from mmjax.plan import set_environment

WHAT = """Compiles the train step of the largest bucket for chips that are not here, and says what it needs; or, with
--decode, the step that writes one more token (adapters merged). Programs that evaluate are not planned.

planner's options:
  --topology T    TPUs and their torus (v5e:16x16, v5p:8x8x4, v4:4x4x4, v6e:8x8), or GPUs (a100:8, h100:64, h200, b200)
  --all           every bucket, not the largest alone
  --documents N   tokens of each document of a row (all of the row is one), for the work of attention
  --memory GIB    of a chip that the step may use (all that the compiler allows)
  --stage N       the run's N-th stage, where it has stages (1)
  --decode R P    instead: one more token of each of R rows, with a cache of P tokens
  --json          one JSON object, last"""


def options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The planner's own options, and what is left: the config and its fields."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--topology")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--documents", type=int, default=0)
    parser.add_argument("--memory", type=float, default=0.0)
    parser.add_argument("--stage", type=int)
    parser.add_argument("--decode", type=int, nargs=2, metavar=("ROWS", "PLACES"))
    parser.add_argument("--json", action="store_true")
    try:
        mine, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; see python -m mmjax.plan --help.") from None
    if mine.documents < 0:
        raise InputError(f"--documents is {mine.documents}; give tokens, or 0: all of the row is one document.")
    if not 0 <= mine.memory < math.inf:  # nor nan
        raise InputError(f"--memory is {mine.memory}; give GiB, or 0: all that the compiler allows.")
    if mine.decode and (mine.all or mine.documents or mine.stage is not None):
        raise InputError("--decode plans the next token of rows; --all, --documents and --stage are a training step's.")
    if mine.decode and min(mine.decode) < 1:
        raise InputError(f"--decode is {mine.decode[0]} {mine.decode[1]}; give rows and tokens, at least 1 of both.")
    return mine, rest


def run(arguments: Sequence[str]) -> int:
    """0: everything fits; 1: something does not. (2: an InputError, config.main's; what a compiler refuses is one.)"""
    set_environment()  # before JAX is imported
    mine, rest = options(arguments)
    cfg = config.from_command_line("mmjax.plan", rest, WHAT)
    if mine.topology is None:
        raise InputError("Which chips? Give --topology, as in --topology v5e:16x16.")
    from mmjax.plan import planner

    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    if mine.decode:
        result, text = planner.decoding(cfg, mine.topology, *mine.decode, mine.memory, say)
    else:
        stage = 1 if mine.stage is None else mine.stage
        result, text = planner.plan(cfg, mine.topology, mine.all, mine.documents, mine.memory, say, stage)
    print(text)
    if mine.json:
        print(json.dumps(result, allow_nan=False))
    return 0 if all(b["fits"] for b in result.get("buckets", [result.get("decode")])) else 1


if __name__ == "__main__":
    config.main(run)
