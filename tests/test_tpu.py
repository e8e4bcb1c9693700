"""Programs compile for TPUs with the real TPU compiler, on a machine that has none."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[1]

COMPILE = """
import json, sys
import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
import numpy as np
from mmjax.core import config
from mmjax.core.meshes import MESH_AXES, Rules
from mmjax.models import vlm
from mmjax.sequence import batch as batches
from mmjax.train import loop, state
from mmjax.train.step import compile_step

name, extra, shape, explicit = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4] == "explicit"
devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices
kind = AxisType.Explicit if explicit else AxisType.Auto
mesh = Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(kind,) * 4)
cfg = config.load("quickstart")
tx = state.optimizer(cfg.optimizer, cfg.steps)
abstract = state.abstract(vlm.spec(cfg.model), tx, mesh, Rules())
data = loop.prepare_data(config.load("quickstart"))
source = data.training
for bucket in source.plan.buckets:
    batch = batches.abstract(bucket, source.values, source.vocab)
    memory = compile_step(abstract, batch, cfg.model, tx, mesh, Rules()).memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    print(json.dumps({"bucket": bucket.row, "bytes": total - memory.alias_size_in_bytes}))
"""


@pytest.mark.parametrize(
    ("topology", "extra", "shape", "mode"),
    [
        ("v5e:1x1", {"chips_per_host_bounds": [1, 1, 1]}, [1, 1, 1, 1], "auto"),
        ("v5e:2x2", {}, [2, 2, 1, 1], "auto"),
        ("v5e:2x2", {}, [1, 2, 1, 2], "explicit"),
        ("v5e:2x2", {}, [1, 2, 2, 1], "auto"),
    ],
)
def test_the_quick_start_compiles_for_v5e(topology, extra, shape, mode):
    rows = compiled(COMPILE, topology, json.dumps(extra), json.dumps(shape), mode)
    for row in rows:
        assert row["bytes"] < 16 * 2**30, row  # one v5e chip's memory


def compiled(program: str, *arguments: str) -> list[dict]:
    """The JSON lines that a program prints, run where the TPU compiler can be loaded."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the tpu extra")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_OPTIMIZATION_LEVEL": "O1",
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows
    print(rows)
    return rows


ATTENTION = """
import json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
from mmjax.nn.attention import attend

length = int(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1]).devices
here = NamedSharding(Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,)), PartitionSpec())
of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
q, k = (of((1, length, heads, 128), jnp.bfloat16) for heads in (8, 2))
label = of((1, length), jnp.int32)
loss = lambda q, k, v, *see: attend(q, k, v, *see)[0].astype(jnp.float32).sum()
program = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, k, label, label, label).compile()
sizes = [[int(n) for n in s.split(",")] for s in re.findall(r"[a-z]+[0-9]+\\[([0-9,]+)\\]", program.as_text())]
square = any(sum(n >= length for n in s) > 1 for s in sizes)
memory = program.memory_analysis()
print(json.dumps({"length": length, "temporaries": memory.temp_size_in_bytes, "square": square, "shapes": len(sizes)}))
"""


def test_attention_compiles_for_v5e_in_linear_memory():
    """Forwards and backwards, 8 heads of 128 on 2 key heads, bfloat16: no array has two axes as long as the row."""
    short, long = (compiled(ATTENTION, str(length))[0] for length in (4096, 32_768))
    for row in (short, long):
        assert row["shapes"] > 100
        assert not row["square"], row
    assert long["temporaries"] < 10 * short["temporaries"]  # 8 is linear
    assert long["temporaries"] < 2**30


RING = """
import json, re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
from mmjax.core.meshes import MESH_AXES
from mmjax.nn.attention import attend

length, heads, size = 2**20, (8, 2), 128
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = Mesh(np.array(devices).reshape(1, 1, 8, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
split = NamedSharding(mesh, PartitionSpec(None, "sequence"))
of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=split)
q, k = (of((1, length, n, size), jnp.bfloat16) for n in heads)
label = of((1, length), jnp.int32)
loss = lambda q, k, v, *see: attend(q, k, v, *see)[0].astype(jnp.float32).sum()
with jax.set_mesh(mesh):
    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, k, label, label, label).compile()
text = program.as_text()
shapes = [[int(n) for n in s.split(",")] for s in re.findall(r"[a-z]+[0-9]+\\[([0-9,]+)\\]", text)]
names = "all-gather", "all-reduce", "collective-permute"
sizes = lambda line: [int(np.prod([int(n) for n in s.split(",")])) for s in re.findall(r"\\[([0-9,]+)\\]", line)]
moved = {name: [max(sizes(line), default=1) for line in text.splitlines() if f" {name}" in line] for name in names}
print(json.dumps({"largest": max(int(np.prod(s)) for s in shapes), "moved": moved}))
"""


def test_long_rows_go_round_the_chips():
    """A row of 1,048,576 on eight chips, forwards and backwards: a chip never holds the keys of all."""
    row = compiled(RING)[0]
    length, part = 2**20, 2**17
    assert row["largest"] == part * 8 * 128  # its own queries; all keys would be twice that
    assert max(row["moved"]["all-gather"] + row["moved"]["all-reduce"]) == length  # the labels
    assert max(row["moved"]["collective-permute"]) == part * 8 * 128 // 2


RESIZE = """
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from mmjax.data.device import _cells

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1]).devices
of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices[0]))
pair = of((2,), jnp.int32)
for first in (False, True):
    static = {"size": (72, 72), "patch": 14, "filter": "bicubic", "rows_first": first}
    program = _cells.lower(of((4096, 4096, 3), jnp.uint8), pair, pair, pair, **static).compile()
    memory = program.memory_analysis()
    print(json.dumps({"temporaries": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes}))
"""


def test_resizing_compiles_for_v5e_without_a_copy_of_the_picture():
    """A canvas of 16 megapixels, 50 MB of bytes: as floats it would be 200 MB."""
    for row in compiled(RESIZE):
        assert row["arguments"] < 51 * 2**20
        assert row["temporaries"] < 100 * 2**20, row


PUBLISHED = """
import sys
from tests.benchmarks import published

published.main(sys.argv[1:])
"""


def test_published_modules_compile_for_v5e():
    """Two at their published sizes; `python -m tests.benchmarks.published` is all of them."""
    names = ["encoder swin-t", "connector honeybee-c-7b"]
    figures = compiled(PUBLISHED, *names)[-1]["figures"]
    assert set(figures) == set(names)
    for name, of in figures.items():
        assert of.get("bytes", math.inf) < 15.75 * 2**30, (name, of)


GENERATE = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
import numpy as np
from mmjax.core import spec as specs
from mmjax.core.meshes import MESH_AXES, Rules, named
from mmjax.generate import engine, sample
from mmjax.models import decoder
from mmjax.nn import block, rope, transformer

tensor = int(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:tensor]
mesh = Mesh(np.array(devices).reshape(1, 1, 1, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
blocks = transformer.Config(1024, 4, 16, 8, 128, 4096, rope=rope.Config(128, (64,)))
cfg = decoder.Config(32_000, blocks)
rows, length, places = 8, 512, 4096
spec = decoder.spec(cfg) | {"blocks": (block.spec(blocks),) * blocks.layers}
params = specs.abstract(decoder.spec(cfg))

def here(x, axes=None):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named(mesh, axes or (None,) * len(x.shape), Rules()))

params = jax.eval_shape(lambda p: engine.unstacked(p, cfg), params)
state = jax.eval_shape(lambda: engine.empty(cfg, rows, places, jnp.bfloat16, stacked=False))
state = jax.tree.map(lambda x: here(x, ("batch", "heads", None, None) if x.ndim == 4 else None), state)
placed = specs.shardings(spec, mesh, Rules())
params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=s), params, placed)
_, values = sample.prepare([sample.GREEDY] * rows)
switches = sample.Switches(draw=True, top_k=True, top_p=True, penalty=True)
words = np.zeros((rows, length), np.int32)
batch = engine.text_batch(words, words, words, np.zeros((rows, length, 3), np.int32))
batch, values, ends, n = jax.tree.map(here, (batch, values, np.zeros(1, np.int32), np.zeros((), np.int32)))
cache = 2 * 2 * sum(x.size for x in state.cache.k)
with jax.set_mesh(mesh):
    prefill = engine.run_prefill.lower(params, batch, cfg=cfg, state=state)
    decode = engine.run_decode.lower(params, state, n, ends, values, cfg=cfg, switches=switches)
    for lowered in (prefill, decode):
        memory = lowered.compile().memory_analysis()
        names = ("temp", "alias", "argument")
        print(json.dumps({"cache": cache // tensor} | {k: getattr(memory, f"{k}_size_in_bytes") for k in names}))
"""


@pytest.mark.parametrize("tensor", [1, 4])
def test_generation_compiles_for_v5e(tensor):
    """A prompt and the loop, bfloat16, over all devices' heads: both write into the one cache they are given."""
    for row in compiled(GENERATE, str(tensor)):
        assert row["alias"] > row["cache"], row
        assert row["temp"] < 0.5 * row["cache"], row
