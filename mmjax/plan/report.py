"""A plan in words and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

import jax

from mmjax.core import hlo
from mmjax.core.meshes import Rules, parts_of
from mmjax.models import flops
from mmjax.models.flops import Flops, Row
from mmjax.plan import attention, chips, roofline
from mmjax.plan.advice import Advice, axes
from mmjax.plan.chips import GIB, Topology
from mmjax.plan.decode import Held
from mmjax.plan.program import Program, State, TooLarge
from mmjax.plan.roofline import Estimate
from mmjax.plan.tips import tips
from mmjax.sequence.batch import Bucket
from mmjax.train.config import Config


@dataclass(frozen=True)
class Figures:
    """What is known of one bucket's step: of each chip, but for the model's FLOPs, which are of a row."""

    bucket: Bucket
    program: Program
    row: Row
    model: Flops
    counted: hlo.Count
    time: Estimate
    mfu: float
    mfu_by_cycles: float | None  # with the compiler's own estimates of operations
    tips: list[str]


def figures(cfg: Config, program: Program, topology: Topology, mesh: jax.sharding.Mesh, document: int) -> Figures:
    """Counts a compiled step; `document`: tokens of each document (0: a row is one)."""
    bucket = program.bucket
    row = flops.full_row(bucket, cfg.sequence, document)
    model = flops.of_row(cfg.model, row, cfg.sequence.see, cfg.update.frozen, cfg.lora)
    media = flops.media_tokens(cfg.model, row) if cfg.model.sees else 0
    rows = max(bucket.rows // parts_of("batch", mesh, Rules()) // cfg.update.accumulate, 1)
    heads, length = (parts_of(axis, mesh, Rules()) for axis in ("heads", "length"))
    hints = attention.hints(cfg.model, row, cfg.sequence, media, rows, heads, cfg.update.compute, length)
    counted = hlo.count(hlo.parse(program.text), hints)
    time = roofline.estimate(counted, topology, chips.coordinates(topology, list(mesh.devices.flat)))
    best = model.total * bucket.rows / mesh.size / topology.chip.flops
    by_cycles = best / time.cycles if time.cycles else None
    return Figures(bucket, program, row, model, counted, time, best / time.step, by_cycles, tips(cfg, counted, mesh))


def decode_as_json(
    topology: Topology, mesh: jax.sharding.Mesh, held: Held, limit: float, found: dict[str, Any]
) -> dict[str, Any]:
    """The step that writes a token, as numbers."""
    return {
        "topology": topology.text,
        "chip": asdict(topology.chip),
        "chips": mesh.size,
        "mesh": axes(mesh),
        "memory_limit": limit,
        "parameters": held.count,
        "parameter_bytes": held.parameters,
        "cache_bytes": held.cache,
        "decode": found,
    }


def decode_words(topology: Topology, mesh: jax.sharding.Mesh, held: Held, limit: float, found: dict[str, Any]) -> str:
    """The same in words."""
    sizes, rows = " × ".join(f"{name} {n}" for name, n in axes(mesh).items()), found["rows"]
    out = [
        f"{topology.text}: {mesh.size} × {topology.chip.name}, mesh {sizes}",
        f"each chip holds {_gib(held.parameters)} of the decoder's {held.count:,} parameters and "
        f"{_gib(held.cache)} of the cache of {rows} rows × {found['places']:,} tokens; it has {_gib(limit)}",
    ]
    if not found["fits"]:
        needs = f"it needs {_gib(found['needed'])} of {_gib(found['available'] or limit)}" if found["needed"] else ""
        return "\n".join([*out, f"the next token of {rows} rows: DOES NOT FIT, {needs or 'memory runs out'}"])
    chip = topology.chip
    out += [
        f"the next token of {rows} rows: compiled in {found['compile_seconds']:.0f} s; {_gib(found['memory'])} in all, "
        f"of them {_gib(found['temporaries'])} temporaries: fits",
        f"  products   {_tera(found['flops'])} FLOP / {_tera(chip.flops)} per second = {_ms(found['products'])}",
        f"  memory     {found['bytes'] / 1e9:,.2f} GB / {chip.bandwidth / 1e9:,.0f} GB per second = "
        f"{_ms(found['read'])}",
    ]
    for kind, of in found["collectives"].items():
        out.append(f"  {kind:<19}{of['count']:>7,.0f} times {of['bytes'] / 1e9:>9,.3f} GB sent")
    out.append(
        f"step: {_ms(found['seconds'])} estimated ({_ms(found['sent'])} of collectives); "
        f"{found['tokens_per_second']:,.0f} tokens per second of all rows"
    )
    if axes(mesh)["fsdp"] > 1:
        out.append(
            "faster: every step gathers parameters that fsdp splits; split them over heads and vocabulary instead "
            "(--mesh.fsdp 1 --mesh.tensor N)"
        )
    return "\n".join([*out, *(f"not known: {name}" for name in found["unknown"])])


def as_json(
    cfg: Config, topology: Topology, mesh: jax.sharding.Mesh, state: State, limit: float, found: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything, as numbers."""
    return {
        "topology": topology.text,
        "chip": asdict(topology.chip),
        "chips": mesh.size,
        "mesh": axes(mesh),
        "memory_limit": limit,
        "parameters": state.count,
        "trained": state.trained,
        "parameter_bytes": state.parameters,
        "optimizer_bytes": state.optimizer,
        "buckets": found,
    }


def of_figures(f: Figures, count: int) -> dict[str, Any]:
    """A bucket's step as numbers."""
    b, t = f.bucket, f.time
    return {
        "bucket": asdict(b),
        "fits": True,
        "memory": asdict(f.program.memory) | {"total": f.program.memory.total},
        "compile_seconds": round(f.program.seconds, 1),
        "documents": list(f.row.documents),
        "model_flops_per_chip": f.model.total * b.rows / count,
        "flops": f.counted.flops,
        "bytes": f.counted.bytes,
        "collectives": f.counted.collectives(),
        "seconds": asdict(t) | {"serial": t.serial},
        "mfu": f.mfu,
        "mfu_by_cycles": f.mfu_by_cycles,
        "tokens_per_second": b.rows * b.tokens / t.step,
        "unknown": [asdict(u) for u in f.counted.unknown],
        "tips": f.tips,
    }


def refused(bucket: Bucket, what: TooLarge, advice: Advice | None) -> dict[str, Any]:
    """A bucket that does not fit, as numbers."""
    out = {"bucket": asdict(bucket), "fits": False, "needed": what.needed, "available": what.available}
    return out | {"advice": None if advice is None else advice.flags}


def table(buckets: tuple[Bucket, ...]) -> str:
    lines = [f"{'bucket':<8}{'rows':>7}{'tokens':>9}{'patches':>9}{'images':>8}{'tokens of a step':>19}"]
    for n, b in enumerate(buckets):
        lines.append(f"{n:<8}{b.rows:>7}{b.tokens:>9}{b.patches:>9}{b.images:>8}{b.rows * b.tokens:>19,}")
    return "\n".join(lines)


def head(topology: Topology, mesh: jax.sharding.Mesh, state: State, limit: float) -> str:
    sizes = " × ".join(f"{name} {n}" for name, n in axes(mesh).items())
    half = topology.kind == "v4" and limit == topology.chip.memory
    return (
        f"{topology.text}: {mesh.size} × {topology.chip.name}, mesh {sizes}\n"
        f"each chip holds {_gib(state.parameters)} of {state.count:,} parameters and {_gib(state.optimizer)} of the "
        f"optimizer's state of {state.trained:,} that are trained; it has {_gib(limit)}"
        + (", one core's half of a v4's 32 GiB: its compiler alone knows no more" if half else "")
    )


def words(f: Figures, topology: Topology, count: int, limit: float) -> str:
    """A bucket's step, with the arithmetic."""
    m, t, chip, b = f.program.memory, f.time, topology.chip, f.bucket
    peak = "" if m.peak is None else f", at most {_gib(m.peak)} at one time"
    work = f.model.total * b.rows / count
    out = [
        f"{b.rows} rows × {b.tokens} tokens, {b.patches} patches, {b.images} images: compiled in "
        f"{f.program.seconds:.0f} s",
        f"memory of a chip, as the compiler states it: arguments {_gib(m.arguments)}, outputs {_gib(m.outputs)} (of "
        f"them {_gib(m.aliased)} in place), temporaries {_gib(m.temporaries)}, program {_gib(m.code)}{peak}",
        f"  {_gib(m.total)} in all: fits {_gib(limit)}",
        "a step on each chip:",
        f"  products   {_tera(f.counted.flops)} FLOP / {_tera(chip.flops)} per second = {_ms(t.products)}",
        f"  memory     {f.counted.bytes / 1e9:,.1f} GB / {chip.bandwidth / 1e9:,.0f} GB per second = {_ms(t.memory)}",
        f"  each operation at the slower of both: {_ms(t.operations)} ("
        + ", ".join(f"{name} {_ms(s)}" for name, s in t.parts.items() if s > 5e-4 * t.operations)
        + ")",
    ]
    for kind, of in f.counted.collectives().items():
        out.append(f"  {kind:<19}{of['count']:>7,.0f} times {of['bytes'] / 1e9:>9,.2f} GB sent")
    out += [
        f"  collectives over their links ({chip.link / 1e9:.0f} GB per second one way"
        + (f", {chip.network / 1e9:.0f} between nodes of {chips.NODE}" if chip.network else "")
        + f"): {_ms(t.beside)} beside other work, {_ms(t.alone)} alone",
        f"step: {_ms(t.step)} estimated; {_ms(t.serial)} if nothing ran beside anything",
        f"MFU: {_tera(work)} FLOP of the model / ({_ms(t.step)} × {_tera(chip.flops)} per second) = {f.mfu:.3f}"
        f"   ({b.rows * b.tokens / t.step:,.0f} tokens per second)"
        + (f"; {f.mfu_by_cycles:.3f} by the compiler's own cycles, {_ms(t.cycles)}" if f.mfu_by_cycles else ""),
        f"taken for granted: rows are full; documents of {_sizes(f.row.documents)} tokens, pictures of "
        f"{_sizes(f.row.pictures)} patches; peak rates are reached; no two groups share links",
    ]
    if topology.gpu:
        out.append(
            "for GPUs XLA states memory alone: FLOPs, bytes and times are counted here, kernels were not tuned (that "
            f"takes the GPU), and JAX takes {chips.SHARE:.0%} of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more"
        )
    out += [f"not known: {u.name} ({u.what})" for u in f.counted.unknown]
    out += [f"faster: {tip}" for tip in f.tips]
    return "\n".join(out)


def refusal(bucket: Bucket, what: TooLarge, advice: Advice | None, limit: float) -> str:
    size = f"it needs {_gib(what.needed)} of {_gib(what.available or limit)}" if what.needed else "memory runs out"
    out = [f"{bucket.rows} rows × {bucket.tokens} tokens, {bucket.patches} patches: DOES NOT FIT, {size}"]
    if advice is None:
        out.append("nothing that was tried makes it fit; take more chips, or ones with more memory")
    else:
        out.append(
            f"this fits ({_gib(advice.program.memory.total)}), which was compiled to see; each change stands on those "
            f"before, and not all of them need be:"
        )
        out += [f"  {change}" for change in advice.standing]
        out.append(f"all together: {advice.flags}")
    return "\n".join(out)


def _sizes(of: tuple[int, ...]) -> str:
    return " and ".join(f"{n}" for n in sorted(set(of), reverse=True)) or "0"


def _gib(n: int | float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.1f} MiB"


def _tera(n: int | float) -> str:
    return f"{n / 1e12:,.1f} T" if n >= 1e11 else f"{n / 1e9:,.3g} G"


def _ms(s: int | float) -> str:
    return f"{1e3 * s:,.1f} ms" if s >= 1e-3 or not s else f"{1e6 * s:.3g} µs"
