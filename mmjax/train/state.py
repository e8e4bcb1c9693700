"""Train state: parameters and optimizer state, abstract, sharded and concrete, from specs alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.core import spec as specs
from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.meshes import Rules
from mmjax.core.spec import Spec
from mmjax.train.config import Optimizer


@flax.struct.dataclass
class Guard:
    """What tells a spike from a usual gradient, and how many updates were left out."""

    norm: Any  # f32[]; running mean of the gradients' norms
    kept: Any  # i32[]; updates that went in
    skipped: Any  # i32[]; updates that were left out
    in_a_row: Any  # i32[]; those of the last steps


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on."""

    step: Any  # i32[]; how many steps are done
    params: Any  # as the model's spec
    optimizer: Any  # optax's state, of the parameters that are trained
    guard: Guard


def new_guard() -> Guard:
    return Guard(jnp.zeros((), jnp.float32), *(jnp.zeros((), jnp.int32) for _ in range(3)))


def optimizer(cfg: Optimizer, steps: int) -> optax.GradientTransformation:
    """Clipping, AdamW, warm-up and cosine over `steps` steps, and the running mean of the parameters if asked for."""
    warmup = max(1, round(cfg.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, warmup, max(steps, warmup + 1), cfg.learning_rate * cfg.final
    )
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.adamw(schedule, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=_matrices),
        *([running_mean(cfg.average)] if cfg.average else []),
    )


class RunningMean(NamedTuple):
    """What `running_mean` keeps, among the optimizer's state: it is sharded, saved and resumed like the moments."""

    count: Any  # i32[]
    average: Any  # as the parameters


def running_mean(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential mean of the parameters (Polyak & Juditsky 1992); last in a chain, it changes no update.

    The first means are of few steps: the decay is at most (1 + n) / (10 + n) after n updates.
    """

    def update(updates: Any, now: RunningMean, params: Any) -> tuple[Any, RunningMean]:
        n = now.count.astype(jnp.float32)
        share = 1.0 - jnp.minimum(decay, (1.0 + n) / (10.0 + n))
        new = optax.incremental_update(optax.apply_updates(params, updates), now.average, share)
        return updates, RunningMean(now.count + 1, new)

    def init(params: Any) -> RunningMean:
        return RunningMean(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    return optax.GradientTransformation(init, update)


def averaged(state: TrainState) -> dict:
    """The parameters to evaluate: their running mean where the optimizer keeps one, else themselves."""
    mean = optax.tree.get(state.optimizer, "average")
    if mean is None:
        return state.params
    # Of frozen parameters there is none.
    return tree.unflatten(tree.flatten(state.params) | tree.flatten(mean))


def _matrices(params: dict) -> dict:
    """Which leaves decay: kernels and tables, not scales and biases (which layers stack to two dimensions)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def trained(params: dict, frozen: Sequence[str]) -> dict:
    """The parameters that are not frozen (see core.tree.choose), for which there is optimizer state.

    Raises:
      InputError: a pattern that names nothing, or all that there is.
    """
    rest = tree.choose(params, frozen)[1]
    if not rest:
        raise InputError(f"update.frozen is {frozen}, which leaves no parameter to train; leave one of them out.")
    return rest


def create(spec: Spec, tx: optax.GradientTransformation, key: jax.Array, frozen: Sequence[str] = ()) -> TrainState:
    """The state before the first step."""
    params = specs.init(spec, key)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(trained(params, frozen)), new_guard())


def create_sharded(
    spec: Spec, tx: optax.GradientTransformation, shape: TrainState, key: jax.Array, frozen: Sequence[str] = ()
) -> TrainState:
    """The same, each part made where `shape`, the abstract state, says it lies."""
    # It runs once: on a CPU, optimising it takes thirty times as long as running it unoptimised.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    make = jax.jit(lambda k: create(spec, tx, k, frozen), out_shardings=shardings(shape), compiler_options=options)
    return make(key)


def of_params(
    params: dict, tx: optax.GradientTransformation, shape: TrainState, frozen: Sequence[str] = ()
) -> TrainState:
    """The state before the first step, of parameters that are there."""
    make = jax.jit(lambda p: tx.init(trained(p, frozen)), out_shardings=shardings(shape.optimizer))
    rest = jax.device_put((jnp.zeros((), jnp.int32), new_guard()), shardings((shape.step, shape.guard)))
    return TrainState(rest[0], params, make(params), rest[1])


def abstract(
    spec: Spec, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules, frozen: Sequence[str] = ()
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it: optimizer moments lie as their parameters do."""
    whole = NamedSharding(mesh, P())
    params = specs.abstract(spec, mesh, rules)
    moving = trained(params, frozen)
    moments = optax.tree_map_params(
        tx,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        jax.eval_shape(tx.init, moving),
        moving,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    )
    guard = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(new_guard))
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), params, moments, guard)


def shardings(state: Any) -> Any:
    """The shardings of an abstract state, or of a part of one."""
    return jax.tree.map(lambda x: x.sharding, state)
