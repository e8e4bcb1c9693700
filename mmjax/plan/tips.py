"""What makes a step that fits faster, where the program shows that it is slow for a known reason."""

import jax

from mmjax.core.hlo import Count
from mmjax.plan.attention import part_of
from mmjax.plan.program import learnt
from mmjax.train.config import Config

MUCH = 0.1  # of all bytes that a chip sends


def tips(cfg: Config, counted: Count, mesh: jax.sharding.Mesh) -> list[str]:
    """Sentences; none where nothing is known."""
    sent = [(w, times * w.collective.bytes) for w, times in counted.every() if w.collective]
    whole = max(sum(n for _, n in sent), 1.0)
    out = []
    loss = sum(n for w, n in sent if part_of(w.scope) == "loss")
    # Where no two devices share the vocabulary, the loss gathers the head once for all of a row.
    turns = mesh.shape["tensor"] > 1 and cfg.objective.chunk < learnt(cfg) // mesh.shape["sequence"]
    if turns and loss > MUCH * whole:
        out.append(
            f"{loss / 1e9:,.1f} GB of what is sent are the head, gathered and its gradient summed once for every "
            f"{cfg.objective.chunk} tokens of a row: --objective.chunk {2 * cfg.objective.chunk} halves that"
        )
    summed = sum(
        n
        for w, n in sent
        if w.collective.kind == "all-reduce"
        and len(w.collective.devices) == mesh.size
        and part_of(w.scope) not in ("loss", "update")
    )
    if summed > MUCH * whole and mesh.shape["fsdp"] == mesh.size > 2 and mesh.size % 2 == 0:
        out.append(
            f"{summed / 1e9:,.1f} GB of what is sent are gradients that every chip sums whole: where fsdp takes all "
            f"chips, the compiler lets none sum its share alone; --mesh.data 2 --mesh.fsdp {mesh.size // 2} does"
        )
    return out
