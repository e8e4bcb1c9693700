"""Evaluation: greedy answers to packed questions, all at once, by whole forward passes at one static shape."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mmjax.core import sharding
from mmjax.core.sharding import Rules
from mmjax.data.source import Source
from mmjax.models import decoder, vlm
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Batch
from mmjax.tokenizers.text import Tokenizer
from mmjax.train.step import batch_shardings


def greedy(
    params: dict, batch: Batch, start: Int[Array, "b q"], cfg: vlm.Config, answer: int
) -> Int[Array, "b q answer"]:
    """The `answer` likeliest tokens, one by one, after the token at start[b, q] of every question q of row b.

    The places after `start` must be laid out empty (layout's `answer`). The encoder runs once, the decoder `answer`
    times over the whole row: for short answers in a batch of many that is cheap, and needs no cache.

    Args:
      params, batch, cfg: the model's.
      start: i32[B, Q], -1 where a row has fewer questions.
      answer: tokens per answer.
    """
    media = vlm.media_tokens(params, batch, cfg)
    safe = jnp.maximum(start, 0)

    def write(i: jax.Array, tokens: jax.Array) -> jax.Array:
        hidden = vlm.hidden(params, batch.replace(tokens=tokens), cfg, media=media)
        at = jax.vmap(lambda h, s: h[s])(hidden, safe + i)
        likeliest = jnp.argmax(decoder.logits(params["decoder"], at, cfg.decoder), -1)
        place = jnp.where(start >= 0, start + i + 1, tokens.shape[1])  # past the end: dropped
        put = jax.vmap(lambda t, p, new: t.at[p].set(new, mode="drop"))  # row by row: local on any mesh
        return put(tokens, place, likeliest.astype(tokens.dtype))

    tokens = jax.lax.fori_loop(0, answer, write, batch.tokens)
    places = safe[:, :, None] + 1 + jnp.arange(answer)[None, None]
    return jax.vmap(lambda t, p: t[p])(tokens, places)


class Evaluator:
    """Answers the questions of a source whose layouts leave room for answers; compiled once, before training."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        cfg: vlm.Config,
        answer: int,
        params: dict,
        mesh: Mesh,
        rules: Rules,
    ):
        """`params` may be abstract; they say where the parameters lie."""
        self.source, self.tokenizer, self.answer, self.mesh = source, tokenizer, answer, mesh
        self.starts = [self._starts(step) for step in range(len(source))]
        bucket = source.plan.buckets[0]
        shape = batches.abstract(bucket, source.values, source.vocab, source.cfg)
        self.placed = batch_shardings(shape, mesh, rules)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, self.placed)
        self.start_placed = sharding.named(mesh, ("batch", None), rules, self.starts[0].shape)
        start = jax.ShapeDtypeStruct(self.starts[0].shape, np.int32, sharding=self.start_placed)
        with jax.set_mesh(mesh), sharding.use_rules(rules):
            run = jax.jit(lambda p, b, s: greedy(p, b, s, cfg, answer))
            self.run = run.lower(params, abstract, start).compile()

    def _starts(self, step: int) -> np.ndarray:
        """Where the assistant's marker of every question stands; its answer's places end the document."""
        bucket, planned = self.source.plan.buckets[0], self.source.plan.steps[step]
        most = max(len(row) for s in self.source.plan.steps for row in s.rows)
        out = np.full((bucket.rows, most), -1, np.int32)
        for r, row in enumerate(planned.rows):
            stops = np.cumsum([self.source.layout(self.source.documents[n]).tokens for n in row])
            out[r, : len(row)] = stops - self.answer - 1
        return out

    def answers(self, params: dict) -> Sequence[str]:
        """The model's answer to every document of the source, in their order."""
        out = [""] * len(self.source.documents)
        end = self.source.vocab.end
        for step, planned in enumerate(self.source.plan.steps):
            batch = jax.device_put(self.source[step], self.placed)
            start = jax.device_put(self.starts[step], self.start_placed)
            ids = np.asarray(self.run(params, batch, start))
            for r, row in enumerate(planned.rows):
                for q, number in enumerate(row):
                    said = ids[r, q].tolist()
                    out[number] = self.tokenizer.decode(said[: said.index(end)] if end in said else said)
        return out
