"""The train step: one pure function, compiled ahead of time for every bucket."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.connectors import module
from mmjax.core import meshes, tree
from mmjax.core.meshes import Rules
from mmjax.generate import features
from mmjax.models import vlm
from mmjax.models.tower import Media
from mmjax.nn import lora
from mmjax.objectives import next_token
from mmjax.sequence import batch as batches
from mmjax.sequence import invariants
from mmjax.sequence.batch import Batch
from mmjax.sequence.layout import EMPTY
from mmjax.train.config import Objective, Update
from mmjax.train.state import Guard, TrainState, shardings

PLAIN, AT_ONCE = Objective(), Update()
SETTLED = 20  # updates after which the mean of the gradients' norms says what is a spike


def loss_fn(
    params: dict,
    batch: Batch,
    cfg: vlm.Config,
    objective: Objective = PLAIN,
    *,
    per: jax.Array | None = None,
    media: Media | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean next-token loss over the trained tokens, with z-loss if asked for, and its parts as sums, to add up.

    `per`: what the sum is divided by, where the batch is a part of another; else the sum of its own weights.
    `media`: the batch's media tokens, where they are known.
    """
    hidden = vlm.hidden(params, batch, cfg, media=media)
    language, said = module(cfg.decoder), learnt(batch)
    head = functools.partial(language.logits, cfg=cfg.decoder)
    name = language.head(cfg.decoder)
    own = {name: params["decoder"][name]}
    with jax.named_scope("loss"):
        found = next_token.loss(head, hidden, said.target, said.weight, chunk=objective.chunk, params=own)
    total = found.loss + objective.z * found.z(said.weight) if objective.z else found.loss
    sums = {"loss": found.loss, "weight": found.weight, "correct": found.correct}
    return total / (jnp.maximum(found.weight, 1.0) if per is None else per), sums


def learnt(batch: Batch) -> Batch:
    """The stream of tokens that is learnt: of an encoder–decoder, the second."""
    return batch if batch.answer is None else batch.answer


def cast(params: dict, compute: str) -> dict:
    """Parameters as the model computes with them: in `compute`, but for the scales of norms, which stay float32.

    Done before they are gathered from other devices: half the bytes travel.
    """
    if compute == "float32":
        return params

    def one(path: tuple, p: jax.Array) -> jax.Array:
        wide = path[-1].key == "scale" or not jnp.issubdtype(p.dtype, jnp.floating)
        return p if wide else p.astype(compute)

    return jax.tree_util.tree_map_with_path(one, params)


def train_step(
    state: TrainState,
    batch: Batch,
    known: Media | None = None,
    *,
    cfg: vlm.Config,
    tx: optax.GradientTransformation,
    objective: Objective = PLAIN,
    update: Update = AT_ONCE,
    after: features.After = "connector",
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Where `update.accumulate` is A > 1, the batch's fields are [A, B, ...]: A parts, whose gradients are added.
    `known`: what the frozen tower (`after`: and connector) makes of the batch (generate.features.made), as `by_rows`
    has it, in parts like the batch.
    `dropout`: of adapters (nn.lora.dropping); what is left out follows from `seed`, the state's step, and the part.

    Returns the new state and metrics: `loss`, `weight`, `correct` (sums over trained tokens), `tokens` (not padding),
    `grad_norm`, `skipped` (1 where the update was left out: see train.config.Update), `in_a_row` (how many were by now)
    and `violations` i32[(A,) B, kinds], which must be zeros (see sequence.invariants). Where they are not, nothing
    changes: a broken batch never spoils parameters.
    """
    fixed, trained = tree.choose(state.params, update.frozen)
    per = jnp.maximum(learnt(batch).weight.sum(), 1.0)
    how = {"cfg": cfg, "objective": objective, "compute": update.compute, "after": after, "dropout": dropout}
    part = functools.partial(_part, fixed=fixed, per=per, **how)
    keys = (
        jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), update.accumulate) if dropout else None
    )
    pieces = (batch, known, keys)
    if update.accumulate == 1:
        (grads, sums), violations = part(trained, (batch, known, keys if keys is None else keys[0]))
    else:
        shape = jax.eval_shape(part, trained, jax.tree.map(lambda x: x[0], pieces))[0][1]
        start = jax.tree.map(jnp.zeros_like, trained), jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)

        def add(so_far: Any, piece: tuple) -> tuple[Any, jax.Array]:
            found, violations = part(trained, piece)
            return jax.tree.map(jnp.add, so_far, found), violations

        (grads, sums), violations = jax.lax.scan(add, start, pieces)
    norm = optax.tree.norm(grads)
    sound = violations.sum() == 0
    usable = jnp.isfinite(norm) & jnp.isfinite(sums["loss"]) & ~_spike(norm, state.guard, update)
    with jax.named_scope("update"):
        updates, moments = tx.update(grads, state.optimizer, trained)
        new = (optax.apply_updates(trained, updates), moments)
        new = jax.tree.map(lambda a, b: jnp.where(sound & usable, a, b), new, (trained, state.optimizer))
    guard = jax.tree.map(lambda a, b: jnp.where(sound, a, b), _counted(norm, usable, state.guard), state.guard)
    after = TrainState(state.step + sound.astype(jnp.int32), tree.merge(new[0], fixed), new[1], guard)
    return after, {
        **sums,
        "grad_norm": norm,
        "skipped": (sound & ~usable).astype(jnp.int32),
        "in_a_row": guard.in_a_row,
        "violations": violations,
    }


def _part(
    trained: dict,
    piece: tuple[Batch, Media | None, jax.Array | None],
    fixed: dict,
    per: jax.Array,
    cfg: vlm.Config,
    objective: Objective,
    compute: str,
    after: features.After,
    dropout: float,
) -> tuple[tuple[dict, dict[str, jax.Array]], jax.Array]:
    """What one part of a batch adds to the gradient and to the sums, and the invariants it breaks."""
    batch, known, key = piece
    d = cfg.decoder
    violations = invariants.violations(batch, d.vocab, cfg.placeholder, vlm.present(batch, cfg), cfg.newline, d.said)

    def mean(trained: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = cast(tree.merge(trained, fixed), compute)
        params = params if key is None else lora.dropping(params, dropout, key)
        media = None if known is None else features.media_of(params, batch, cfg, by_rows(known), after)
        return loss_fn(params, batch, cfg, objective, per=per, media=media)

    (_, sums), grads = jax.value_and_grad(mean, has_aux=True)(trained)
    return (grads, sums | {"tokens": (batch.modality != EMPTY).sum()}), violations


def _spike(norm: jax.Array, guard: Guard, update: Update) -> jax.Array:
    if not update.spike:
        return jnp.zeros((), bool)
    return (guard.kept >= SETTLED) & (norm > update.spike * guard.norm)


def _counted(norm: jax.Array, usable: jax.Array, guard: Guard) -> Guard:
    """The guard after one more step. As of all running means here, the first are of few steps."""
    n = guard.kept.astype(jnp.float32)
    share = 1.0 - jnp.minimum(0.99, (1.0 + n) / (10.0 + n))
    one = usable.astype(jnp.int32)
    return Guard(
        norm=jnp.where(usable, guard.norm + share * (norm - guard.norm), guard.norm),
        kept=guard.kept + one,
        skipped=guard.skipped + 1 - one,
        in_a_row=(guard.in_a_row + 1) * (1 - one),
    )


def batch_shardings(batch: Batch, mesh: Mesh, rules: Rules, parts: int = 1) -> Batch:
    """Where every field lies on a mesh; with `parts` > 1 (see `cut`) an axis more is in front, and is whole."""
    front = () if parts == 1 else (None,)
    of = batches.axes(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[len(front) :], x.dtype), batch))
    return jax.tree.map(lambda x, axes: meshes.named(mesh, front + axes, rules, x.shape), batch, of)


def cut(batch: Any, parts: int) -> Any:
    """Every field [B, ...] as [parts, B / parts, ...], abstract or of NumPy: the parts take rows in turn.

    In turn, so that every process and device has its share of each part.
    """
    if parts == 1:
        return batch

    def one(x: Any) -> Any:
        shape = (x.shape[0] // parts, parts, *x.shape[1:])
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((parts, shape[0], *shape[2:]), x.dtype)
        return x.reshape(shape).swapaxes(0, 1)

    return jax.tree.map(one, batch)


def by_rows(known: Media) -> Media:
    """Features with DeepStack's as [B, T, M, D], so that all of them are cut and placed by rows; and back again."""

    def swapped(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((x.shape[1], x.shape[0], *x.shape[2:]), x.dtype)
        return x.swapaxes(0, 1)

    return known if known.deep is None else known.replace(deep=swapped(known.deep))


def known_shardings(known: Media, mesh: Mesh, rules: Rules, parts: int = 1) -> Media:
    """As batch_shardings, of features by rows."""
    front = () if parts == 1 else (None,)
    axes = {len(front) + 3: ("batch", "length", None), len(front) + 4: ("batch", None, "length", None)}
    return jax.tree.map(lambda x: meshes.named(mesh, front + axes[x.ndim], rules, x.shape), known)


def compile_step(
    state: TrainState,
    batch: Batch,
    cfg: vlm.Config,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules,
    objective: Objective = PLAIN,
    update: Update = AT_ONCE,
    *,
    known: Media | None = None,
    after: features.After = "connector",
    dropout: float = 0.0,
    seed: int = 0,
) -> jax.stages.Compiled:
    """The compiled step for one bucket: (state, batch, asked) → (state, metrics), and with `known` a fourth argument.

    `state`, `batch` and `known` (all rows, not cut into parts) are abstract; the state's buffers are reused (donated).
    `asked` i32[devices], a number of every process (see `of_devices`), comes back as its greatest: what one process is
    asked to do, all know at the same step, without a message of its own. `known`, `after`, `dropout`
    and `seed` are those of `train_step`.
    """

    def step(
        state: TrainState, batch: Batch, asked: jax.Array, known: Media | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        how = {"cfg": cfg, "tx": tx, "objective": objective, "update": update, "after": after}
        how |= {"dropout": dropout, "seed": seed}
        state, metrics = train_step(state, batch, known, **how)
        return state, metrics | {"asked": asked.max()}

    def placed(x: Any, laid: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), x, laid)

    parts = update.accumulate
    batch, known = cut(batch, parts), cut(known, parts)
    fed = [placed(batch, batch_shardings(batch, mesh, rules, parts))]
    fed.append(jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=of_devices(mesh)))
    if known is not None:
        fed.append(placed(known, known_shardings(known, mesh, rules, parts)))
    # Metrics are whole everywhere, so that every process can read them.
    results = (shardings(state), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh), meshes.use_rules(rules):
        return jax.jit(step, donate_argnums=0, out_shardings=results).lower(state, *fed).compile()


def of_devices(mesh: Mesh) -> NamedSharding:
    """One number for every device."""
    return NamedSharding(mesh, P(mesh.axis_names))
