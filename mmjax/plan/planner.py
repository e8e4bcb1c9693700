"""A plan from a config and a topology: compile, count, advise."""

from collections.abc import Callable
from typing import Any

from mmjax.core.errors import InputError
from mmjax.core.meshes import make_mesh
from mmjax.plan import advice, chips, decode, program, report
from mmjax.plan.chips import GIB, Topology
from mmjax.plan.program import Program, TooLarge
from mmjax.train import stages
from mmjax.train.config import Config
from mmjax.train.prepare import fixed_buckets


def chosen(topology: str, memory: float) -> tuple[Topology, float]:
    """The chips, and the bytes of each that may be used.

    Raises:
      InputError: there are no such chips, or not that much memory.
    """
    of = chips.topology(topology)
    if memory * GIB > of.most:
        raise InputError(
            f"--memory is {memory:g}, but {of.chip.name} has {of.most / GIB:.2f} GiB; give no more than that."
        )
    return of, memory * GIB or of.chip.memory


def decoding(
    cfg: Config,
    topology: str,
    rows: int,
    places: int,
    memory: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], str]:
    """The plan of the step that writes a token of each of `rows` rows, with a cache of `places` tokens.

    Args and errors as of `plan`.
    """
    of, limit = chosen(topology, memory)
    mesh = make_mesh(cfg.mesh, chips.devices(of))
    say(f"compiling the next token of {rows} rows, {places} places, for {topology}")
    state = decode.held(cfg, rows, places, mesh)
    made = decode.compiled(cfg, rows, places, mesh)
    if isinstance(made, Program) and made.memory.total > limit:
        made = TooLarge(float(made.memory.total), limit)
    if isinstance(made, TooLarge):
        found = {"rows": rows, "places": places, "fits": False, "needed": made.needed, "available": made.available}
    else:
        found = decode.figures(cfg, made, places, of, mesh)
    return report.decode_as_json(of, mesh, state, limit, found), report.decode_words(of, mesh, state, limit, found)


def plan(
    cfg: Config,
    topology: str,
    every: bool = False,
    document: int = 0,
    memory: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
    stage: int = 1,
) -> tuple[dict[str, Any], str]:
    """The plan as numbers and in words.

    Args:
      cfg: the run.
      topology: the chips (plan.chips.topology).
      every: all buckets; else the largest.
      document: tokens of each document in a row; 0: a row is one document.
      memory: GiB of a chip that the step may use; 0: all that the compiler allows.
      say: is told what is being compiled.
      stage: which of the run's, counted from 1.

    Raises:
      InputError: for everything the user can mend.
    """
    of, limit = chosen(topology, memory)
    part = stages.numbered(cfg, stage)
    found = program.buckets(cfg)
    devices = chips.devices(of)
    mesh = make_mesh(cfg.mesh, devices)
    state = program.state_bytes(part, mesh)

    def attempt(cfg: Config, bucket=None) -> Program | TooLarge:
        # No advice changes what buckets documents ask for, which takes reading them.
        bucket = bucket or (program.buckets(cfg) if fixed_buckets(cfg) else found)[-1]
        made = program.compiled(stages.numbered(cfg, stage), bucket, make_mesh(cfg.mesh, devices))
        if isinstance(made, Program) and made.memory.total > limit:
            return TooLarge(float(made.memory.total), limit)
        return made

    numbers, text = [], [report.table(found), report.head(of, mesh, state, limit)]
    for bucket in reversed(found) if every else found[-1:]:
        say(f"compiling {bucket.rows} rows × {bucket.tokens} tokens, {bucket.patches} patches for {topology}")
        made = attempt(cfg, bucket)
        if isinstance(made, Program):
            of_bucket = report.figures(part.cfg, made, of, mesh, document)
            numbers.append(report.of_figures(of_bucket, mesh.size))
            text.append(report.words(of_bucket, of, mesh.size, limit))
            continue
        # What the largest bucket needs is enough for the others.
        held = state.parameters + state.optimizer
        tip = None
        if bucket == found[-1]:
            tip = advice.find(cfg, advice.axes(mesh), held, limit, attempt, say, advice.reached(part))
        numbers.append(report.refused(bucket, made, tip))
        text.append(report.refusal(bucket, made, tip, limit))
    return report.as_json(cfg, of, mesh, state, limit, numbers), "\n\n".join(text)
