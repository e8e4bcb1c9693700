"""What is in a dataset, as a table: from its index alone."""

from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import Int

from mmjax.data.formats import Dataset

SHOWN = 20  # places and reasons that are listed
SHARES = (0, 0.05, 0.5, 0.95, 1)


def table(data: Dataset, path: str | Path) -> str:
    """Documents, pictures, their distribution, and what was left out."""
    index = data.entries
    there = index.sizes[(index.sizes > 0).all(1)]
    counts = np.diff(index.first)
    lines = [
        f"{path}  ({data.schema}, fingerprint {data.fingerprint})",
        f"{'documents':<26}{len(data):>12,}",
        f"{'pictures':<26}{len(there):>12,}",
        f"{'pictures not there':<26}{len(index.sizes) - len(there):>12,}",
        f"{'places left out':<26}{len(data.left_out):>12,}",
        "",
        f"{'of each':<26}" + "".join(f"{name:>12}" for name in ("least", "5 %", "half", "95 %", "most")),
        _row("document: characters", index.characters),
        _row("document: pictures", counts),
        _row("picture: width", there[:, 1]),
        _row("picture: height", there[:, 0]),
        _row("picture: pixels", there.astype(np.int64).prod(1)),
    ]
    if data.left_out:
        lines += ["", "left out:", *(f"  {bad}" for bad in data.left_out[:SHOWN])]
    if len(data.left_out) > SHOWN:
        shards = Counter(bad.place.split(", ")[0] for bad in data.left_out[SHOWN:])
        lines += [f"  {count:,} more in {name}" for name, count in shards.most_common(SHOWN)]
    return "\n".join(lines)


def _row(name: str, values: Int[np.ndarray, "n"]) -> str:
    if not len(values):
        return f"{name:<26}" + f"{'-':>12}" * len(SHARES)
    found = np.quantile(values, SHARES, method="nearest")
    return f"{name:<26}" + "".join(f"{int(v):>12,}" for v in found)
