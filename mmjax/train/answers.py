"""Whether a model answers as documents do: greedy answers, generated with a cache, compared word for word."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmjax.convert.huggingface import Model
from mmjax.convert.processor import Processor
from mmjax.core.meshes import Rules
from mmjax.generate.session import Session
from mmjax.models import vlm
from mmjax.sequence.document import Document, Text
from mmjax.train import report
from mmjax.train.config import Config
from mmjax.train.evaluate import SHEET, HeldOut
from mmjax.train.step import cast


@dataclass(frozen=True)
class Asked:
    """A conversation without its last answer, and that answer."""

    document: Document
    answer: str

    @property
    def question(self) -> str:
        """The text asked last; "" where there is a picture alone."""
        return next((span.text for span in reversed(self.document.spans) if isinstance(span, Text)), "")


def asked(documents: Sequence[Document]) -> list[Asked]:
    """The questions of documents that end with what the assistant says, in words that are trained."""
    out = []
    for document in documents:
        spans = document.spans
        last = len(spans)
        while last and isinstance(spans[last - 1], Text) and spans[last - 1].role == "assistant":
            last -= 1
        answer = spans[last:]
        if last and answer and all(span.train for span in answer):
            out.append(Asked(Document(document.id, spans[:last]), "".join(span.text for span in answer)))
    return out


def equal(said: str, answer: str) -> bool:
    """Whether both are the same words: without space around them, and in whatever case."""
    return said.strip().casefold() == answer.strip().casefold()


class Answers:
    """The loss on documents (`HeldOut`), and the share of their last answers that is given exactly (`equal`).

    Answers are greedy, of at most cfg.answer tokens, to the first cfg.questions of every dataset. Questions about media
    that cannot be read, as packing.holes allows, are left out. Where several processes train, there is the loss alone.
    """

    def __init__(self, losses: HeldOut, questions: Mapping[str, Sequence[Asked]], its: Processor):
        self.losses, self.its = losses, its
        self.questions = {name: of for name, of in questions.items() if of} if jax.process_count() == 1 else {}

    def compile(self, cfg: Config, params: dict, mesh: Mesh, rules: Rules) -> None:
        """As of HeldOut. What answers is compiled when it is first asked: its shapes come from the questions."""
        self.cfg, self.mesh = cfg, mesh
        self.losses.compile(cfg, params, mesh, rules)

    def judge(self, params: dict, out: Path) -> dict[str, Any]:
        """As of HeldOut, and `answers`: of every question its document, the answer, and what was said.

        Of every dataset: how many `questions` were asked, `of` how many, and how many were `unread`. Some of those with
        a picture are drawn in `out`.
        """
        judged = self.losses.judge(params, out)
        if not self.questions:
            return judged
        model = Model(vlm, self.cfg.model, cast(params, self.cfg.update.compute))
        session = Session(model, self.its, mesh=self.mesh, unstack=False)
        told, drawn = {}, []
        for name, every in self.questions.items():
            first = every[: self.cfg.questions or None]
            questions = self._readable(name, first)
            counts = {"questions": len(questions), "of": len(every), "unread": len(first) - len(questions)}
            judged["held_out"][name] |= counts
            if not questions:
                continue
            said = self._said(session, questions)
            right = [equal(s, q.answer) for s, q in zip(said, questions, strict=True)]
            judged["held_out"][name]["exact_match"] = float(np.mean(right))
            told[name] = [
                {"document": q.document.id, "answer": q.answer, "said": s} for s, q in zip(said, questions, strict=True)
            ]
            each = zip(questions, said, right, strict=True)
            drawn += [(q, q.answer if well else s.strip()) for q, s, well in each if q.document.images]
        if drawn:
            report.draw_sheet(out, SHEET, *zip(*drawn, strict=True), most=20)
        return judged | {"answers": told}

    def _readable(self, name: str, questions: Sequence[Asked]) -> list[Asked]:
        """Those whose documents were read when their loss was taken."""
        holes = set(self.losses.sources[name].holes.reasons)
        if self.cfg.packing.long == "split":  # there they are called id#0, id#1, …
            holes |= {hole.rpartition("#")[0] for hole in holes}
        return [question for question in questions if question.document.id not in holes]

    def _said(self, session: Session, questions: Sequence[Asked]) -> list[str]:
        """What is said to every question; those of like length together."""
        rows = self.cfg.packing.rows
        order = sorted(range(len(questions)), key=lambda n: self.its.layout(questions[n].document).size)
        said = [""] * len(questions)
        for start in range(0, len(order), rows):
            some = order[start : start + rows]
            full = some + some[:1] * (rows - len(some))  # the same shapes as the others
            answers = session.answer([questions[n].document for n in full], max_tokens=self.cfg.answer)
            for n, answer in zip(some, answers, strict=False):
                said[n] = answer.text
        return said

    def said(self, judged: dict[str, Any]) -> str:
        """One line about the result."""
        exact = [f"{name} {_exact(of)}" for name, of in judged["held_out"].items() if "exact_match" in of]
        return self.losses.said(judged) + (f"; answers that are exact: {', '.join(exact)}" if exact else "")


def _exact(of: Mapping[str, Any]) -> str:
    """The share, and of how many of how many questions."""
    asked = of["questions"] + of["unread"]
    less = [f"of {of['of']} the first {asked} were asked"] if asked < of["of"] else []
    less += [f"{of['unread']} cannot be read"] if of["unread"] else []
    return f"{of['exact_match']:.0%} of {of['questions']}" + (f" ({'; '.join(less)})" if less else "")
