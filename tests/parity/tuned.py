"""A tower trained to tell drawings apart: its last blocks and the connector, before a language model hears them.

The connector's one token of a picture is to be nearest to the vector of the picture's name, among those of all names:
the contrastive loss of Radford et al. 2021 (CLIP) with words that stay. What `fitted` makes is linear, and what a
linear map cannot tell apart only the tower can. A picture takes a quarter of the products here that it takes through
the language model, which reads the question besides.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax.connectors import pixel_shuffle
from mmjax.encoders import vit
from mmjax.nn import patch_embed, transformer
from mmjax.sequence.positions import grid_positions


@dataclass(frozen=True)
class Config:
    """How it is trained.

    frozen: blocks, of the first ones, that stay. steps, batch: of pictures. rate: of the blocks (AdamW); of the
    connector `connector`. warmup: steps. sharpness: 1 / temperature. distance: weight of the squared distance to the
    name's vector, beside the loss of telling names apart.
    """

    frozen: int = 4
    steps: int = 900
    batch: int = 64
    rate: float = 5e-5
    connector: float = 5e-5
    warmup: int = 20
    decay: float = 0.05
    sharpness: float = 15.0
    distance: float = 0.1
    say_every: int = field(default=50, compare=False)


USUAL = Config()


def tune(
    params: dict,
    pictures: Iterator[tuple[np.ndarray, np.ndarray]],
    words: np.ndarray,
    tower: vit.Config,
    connector: pixel_shuffle.Config,
    cfg: Config = USUAL,
    *,
    say: Callable[[str], None] = print,
) -> dict:
    """The parameters after cfg.steps batches.

    Args:
      params: {"vision", "connector"}, of `tower` (with one class token, without a last norm) and `connector` (all
        patches become one token).
      pictures: batches: f32[batch, side, side, 3], normalised, and i32[batch], which name each has.
      words: f32[names, width], the vector of each name.
      tower, connector: their configs.
      cfg: how.
      say: is told how far it is.
    """
    lower, upper = halves(params, tower, cfg.frozen)
    trained = {"blocks": upper, "connector": params["connector"]}
    tx = _optimizer(cfg, trained)
    moments = tx.init(trained)
    step = jax.jit(functools.partial(_step, tx=tx, tower=tower, connector=connector, cfg=cfg))
    centre = words.mean(0)
    words = jnp.asarray(words - centre), jnp.asarray(centre)
    start, losses = time.monotonic(), []
    for n in range(1, cfg.steps + 1):
        picture, name = next(pictures)
        trained, moments, loss = step(trained, moments, lower, picture, name, words)
        losses.append(float(loss))
        if n % cfg.say_every == 0 or n == cfg.steps:
            mean = np.mean(losses[-cfg.say_every :])
            say(f"step {n}/{cfg.steps}  loss {mean:.3f}  {time.monotonic() - start:.0f} s")
    blocks = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), lower["blocks"], trained["blocks"])
    return {"vision": lower | {"blocks": blocks}, "connector": trained["connector"]}


def halves(params: dict, tower: vit.Config, frozen: int) -> tuple[dict, dict]:
    """The tower's parameters with its first blocks alone, and its other blocks."""
    vision = params["vision"]
    first = jax.tree.map(lambda x: x[:frozen], vision["blocks"])
    return vision | {"blocks": first}, jax.tree.map(lambda x: x[frozen:], vision["blocks"])


def said(
    trained: dict,
    lower: dict,
    picture: jax.Array,
    tower: vit.Config,
    connector: pixel_shuffle.Config,
    frozen: int,
) -> jax.Array:
    """The connector's token of each picture, [batch, width]; one picture a row."""
    rows, columns = (side // tower.embed.patch for side in picture.shape[1:3])
    patches = patch_embed.patchify(picture, tower.embed.patch).reshape(len(picture), rows * columns, -1)
    grid = (1, rows, columns)
    first = dataclasses.replace(tower, blocks=dataclasses.replace(tower.blocks, layers=frozen))
    rest = dataclasses.replace(tower.blocks, layers=tower.blocks.layers - frozen)

    def alike(x: np.ndarray) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(x, jnp.int32), (len(picture), *np.shape(x)))

    def see(count: int) -> dict[str, jax.Array]:
        zeros = np.zeros(count)
        return {"order": alike(np.arange(count)), "lo": alike(zeros), "hi": alike(zeros + count - 1)}

    place = alike(grid_positions(grid)[:, 1:])
    many = rows * columns
    made = vit.encode(
        lower, patches, first, position=place, image=alike(np.zeros(many)), grid=alike([grid]), **see(many)
    )
    x = jax.lax.stop_gradient(jnp.concatenate([made.patches, made.prefix[:, 0]], axis=1))
    x = transformer.apply(trained["blocks"], x, rest, position=alike(np.zeros((many + 1, 2))), **see(many + 1))
    return pixel_shuffle.apply(trained["connector"], x[:, :many], connector)[:, 0]


def loss(token: jax.Array, name: jax.Array, words: tuple[jax.Array, jax.Array], cfg: Config) -> jax.Array:
    """Of tokens [batch, width] whose names are known; `words` are the names' vectors about their mean, and that."""
    vectors, centre = words
    away = token - centre[None]
    unit = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    near = cfg.sharpness * (away / jnp.linalg.norm(away, axis=1, keepdims=True)) @ unit.T
    apart = jnp.square(away - vectors[name]).sum(-1)
    return optax.softmax_cross_entropy_with_integer_labels(near, name).mean() + cfg.distance * apart.mean()


def _step(
    trained: dict,
    moments: optax.OptState,
    lower: dict,
    picture: jax.Array,
    name: jax.Array,
    words: tuple[jax.Array, jax.Array],
    *,
    tx: optax.GradientTransformation,
    tower: vit.Config,
    connector: pixel_shuffle.Config,
    cfg: Config,
) -> tuple[dict, optax.OptState, jax.Array]:
    def value(trained: dict) -> jax.Array:
        return loss(said(trained, lower, picture, tower, connector, cfg.frozen), name, words, cfg)

    found, gradient = jax.value_and_grad(value)(trained)
    updates, moments = tx.update(gradient, moments, trained)
    return optax.apply_updates(trained, updates), moments, found


def _optimizer(cfg: Config, trained: dict) -> optax.GradientTransformation:
    def rate(peak: float) -> optax.Schedule:
        warmup = min(cfg.warmup, cfg.steps)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(cfg.steps, warmup + 1), 0.02 * peak)

    of = {"blocks": "blocks", "connector": jax.tree.map(lambda _: "connector", trained["connector"])}
    # What comes into the last map is far from zero (own_vlm.projector): a step of it would move every value by much.
    of["connector"]["projection"]["down"]["kernel"] = "stays"
    kinds = {
        "blocks": optax.adamw(rate(cfg.rate), 0.9, 0.99, weight_decay=cfg.decay),
        "connector": optax.adam(rate(cfg.connector), 0.9, 0.99),
        "stays": optax.set_to_zero(),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(kinds, of))
