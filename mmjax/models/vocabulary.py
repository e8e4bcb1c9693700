"""A language model for more tokens than it was trained with: new ones start as the mean of the old."""

import dataclasses

import jax.numpy as jnp

from mmjax.core.errors import InputError
from mmjax.models import decoder


def extend(params: dict, cfg: decoder.Config, vocab: int) -> tuple[dict, decoder.Config]:
    """Params and configuration of the same decoder with `vocab` token ids; those that it has keep their rows.

    Every new row of the token table, and of the head where that is another, is the mean of the old rows (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models"): the probability of the new tokens is then
    bounded by that of the old, so that no prediction changes by much.

    Args:
      params: as `decoder.spec(cfg)`; plain arrays, which are not changed.
      vocab: at least that of `cfg`.

    Raises:
      InputError: fewer ids than there are, or a table of another size than `cfg` says.
    """
    if cfg.unsaid:
        raise InputError(f"the last {cfg.unsaid} ids are never said, so none can follow them; use one of those")
    if vocab < cfg.vocab:
        raise InputError(f"a vocabulary of {cfg.vocab} ids cannot be cut to {vocab}; give at least {cfg.vocab}")
    out = dict(params)
    for name in ("embed",) if cfg.tied else ("embed", "head"):
        old = params[name]
        if old.shape[0] != cfg.vocab:
            raise InputError(f"{name!r} has {old.shape[0]} rows, where the configuration says {cfg.vocab}; correct it")
        mean = jnp.mean(old, 0, dtype=jnp.float32, keepdims=True).astype(old.dtype)
        out[name] = jnp.concatenate([old, jnp.broadcast_to(mean, (vocab - cfg.vocab, old.shape[1]))])
    return out, dataclasses.replace(cfg, vocab=vocab)
