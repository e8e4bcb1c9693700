"""The real train step of a bucket, compiled for chips that are not here, and what the compiler says of its memory."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from mmjax.core.errors import InputError
from mmjax.core.meshes import Rules, parts_of
from mmjax.plan.chips import GIB, first_line
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Batch, Bucket, Values
from mmjax.tokenizers.vocab import Vocab
from mmjax.train import stages, state
from mmjax.train.config import Config
from mmjax.train.prepare import fixed_buckets, prepare_data, refuse_model, refuse_rows
from mmjax.train.stages import Part
from mmjax.train.step import compile_step


@dataclass(frozen=True)
class Memory:
    """Bytes on each chip, as the compiler states them: what goes in and comes out, how much of that is one and the
    same, what lives in between, the program itself, and the most at one time where it says so.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int | None = None

    @property
    def total(self) -> int:
        """What the program needs to run."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class TooLarge:
    """A program that the compiler refused: bytes that it would need on each chip, and that there are; 0: not said."""

    needed: float
    available: float


@dataclass(frozen=True)
class Program:
    """A compiled step. text: of the optimised program."""

    bucket: Bucket
    memory: Memory
    text: str
    seconds: float


@dataclass(frozen=True)
class State:
    """Bytes on each chip, from the specs alone: parameters, and what the optimizer keeps."""

    parameters: float
    optimizer: float
    count: int  # of parameters
    trained: int  # of them, with adapters


def buckets(cfg: Config) -> tuple[Bucket, ...]:
    """The buckets of a config, the largest last: those it gives (packing.shapes), else those its documents ask for.

    Raises:
      InputError: it gives none, and its documents cannot be read here, or none can be made of them.
    """
    refuse_model(cfg)
    found = fixed_buckets(cfg)
    if not found:
        try:
            found = prepare_data(cfg).training.plan.buckets
        except (InputError, OSError) as error:
            if not _absent(error):
                raise
            raise InputError(
                f"The buckets of this config come from its documents, which cannot be read here ({error}); give "
                f"patches and images of a row instead, as --packing.shapes 2304 4."
            ) from error
    return tuple(sorted(found, key=lambda b: (b.patches, b.images)))


def _absent(error: BaseException | None) -> bool:
    """Whether it comes from a file that could not be opened."""
    return error is not None and (isinstance(error, OSError) or _absent(error.__cause__ or error.__context__))


def state_bytes(part: Part, mesh: jax.sharding.Mesh) -> State:
    """What each chip holds of a stage's state between steps."""
    shape = stages.abstract(part, mesh)
    moving = state.trained(shape.params, part.cfg.update.frozen)
    count, trained = (sum(math.prod(x.shape) for x in jax.tree.leaves(of)) for of in (shape.params, moving))
    return State(local_bytes(shape.params), local_bytes(shape.optimizer), count, trained)


def local_bytes(tree: Any) -> float:
    """Bytes on each chip of abstract arrays, as they lie."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def learnt(cfg: Config) -> int:
    """Tokens of a row that may be learnt: all, or those of an encoder–decoder's second stream."""
    return cfg.sequence.answer or cfg.packing.tokens


def batch_of(cfg: Config, bucket: Bucket) -> Batch:
    """The abstract batch of a bucket; ids do not matter to its shape."""
    vocab = Vocab(*range(9), size=cfg.model.decoder.vocab)
    patch = cfg.patch
    return batches.abstract(bucket, Values(patch * patch * 3), vocab, cfg.sequence)


def compiled(part: Part, bucket: Bucket, mesh: jax.sharding.Mesh) -> Program | TooLarge:
    """Compiles the train step of a stage and a bucket.

    Raises:
      InputError: the config does not fit the mesh; whatever else the compiler refuses.
    """
    cfg = part.cfg
    refuse_model(cfg)
    refuse_rows(cfg, parts_of("batch", mesh, Rules()))
    shape, tx = stages.abstract(part, mesh), stages.optimizer(cfg)
    how = (cfg.model, tx, mesh, Rules(), cfg.objective, cfg.update)
    return attempted(lambda: compile_step(shape, batch_of(cfg, bucket), *how, **stages.drops(cfg)), bucket)


def attempted(compile: Callable[[], jax.stages.Compiled], bucket: Bucket) -> Program | TooLarge:
    """What becomes of compiling a step of so many rows and tokens; InputError for what a compiler refuses."""
    began = time.monotonic()
    try:
        made = compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
            return too_large(str(error))
        if isinstance(error, jax.errors.JaxRuntimeError | NotImplementedError):
            raise InputError(
                f"The compiler refuses the step of {bucket.rows} rows × {bucket.tokens} tokens: {first_line(error)}"
            ) from error
        raise
    return Program(bucket, memory_of(made), made.as_text(), time.monotonic() - began)


def memory_of(made: jax.stages.Compiled) -> Memory:
    said = made.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    return Memory(
        *(getattr(said, f"{name}_size_in_bytes") for name in names), getattr(said, "peak_memory_in_bytes", None)
    )


def too_large(message: str) -> TooLarge:
    """Reads the compiler's refusal: "Used 20.1G of 15.75G hbm", or "(367.63G) exceeds available HBM (15.75G)"."""
    number = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"[Uu]sed {number} of {number}", message)
    found = found or re.search(rf"\({number}\) exceeds available \w+ \({number}\)", message)
    if not found:
        return TooLarge(0.0, 0.0)
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    return TooLarge(float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]])


def with_flag(cfg: Any, name: str, value: Any) -> Any:
    """The config with the field of a dotted name changed."""
    head, _, rest = name.partition(".")
    return dataclasses.replace(cfg, **{head: with_flag(getattr(cfg, head), rest, value) if rest else value})
