"""What a training run is: one frozen dataclass, made by the `config()` function of one file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmjax.core.sharding import MeshConfig
from mmjax.data import drawings, sets
from mmjax.models import vlm
from mmjax.sequence import interleave
from mmjax.sequence.budget import Budget
from mmjax.tokenizers.resolution import Native, Policy


@dataclass(frozen=True)
class Packing:
    """The static shapes: `rows` × `tokens` per step, patches and images as at most `buckets` shapes need them."""

    rows: int = 16
    tokens: int = 256
    buckets: int = 2
    patches: int = 0  # of the largest document that may come; 0: as many as the first thousand have
    long: Literal["refuse", "split"] = "refuse"  # a document longer than a row: refused, or cut between its spans
    memory: int = 1024  # MiB in which pictures are decoded, by all threads together
    reduced: bool = False  # decode large JPEG at a lower scale: faster, not to the last bit what others train with
    holes: int = 0  # documents whose pictures may be unreadable; they are blank and nothing in them is learnt


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay; only matrices decay."""

    learning_rate: float = 1e-3  # at the peak
    warmup: float = 0.05  # share of the steps
    final: float = 0.01  # learning rate at the end, as a share of the peak
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.1
    clip: float = 1.0  # global norm of the gradient
    average: float = 0.0  # above 0: evaluate the running mean of the parameters, with this decay per step


@dataclass(frozen=True)
class Objective:
    """What is minimised, per trained token: −log p(next token) + z · (log partition)²."""

    z: float = 0.0  # PaLM: 1e-4
    chunk: int = 128  # tokens of a row whose logits exist at a time


@dataclass(frozen=True)
class Config:
    """A run. Any field can be set on the command line: --optimizer.learning-rate 3e-4."""

    model: vlm.Config
    data: drawings.Config | sets.Mixed  # the built-in questions, or a mixture of datasets
    out: Path  # where everything the run makes is kept; give the same place again to resume
    steps: int
    resolution: Policy = field(default_factory=lambda: Native(patch=8, min_pixels=64, max_pixels=64 * 64))
    packing: Packing = field(default_factory=Packing)
    sequence: interleave.Config = field(default_factory=interleave.Config)
    budget: Budget = field(default_factory=Budget)  # what a document may take
    optimizer: Optimizer = field(default_factory=Optimizer)
    objective: Objective = field(default_factory=Objective)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    save_every: int = 200  # steps between checkpoints
    keep: int = 2  # checkpoints
    threads: int = 2  # that read and decode
    answer: int = 10  # tokens an answer may take in the evaluation
