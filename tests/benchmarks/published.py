"""Every published encoder and connector, by shapes alone: `python -m tests.benchmarks.published [NAME …]`.

How long `eval_shape` takes, and whether forward and backward compile with the real TPU compiler (`.[tpu]`; no TPU is
needed) and fit four v5e chips: float32 parameters split over them (fsdp 4), a row of 4,096 patches on each chip, every
block recomputed. The last line is JSON.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ.setdefault("JAX_OPTIMIZATION_LEVEL", "O1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import published
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from mmjax.core import spec
from mmjax.core.meshes import MESH_AXES, Rules, named

CHIP = 15.75 * 2**30  # of a v5e's 16 GiB, what a program may use


def compiled(name: str) -> dict:
    """Seconds, and bytes of each chip's memory, of a forward and backward pass."""
    of, cfg, call, arguments, keywords = published.case(name, remat=True)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices).reshape(1, 4, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = ("batch",) + (None,) * (x.ndim - 1)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named(mesh, axes, Rules(), x.shape))

    def loss(params, arguments, keywords):
        out = jax.checkpoint(call)(params, *arguments, **keywords)
        return sum(jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(out))

    start = time.perf_counter()
    with jax.set_mesh(mesh):
        inputs = jax.tree.map(placed, (arguments, keywords))
        program = jax.jit(jax.grad(loss)).lower(spec.abstract(of.spec(cfg), mesh, Rules()), *inputs).compile()
    memory = program.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {"seconds": time.perf_counter() - start, "bytes": total - memory.alias_size_in_bytes}


def main(names: list[str]) -> None:
    names = names or list(published.ALL)
    published.shapes(names[0])  # what the first call of all costs is nobody's
    figures, wide = {}, max(map(len, names))
    print(f"{'':{wide}}   parameters  eval_shape  compiled in  a chip's memory")
    for name in names:
        start = time.perf_counter()
        published.shapes(name)
        seconds = time.perf_counter() - start
        of, cfg, *_ = published.case(name)
        try:
            figures[name] = {"eval_shape": seconds, "parameters": spec.count(of.spec(cfg))} | compiled(name)
        except Exception as error:  # a table of all is wanted, whatever one of them does
            figures[name] = {"eval_shape": seconds, "error": str(error)[:500]}
            print(f"{name:{wide}} {error!s:.200}", flush=True)
            continue
        f = figures[name]
        size = f"{f['parameters']:>13,}  {seconds:8.2f} s"
        print(f"{name:{wide}} {size}  {f['seconds']:9.1f} s  {f['bytes'] / 2**30:10.2f} GiB", flush=True)
    fits = sum(f.get("bytes", np.inf) < CHIP for f in figures.values())
    aims = [
        {"name": "slowest eval_shape, s", "measured": max(f["eval_shape"] for f in figures.values()), "at_most": 1.0},
        {"name": "compile for v5e and fit", "measured": fits, "at_least": len(names)},
    ]
    print(json.dumps({"figures": figures, "aims": aims}))


if __name__ == "__main__":
    main(sys.argv[1:])
