"""The train step: one pure function, compiled ahead of time for every bucket."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mmjax.core import sharding
from mmjax.core.sharding import Rules
from mmjax.models import decoder, vlm
from mmjax.objectives import next_token
from mmjax.sequence import batch as batches
from mmjax.sequence import invariants
from mmjax.sequence.batch import Batch
from mmjax.sequence.layout import EMPTY
from mmjax.train.config import Objective
from mmjax.train.state import TrainState, shardings

PLAIN = Objective()


def loss_fn(
    params: dict, batch: Batch, cfg: vlm.Config, objective: Objective = PLAIN
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean next-token loss over the trained tokens, with z-loss if asked for, and its parts as sums, to add up."""
    hidden = vlm.hidden(params, batch, cfg)
    head = functools.partial(decoder.logits, params["decoder"], cfg=cfg.decoder)
    found = next_token.loss(head, hidden, batch.target, batch.weight, chunk=objective.chunk)
    total = found.loss + objective.z * found.z(batch.weight) if objective.z else found.loss
    sums = {"loss": found.loss, "weight": found.weight, "correct": found.correct}
    return total / jnp.maximum(found.weight, 1.0), sums


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    cfg: vlm.Config,
    tx: optax.GradientTransformation,
    objective: Objective = PLAIN,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Returns the new state and metrics: `loss`, `weight`, `correct` (sums over trained tokens), `tokens` (not padding),
    `grad_norm`, and `violations` i32[B, kinds], which must be zeros (see sequence.invariants). Where it is not, the
    update is left out: a broken batch never spoils parameters.
    """
    violations = invariants.violations(batch, cfg.decoder.vocab, cfg.placeholder, vlm.present(batch, cfg))
    (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, cfg, objective)
    updates, moments = tx.update(grads, state.optimizer, state.params)
    new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments)
    sound = violations.sum() == 0
    new = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, state)
    return new, {
        **sums,
        "tokens": (batch.modality != EMPTY).sum(),
        "grad_norm": optax.tree.norm(grads),
        "violations": violations,
    }


def batch_shardings(batch: Batch, mesh: Mesh, rules: Rules) -> Batch:
    """Where every field lies on a mesh."""
    return jax.tree.map(lambda x, axes: sharding.named(mesh, axes, rules, x.shape), batch, batches.axes(batch))


def compile_step(
    state: TrainState,
    batch: Batch,
    cfg: vlm.Config,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules,
    objective: Objective = PLAIN,
) -> jax.stages.Compiled:
    """The compiled step for one bucket. `state` and `batch` are abstract; the state's buffers are reused (donated)."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        return train_step(state, batch, cfg=cfg, tx=tx, objective=objective)

    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, batch_shardings(batch, mesh, rules)
    )
    with jax.set_mesh(mesh), sharding.use_rules(rules):
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), None)).lower(state, placed).compile()
