"""What a training run is: one frozen dataclass, made by the `config()` function of one file."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig
from mmjax.data import drawings, sets
from mmjax.models import vlm
from mmjax.nn.lora import Config as Lora
from mmjax.sequence import interleave
from mmjax.sequence.budget import Budget
from mmjax.tokenizers.resolution import Native, Policy
from mmjax.train.cluster import Cluster


@dataclass(frozen=True)
class Packing:
    """The static shapes: `rows` × `tokens` per step, patches and images as at most `buckets` shapes need them."""

    rows: int = 16
    tokens: int = 256
    buckets: int = 2
    patches: int = 0  # of the largest document that may come; 0: as many as the first thousand have
    shapes: tuple[tuple[int, int], ...] = ()  # patches and images of a row, by bucket: these, and none are chosen
    long: Literal["refuse", "split"] = "refuse"  # a document longer than a row: refused, or cut between its spans
    memory: int = 1024  # MiB in which pictures are decoded, by all threads together
    reduced: bool = False  # decode large JPEG at a lower scale: faster, not to the last bit what others train with
    holes: int = 0  # documents whose pictures may be unreadable; they are blank and nothing in them is learnt

    def __post_init__(self):
        if self.shapes and (self.patches or min(map(min, self.shapes)) < 1):
            raise InputError(
                f"packing.shapes is {self.shapes} and packing.patches {self.patches}; give patches and images of each "
                f"bucket, at least 1 of both, and leave packing.patches at 0."
            )


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
class Update:
    """How the parameters move, step by step.

    accumulate: parts that the rows of a step are cut into, one after the other through the model; their gradients add
      up to that of all rows at once, in the memory of one part.
    compute: of products and activations. Parameters, their gradients, the optimizer's state, norms, softmax and logits
      are float32 in any case.
    frozen: parameters that stay as they are, by path ("vision", "decoder/blocks/*/kernel"; "!connector" is all but the
      connector, see core.tree.choose): they have no gradient and no optimizer state.
    spike: above 0: an update whose gradient's norm is over so many times the running mean of norms is left out, as
      those are whose gradient or loss is not finite; what the batch held is written to skipped.jsonl.
    patience: updates left out one after the other, after which the run ends.
    """

    accumulate: int = 1
    compute: Literal["float32", "bfloat16"] = "float32"
    frozen: tuple[str, ...] = ()
    spike: float = 0.0
    patience: int = 10

    def __post_init__(self):
        if self.accumulate < 1 or self.patience < 1:
            raise InputError(
                f"update.accumulate is {self.accumulate} and update.patience is {self.patience}; give at least 1."
            )
        if self.spike < 0 or 0 < self.spike <= 1:
            raise InputError(f"update.spike is {self.spike}; give a number above 1, as 10, or 0 for none.")


@dataclass(frozen=True)
class Features:
    """Where the visual tokens of pictures are kept, for runs whose vision tower is frozen: `--features.folder PATH`.

    What is frozen is not computed again: the connector's tokens where update.frozen has "connector" (and "deep") too,
    else the tower's features. Pictures go by the bytes of their file, or by their pixels where a dataset draws them; so
    where each is drawn anew, as the built-in drawings are, all are computed, and keeping them is of no use. Losses are
    those of a run without it but for rounding, for a picture is encoded in the batch that shows it first. One process.

    folder: None: in memory alone. disk, memory: MiB; without a folder and with 0 of memory, nothing is kept.
    age: days after which features are made again.
    """

    folder: Path | None = None
    disk: int = 16 * 1024
    memory: int = 0
    age: float = 30.0

    def __post_init__(self):
        if self.disk < 1 or self.memory < 0 or not self.age > 0:
            raise InputError(
                f"features.disk is {self.disk}, features.memory {self.memory} and features.age {self.age}; give MiB "
                f"and days above 0 (0 of memory for none)."
            )

    @property
    def on(self) -> bool:
        return self.folder is not None or self.memory > 0


@dataclass(frozen=True)
class Stage:
    """Some of a run's steps, in which some of its parameters are trained.

    The optimizer begins anew with each stage, and its learning rate rises and falls over the stage's steps.

    name: in messages and results.
    steps: how many.
    trains: the parameters, by path (core.tree.choose), without those of update.frozen.
    learning_rate: at the peak; 0: optimizer.learning_rate.
    """

    name: str
    steps: int
    trains: tuple[str, ...] = ("*",)
    learning_rate: float = 0.0

    def __post_init__(self):
        if self.steps < 1 or not self.trains or not 0 <= self.learning_rate < math.inf:
            raise InputError(
                f"The stage {self.name!r} has {self.steps} steps, trains {self.trains} and has a learning rate of "
                f"{self.learning_rate}; give at least 1 step and one pattern, and a rate above 0 (0: the optimizer's)."
            )


@dataclass(frozen=True)
class Config:
    """A run. Any field can be set on the command line: --optimizer.learning-rate 3e-4.

    resolution: the policy of pictures; None where the model reads text alone.
    base: the model that the run starts from, a Hugging Face directory or a checkpoint made of one (mmjax.convert): its
      weights, and its processor writes the documents. None: parameters start at random.
    lora: what adapters of low rank are beside kernels; stages say when they are trained.
    stages: one after the other; none: all steps train what update.frozen leaves.
    """

    model: vlm.Config
    data: drawings.Config | sets.Mixed  # the built-in questions, or a mixture of datasets
    out: Path  # where everything the run makes is kept; give the same place again to resume
    steps: int  # of all stages
    base: Path | None = None
    lora: Lora | None = None
    stages: tuple[Stage, ...] = ()
    resolution: Policy | None = field(default_factory=lambda: Native(patch=8, min_pixels=64, max_pixels=64 * 64))
    packing: Packing = field(default_factory=Packing)
    sequence: interleave.Config = field(default_factory=interleave.Config)
    budget: Budget = field(default_factory=Budget)  # what a document may take
    optimizer: Optimizer = field(default_factory=Optimizer)
    objective: Objective = field(default_factory=Objective)
    update: Update = field(default_factory=Update)
    features: Features = field(default_factory=Features)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    cluster: Cluster = field(default_factory=Cluster)
    seed: int = 0
    save_every: int = 200  # steps between checkpoints
    keep: int = 2  # checkpoints
    keep_every: int = 0  # above 0: those of steps that it divides are kept for good
    fallback: bool = True  # resume from the step before, where the last one is damaged
    threads: int = 2  # that read and decode
    answer: int = 10  # tokens an answer may take in the evaluation
    questions: int = 200  # that are answered of each dataset, with a base: the first so many; 0: all

    @property
    def patch(self) -> int:
        """Pixels a side of a patch; 0 where there are no pictures."""
        return 0 if self.resolution is None else self.resolution.patch
