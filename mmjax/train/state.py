"""Train state: parameters and optimizer state, abstract, sharded and concrete, from specs alone."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.core import spec as specs
from mmjax.core.sharding import Rules
from mmjax.core.spec import Spec
from mmjax.train.config import Optimizer


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on."""

    step: Any  # i32[]; how many steps are done
    params: Any  # as the model's spec
    optimizer: Any  # optax's state


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
    return state.params if mean is None else mean


def _matrices(params: dict) -> dict:
    """Which leaves decay: kernels and tables, not scales and biases (which layers stack to two dimensions)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def create(spec: Spec, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step."""
    params = specs.init(spec, key)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def create_sharded(spec: Spec, tx: optax.GradientTransformation, shape: TrainState, key: jax.Array) -> TrainState:
    """The same, each part made where `shape`, the abstract state, says it lies."""
    # It runs once: on a CPU, optimising it takes thirty times as long as running it unoptimised.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    make = jax.jit(lambda k: create(spec, tx, k), out_shardings=shardings(shape), compiler_options=options)
    return make(key)


def abstract(spec: Spec, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it: optimizer moments lie as their parameters do."""
    whole = NamedSharding(mesh, P())
    params = specs.abstract(spec, mesh, rules)
    moments = optax.tree_map_params(
        tx,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    )
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), params, moments)


def shardings(state: TrainState) -> TrainState:
    """The shardings of an abstract state."""
    return jax.tree.map(lambda x: x.sharding, state)
