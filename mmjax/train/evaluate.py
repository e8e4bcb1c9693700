"""Evaluation: greedy answers to packed questions, all at once, at one static shape; the loss on held-out documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from mmjax.core import meshes, processes, sharding
from mmjax.core.meshes import Rules
from mmjax.data.drawings import Question
from mmjax.data.source import Source
from mmjax.models import decoder, vlm
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Batch
from mmjax.train import cluster, report
from mmjax.train.config import Config, Objective
from mmjax.train.step import batch_shardings, cast, loss_fn

SHEET = "answers.png"


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
    media = vlm.media(params, batch, cfg)
    safe = jnp.maximum(start, 0)

    def write(i: jax.Array, tokens: jax.Array) -> jax.Array:
        hidden = vlm.hidden(params, batch.replace(tokens=tokens), cfg, media=media)
        at = sharding.take_rows(hidden, safe + i)
        likeliest = sharding.unsplit(jnp.argmax(decoder.logits(params["decoder"], at, cfg.decoder), -1))
        place = jnp.where(start >= 0, start + i + 1, tokens.shape[1])  # past the end: dropped
        put = jax.vmap(lambda t, p, new: t.at[p].set(new, mode="drop"))  # row by row: local on any mesh
        return put(tokens, place, likeliest.astype(tokens.dtype))

    tokens = jax.lax.fori_loop(0, answer, write, sharding.unsplit(batch.tokens))
    places = safe[:, :, None] + 1 + jnp.arange(answer)[None, None]
    return jax.vmap(lambda t, p: t[p])(tokens, places)


class Questions:
    """Questions about pictures never seen, answered word for word; the layouts leave room for the answers."""

    def __init__(self, questions: Sequence[Question], source: Source, tokenizer: Any, baseline: float):
        self.questions, self.source, self.tokenizer, self.baseline = questions, source, tokenizer, baseline

    def compile(self, cfg: Config, params: dict, mesh: Mesh, rules: Rules) -> None:
        """Once, before training; `params` may be abstract: they say where the parameters lie."""
        self.answer = cfg.answer
        self.starts = [self._starts(step) for step in range(len(self.source))]
        self.abstract, self.placed = _abstract(self.source, mesh, rules)
        self.start_placed = meshes.named(mesh, ("batch", None), rules, self.starts[0].shape)
        start = jax.ShapeDtypeStruct(self.starts[0].shape, np.int32, sharding=self.start_placed)
        with jax.set_mesh(mesh), meshes.use_rules(rules):
            run = jax.jit(
                lambda p, b, s: greedy(cast(p, cfg.update.compute), b, s, cfg.model, cfg.answer),
                out_shardings=NamedSharding(mesh, P()),
            )
            self.run = run.lower(params, self.abstract, start).compile()

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
            batch = cluster.place(self.source[step], self.placed, self.abstract)
            start = cluster.whole(self.starts[step], self.start_placed)
            ids = np.asarray(self.run(params, batch, start))
            for r, row in enumerate(planned.rows):
                for q, number in enumerate(row):
                    said = ids[r, q].tolist()
                    out[number] = self.tokenizer.decode(said[: said.index(end)] if end in said else said)
        return out

    def judge(self, params: dict, out: Path) -> dict[str, Any]:
        """How many answers are right; the first process draws them in `out`."""
        answers = self.answers(params)
        right = [said == q.answer for said, q in zip(answers, self.questions, strict=True)]
        if processes.index() == 0:
            report.draw_sheet(out, SHEET, self.questions, answers)
        return {
            "exact_match": float(np.mean(right)),
            "baseline": self.baseline,
            "questions": len(right),
            "answers": {q.answer: said for q, said in zip(self.questions, answers, strict=True)},
        }

    def said(self, judged: dict[str, Any]) -> str:
        """One line about the result."""
        return (
            f"named {judged['exact_match']:.0%} of {judged['questions']} unseen drawings (pixel nearest neighbour: "
            f"{self.baseline:.0%}, see {SHEET})"
        )


class HeldOut:
    """The loss on documents that were never trained on, by the name of their dataset; one program for all."""

    def __init__(self, sources: dict[str, Source]):
        self.sources = sources

    def compile(self, cfg: Config, params: dict, mesh: Mesh, rules: Rules) -> None:
        """As of Questions."""
        if not self.sources:
            return
        self.abstract, self.placed = _abstract(next(iter(self.sources.values())), mesh, rules)
        plain = Objective(chunk=cfg.objective.chunk)
        with jax.set_mesh(mesh), meshes.use_rules(rules):
            run = jax.jit(
                lambda p, b: loss_fn(cast(p, cfg.update.compute), b, cfg.model, plain)[1],
                out_shardings=NamedSharding(mesh, P()),
            )
            self.run = run.lower(params, self.abstract).compile()

    def judge(self, params: dict, out: Path) -> dict[str, Any]:
        """The mean loss per trained token, and the share of them that is likeliest, of every dataset."""
        found = {}
        for name, source in self.sources.items():
            placed = (cluster.place(batch, self.placed, self.abstract) for batch in source)
            sums = [jax.device_get(self.run(params, batch)) for batch in placed]
            weight, loss, correct = (float(sum(s[k] for s in sums)) for k in ("weight", "loss", "correct"))
            found[name] = {"loss": loss / max(weight, 1.0), "accuracy": correct / max(weight, 1.0), "tokens": weight}
        return {"held_out": found}

    def said(self, judged: dict[str, Any]) -> str:
        """One line about the result."""
        losses = ", ".join(f"{name} {found['loss']:.3f}" for name, found in judged["held_out"].items())
        return f"loss per token on documents never trained on: {losses or 'none were held out'}"


def _abstract(source: Source, mesh: Mesh, rules: Rules) -> tuple[Batch, Batch]:
    """The shapes of a source's batches, and where they lie."""
    shape = batches.abstract(source.plan.buckets[0], source.values, source.vocab, source.cfg)
    placed = batch_shardings(shape, mesh, rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, placed), placed
