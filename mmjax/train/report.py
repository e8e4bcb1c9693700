"""What a run shows: a progress line, metrics as JSON lines and TensorBoard events, a loss curve, a sheet of answers."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np

from mmjax.core.files import write_atomic
from mmjax.data.source import load
from mmjax.sequence.document import Document

METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"


class Metrics:
    """Appends one JSON line a step and the same numbers to TensorBoard; what is not finite is null.

    The updates that were left out are in a file of their own, with the documents of their batches. What an interrupted
    run wrote after `start`, the step of its checkpoint, is cut off: the curve goes on where the parameters do.
    """

    def __init__(self, out: Path, start: int):
        from tensorboardX import SummaryWriter

        self.file, self.skips = (_cut_off(out / name, start) for name in (METRICS, SKIPPED))
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, **values: float) -> None:
        self.file.write(_line(step, values))
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def skipped(self, step: int, documents: Sequence[str], **values: float) -> None:
        self.skips.write(_line(step, values | {"documents": list(documents)}))
        self.skips.flush()

    def flush(self) -> None:
        self.file.flush()
        self.board.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.skips.close()
        self.board.close()


def _cut_off(path: Path, start: int) -> IO[str]:
    """The file without the lines of later steps, open for more."""
    kept = [line for line in path.read_text().splitlines() if _step(line) <= start] if path.exists() else []
    write_atomic(path, "".join(f"{line}\n" for line in kept))
    return path.open("a")


def _line(step: int, values: dict[str, Any]) -> str:
    told = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps({"step": step, **told}) + "\n"


class Silence:
    """Takes the place of Metrics and Progress in all processes but the first."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _step(line: str) -> float:
    """The step of a line; a line cut short by a kill belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step so far; NaN where the loss was not finite."""
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [(r["step"], math.nan if r["loss"] is None else r["loss"]) for r in rows]


class Progress:
    """One line that says how far the run is; where the output is no terminal, a plain line now and then."""

    EVERY = 20.0  # seconds between plain lines

    def __init__(self, steps: int, start: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self.console, self.steps, self.first, self.began = console, steps, start, time.monotonic()
        self.task = self.bar.add_task("", total=steps, completed=start, text="")
        self.said = 0.0

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float, fill: float) -> None:
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} useful tokens/s  fill {fill:.1%}"
        self.bar.update(self.task, completed=step, text=text)
        now = time.monotonic()
        if self.bar.disable and (now - self.said > self.EVERY or step == self.steps):
            left = (now - self.began) / max(1, step - self.first) * (self.steps - step)
            self.console.print(f"step {step}/{self.steps}  {text}  {left:.0f} s left", highlight=False)
            self.said = now


def draw_curve(out: Path, name: str) -> None:
    """The loss of every step, and its running mean, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    steps, loss = map(np.array, zip(*[(n, x) for n, x in losses(out) if math.isfinite(x)], strict=True))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per trained token", yscale="log")
    axes.plot(steps, loss, linewidth=0.5, alpha=0.5, label="each step")
    width = max(1, len(loss) // 50)
    smooth = np.convolve(loss, np.ones(width) / width, "valid")
    axes.plot(steps[width - 1 :], smooth, label=f"mean of {width}")
    axes.legend()
    figure.savefig(out / name, dpi=120)


@runtime_checkable
class Asked(Protocol):
    """A document up to its answer, what it asks, and the answer."""

    document: Document
    question: str
    answer: str


def draw_sheet(out: Path, name: str, questions: Sequence[Asked], answers: Sequence[str], most: int = 24) -> None:
    """Held-out pictures with question, answer and truth, as a PNG; right answers green, wrong ones red."""
    from matplotlib.figure import Figure

    shown = [int(i) for i in np.linspace(0, len(questions) - 1, min(most, len(questions)))]
    columns = 6
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(columns * 1.9, rows * 2.2), layout="constrained")
    for place, i in enumerate(shown, start=1):
        q, said = questions[i], answers[i]
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(load(q.document.images[0]))
        axes.set_axis_off()
        right = said == q.answer
        label = f"{q.question}\n{printable(said)}" + ("" if right else f"\n(truth: {q.answer})")
        axes.set_title(label, fontsize=8, color="green" if right else "firebrick", parse_math=False)
    figure.savefig(out / name, dpi=120)


def printable(text: str) -> str:
    """Text in which what cannot be drawn is a dot: an untrained model says anything."""
    return "".join(c if c.isascii() and c.isprintable() else "·" for c in text)[:24]


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What write_json has written; {} where it has not."""
    return json.loads(path.read_text()) if path.exists() else {}


def print_budget(layout: object) -> None:
    """How many planned documents had to be changed to come within the budget, and the first of them."""
    reports = getattr(layout, "reports", {})
    if reports:
        first = next(iter(reports.values()))
        print(
            f"{len(reports)} documents were over the budget; the first, {first.id}: {', '.join(first.did)}, now "
            f"{first.total} tokens, {first.flops:,} FLOPs, {first.cache:,} bytes of cache"
        )
