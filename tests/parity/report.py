"""All comparisons with reference implementations as one table: `python -m tests.parity.report [NAME …]`.

Needs the `parity` extra. The last line is JSON: how many systems, and the worst error over its allowance.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import torch
from parity import modules
from parity.harness import SYSTEMS, Compare


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for family, why in modules.load().items():
        print(f"{family}: left out, {why}")
    worst, wide = [], max(map(len, SYSTEMS))
    print(f"{'system':{wide}}  tensors  error/allowed  worst tensor")
    for name in sorted(names or SYSTEMS):
        compare = Compare(name)
        with jax.default_matmul_precision("highest"):
            SYSTEMS[name](compare)
        tensor, ratio = compare.worst
        print(f"{name:{wide}}  {len(compare.rows):7d}  {ratio:13.3f}  {tensor}", flush=True)
        worst.append(ratio)
    aims = [{"name": "worst error over its allowance", "measured": max(worst), "at_most": 1.0}]
    print(json.dumps({"systems": len(worst), "worst_ratio": max(worst), "aims": aims}))


if __name__ == "__main__":
    main(sys.argv[1:])
