"""The step that writes one more token, compiled for chips that are not here: what a decoder serves rows with."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mmjax.core import hlo, meshes
from mmjax.core import spec as specs
from mmjax.core.errors import InputError
from mmjax.core.meshes import Rules, parts_of
from mmjax.models import decoder, flops
from mmjax.nn import block
from mmjax.nn import cache as caches
from mmjax.nn.cache import KVCache
from mmjax.plan import chips, roofline
from mmjax.plan.chips import Topology
from mmjax.plan.program import Program, TooLarge, attempted, local_bytes
from mmjax.sequence.batch import Bucket
from mmjax.train.config import Config
from mmjax.train.step import cast

TOKENS = 64  # written by one program, as generate does: what it does once, as laying out the cache, is shared by all


def write(
    params: dict, cache: KVCache, tokens: Int[Array, "b 1"], order: Int[Array, "b 1"], *, cfg: decoder.Config
) -> tuple[Int[Array, "b 1"], KVCache]:
    """The likeliest TOKENS more of every row, one after the other, and the cache with them in it."""

    def step(i: jax.Array, carry: tuple) -> tuple:
        tokens, cache = carry
        at = order + i
        see = {"order": at, "lo": jnp.zeros_like(at), "hi": at, "position": jnp.repeat(at[..., None], 3, axis=-1)}
        x, cache = decoder.cached(params, decoder.embed(params, tokens, cfg), cfg, cache, **see)
        return jnp.argmax(decoder.logits(params, x, cfg), -1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, TOKENS, step, (tokens, cache))


def abstract(cfg: Config, rows: int, places: int, mesh: jax.sharding.Mesh) -> tuple[dict, KVCache]:
    """Parameters of the decoder, in the type that the run computes in, and a cache, as they lie on the mesh.

    Every block by itself, as generate.engine has them: of stacked ones TPUs would keep a second cache in the loop.

    Raises:
      InputError: the decoder looks at media beside the sequence, or at what an encoder makes.
    """
    of, rules = cfg.model.decoder, Rules()
    if of.answers or of.cross is not None:
        raise InputError("Decoding with cross-attention is not planned; leave --decode out.")
    spec = decoder.spec(of) | {"blocks": tuple(block.spec(of.blocks) for _ in range(of.blocks.layers))}
    shapes = jax.eval_shape(functools.partial(cast, compute=cfg.update.compute), specs.abstract(spec))
    cache = jax.eval_shape(lambda: decoder.empty_cache(of, rows, places, cfg.update.compute, stacked=False))

    def placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def lies(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = {4: caches.AXES, 2: ("batch", None), 0: ()}[len(x.shape)]
        return placed(x, meshes.named(mesh, axes, rules, x.shape))

    return jax.tree.map(placed, shapes, specs.shardings(spec, mesh, rules)), jax.tree.map(lies, cache)


def compiled(cfg: Config, rows: int, places: int, mesh: jax.sharding.Mesh) -> Program | TooLarge:
    """Compiles the step of so many rows and places in the cache.

    Raises:
      InputError: as of `abstract`; rows that the devices cannot share.
    """
    of = cfg.model.decoder
    if rows % (parts := parts_of("batch", mesh, Rules())):
        raise InputError(
            f"--decode is {rows} rows, which {parts} devices of the data and fsdp axes cannot share evenly; give a "
            f"multiple of {parts}."
        )
    params, cache = abstract(cfg, rows, places, mesh)
    lies = meshes.named(mesh, ("batch", None), Rules(), (rows, 1))
    given = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=lies)

    def make() -> jax.stages.Compiled:
        results = (lies, jax.tree.map(lambda x: x.sharding, cache))
        run = jax.jit(functools.partial(write, cfg=of), donate_argnums=1, out_shardings=results)
        with jax.set_mesh(mesh), meshes.use_rules(Rules()):
            return run.lower(params, cache, given, given).compile()

    return attempted(make, Bucket(rows, 1, 0, 0))


@dataclass(frozen=True)
class Held:
    """Bytes on each chip, and how many parameters there are."""

    parameters: float
    cache: float
    count: int


def held(cfg: Config, rows: int, places: int, mesh: jax.sharding.Mesh) -> Held:
    """What each chip holds of parameters and cache."""
    params, cache = abstract(cfg, rows, places, mesh)
    return Held(local_bytes(params), local_bytes(cache), sum(math.prod(x.shape) for x in jax.tree.leaves(params)))


def model_flops(cfg: Config, places: int) -> float:
    """FLOPs of one token of one row that sees `places` tokens."""
    blocks = cfg.model.decoder.blocks
    matrices = sum(n for name, n in flops.matrices(cfg.model).items() if name.startswith("decoder/"))
    near = len(blocks.windowed)
    seen = (blocks.layers - near) * places + near * min(places, cfg.model.decoder.window or places)
    return 2.0 * matrices + 4.0 * blocks.heads * blocks.head * seen


def figures(cfg: Config, made: Program, places: int, topology: Topology, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What the step of one token takes, as numbers of each chip."""
    counted = hlo.count(hlo.parse(made.text))
    time = roofline.estimate(counted, topology, chips.coordinates(topology, list(mesh.devices.flat)))
    rows = made.bucket.rows
    work = model_flops(cfg, places) * rows / mesh.size
    return {
        "rows": rows,
        "places": places,
        "fits": True,
        "memory": made.memory.total,
        "temporaries": made.memory.temporaries,
        "compile_seconds": round(made.seconds, 1),
        "flops": counted.flops / TOKENS,
        "model_flops": work,
        "bytes": counted.bytes / TOKENS,
        "collectives": {
            kind: {name: n / TOKENS for name, n in of.items()} for kind, of in counted.collectives().items()
        },
        "seconds": time.step / TOKENS,
        "products": time.products / TOKENS,
        "read": time.memory / TOKENS,
        "sent": (time.beside + time.alone) / TOKENS,
        "tokens_per_second": rows * TOKENS / time.step,
        "unknown": [u.name for u in counted.unknown],
    }
