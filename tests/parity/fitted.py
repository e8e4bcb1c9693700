"""A connector fitted to words before any gradient goes through the language model, so that it starts by saying names.

Every picture is one token. What the tower sees of it, normalised, goes by a linear map to a vector that stands for its
name in the language model's table (own_vlm.vectors). The map is first the least-squares one (ridge regression, in its
dual form: there are more values than pictures), then moved by a few hundred steps so that of all names the right one is
nearest (the contrastive loss of Radford et al. 2021, CLIP, with words that stay). On one CPU core that is 2 minutes;
through the language model, as many pictures would take an hour.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg


@dataclass(frozen=True)
class Config:
    """How it is fitted.

    ridge: added to the mean product of a picture with itself, which is about 1. floor: added to deviations. steps,
    rate, batch: of what follows; sharpness: of the contrastive loss (1 / temperature). keep: share of the patches that
    are shown then.
    """

    ridge: float = 0.2
    floor: float = 0.05
    steps: int = 300
    rate: float = 5e-6  # small, for a value of the result adds up as many products as a picture has values
    batch: int = 128
    sharpness: float = 20.0
    keep: float = 0.85


USUAL = Config()


class Map(NamedTuple):
    """y = ((normalised(x) − mean) / deviation) kernel + bias, where x [patches × values] are a picture's features."""

    mean: np.ndarray
    deviation: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (normalised(features) - self.mean) / self.deviation @ self.kernel + self.bias


def normalised(features: np.ndarray) -> np.ndarray:
    """f32[n, patches, values] → [n, patches × values], each picture with mean 0 and deviation 1, as by a LayerNorm."""
    x = features.reshape(len(features), -1).astype(np.float32)
    x -= x.mean(1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-5)


def fit(
    features: np.ndarray,
    name: np.ndarray,
    words: np.ndarray,
    cfg: Config = USUAL,
    *,
    share: np.ndarray | None = None,
    say: Callable[[str], None] = print,
) -> Map:
    """The map of pictures to the words of their names.

    Args:
      features: f16 or f32[n, patches, values], what the tower makes of n pictures.
      name: i32[n], which name each has.
      words: f32[names, width], the vector of each name.
      cfg: how.
      share: f64[n], how often each comes in the steps after least squares; all alike if left out.
      say: is told how far it is.
    """
    x, bias = normalised(features), words.mean(0)
    mean, deviation = x.mean(0), x.std(0) + cfg.floor
    x -= mean
    x /= deviation
    y = words - bias
    kernel = least_squares(x, y[name], cfg.ridge)
    say(f"least squares: {_nearest(x @ kernel, name, y):.3f} of the pictures are nearest to their own name")
    out = _refined(kernel, x, name, y, features.shape[1], cfg, share)
    say(f"after {cfg.steps} steps: {_nearest(x @ out['kernel'] + out['bias'], name, y):.3f}")
    return Map(mean, deviation, out["kernel"], bias + out["bias"])


def least_squares(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """The W [d, e] of min ‖xW − y‖² + ridge d ‖W‖², for x [n, d] with more columns than rows."""
    scale = np.float32(x.shape[1])
    products = np.asarray(jax.jit(lambda x: x @ x.T / scale)(x)).copy()
    products[np.diag_indices(len(products))] += ridge
    factor = scipy.linalg.cho_factor(products, lower=True, overwrite_a=True, check_finite=False)
    return np.asarray(jax.jit(lambda x, a: x.T @ a / scale)(x, scipy.linalg.cho_solve(factor, y)))


def _nearest(given: np.ndarray, name: np.ndarray, words: np.ndarray) -> float:
    unit = words / np.linalg.norm(words, axis=1, keepdims=True)
    return float(((given @ unit.T).argmax(1) == name).mean())


def _refined(
    kernel: np.ndarray,
    x: np.ndarray,
    name: np.ndarray,
    words: np.ndarray,
    patches: int,
    cfg: Config,
    share: np.ndarray | None,
) -> dict[str, np.ndarray]:
    rate = optax.warmup_cosine_decay_schedule(0.0, cfg.rate, min(20, cfg.steps), max(cfg.steps, 21))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, 0.9, 0.99))
    words = jnp.asarray(words)
    unit = words / jnp.linalg.norm(words, axis=1, keepdims=True)

    def loss(of: dict, x: jax.Array, name: jax.Array) -> jax.Array:
        y = x @ of["kernel"] + of["bias"][None]
        scores = cfg.sharpness * (y / jnp.linalg.norm(y, axis=1, keepdims=True)) @ unit.T
        near = optax.softmax_cross_entropy_with_integer_labels(scores, name)
        return near.mean() + 0.1 * jnp.square(y - words[name]).sum(-1).mean()

    @jax.jit
    def step(of: dict, moments: optax.OptState, x: jax.Array, name: jax.Array, key: jax.Array) -> tuple:
        shown = jax.random.bernoulli(key, cfg.keep, (len(x), patches, 1)) / cfg.keep
        x = (x.reshape(len(x), patches, -1) * shown).reshape(x.shape)
        updates, moments = tx.update(jax.grad(loss)(of, x, name), moments, of)
        return optax.apply_updates(of, updates), moments

    of = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(kernel.shape[1])}
    moments, rng = tx.init(of), np.random.default_rng(0)
    share = None if share is None else share / share.sum()
    for n in range(cfg.steps):
        some = rng.choice(len(x), min(cfg.batch, len(x)), p=share)
        of, moments = step(of, moments, x[some], name[some], jax.random.key(n))
    return jax.tree.map(np.asarray, of)
