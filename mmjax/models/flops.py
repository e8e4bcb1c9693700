"""Model FLOPs: what a training step must multiply and add, whatever a program makes of it.

For MFU (Chowdhery et al. 2022, PaLM, appendix B): the matrices times the tokens that they see, forwards and backwards,
and attention inside the intervals. Nothing that is computed twice counts (remat, the loss in chunks), and no tile of
scores beyond the intervals. A table that is looked up costs nothing; the head is a matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmjax.connectors import module
from mmjax.core import tree
from mmjax.core.spec import Spec, map_specs
from mmjax.encoders import Encoder
from mmjax.models import vlm
from mmjax.models.language import Language
from mmjax.nn import lora, transformer
from mmjax.sequence import interleave, intervals
from mmjax.sequence.batch import Batch, Bucket


@dataclass(frozen=True)
class Row:
    """What stands in a row: tokens of each document, patches of each picture; windows of so many patches.

    answer: tokens of the second stream of an encoder–decoder, shared evenly by the documents.
    shown: at how many of the pictures a token looks by cross-attention, on average.
    """

    documents: tuple[int, ...]
    pictures: tuple[int, ...]
    window: int = 0
    answer: int = 0
    shown: float = 1.0

    @property
    def tokens(self) -> int:
        return sum(self.documents)

    @property
    def patches(self) -> int:
        return sum(self.pictures)


def full_row(bucket: Bucket, sequence: interleave.Config = interleave.PLAIN, document: int = 0) -> Row:
    """A row without padding: documents of `document` tokens (0: one as long as the row), pictures of one size.

    The last document takes what is left. Documents have equally many pictures. Where text looks at more than the last
    one so far, these stand together, before the text.
    """
    size = document or bucket.tokens
    documents = [size] * (bucket.tokens // size)
    if rest := bucket.tokens - sum(documents):
        documents.append(rest)
    each, more = divmod(bucket.patches, max(bucket.images, 1))
    pictures = tuple(each + (i < more) for i in range(bucket.images) if each + (i < more))
    shown = len(pictures) / len(documents) if sequence.cross in ("all_images", "last_images") else 1.0
    return Row(tuple(documents), pictures, (sequence.window * sequence.merge) ** 2, bucket.answers, shown)


def rows_of(batch: Batch, cfg: vlm.Config, sequence: interleave.Config) -> list[Row]:
    """What stands in each row of a batch of NumPy arrays; rows without documents are left out."""
    out = []
    for r, documents in enumerate(batch.document):
        lengths = np.bincount(documents[documents >= 0]).tolist()
        sizes = batch.grid[r].prod(-1)
        said = 0 if batch.answer is None else int((batch.answer.document[r] >= 0).sum())
        row = Row(tuple(lengths), tuple(sizes[sizes > 0].tolist()), (sequence.window * sequence.merge) ** 2, said)
        if row.pictures and row.tokens and cfg.decoder.cross is not None:
            looks = intervals.looked_at(batch.media_lo[r], batch.media_hi[r], cfg.decoder.cross.blind == "all")
            row = replace(row, shown=int(looks.sum()) * len(row.pictures) / media_tokens(cfg, row) / row.tokens)
        out += [row] if lengths else []
    return out


@dataclass(frozen=True)
class Part:
    """A part of the model: FLOPs of its matrices and of its attention, forwards."""

    matrices: float
    attention: float = 0.0


@dataclass(frozen=True)
class Flops:
    """Of one row. forward: by part of the model, in the order in which they run. total: backwards as well."""

    forward: dict[str, Part] = field(default_factory=dict)
    total: float = 0.0


def of_row(
    cfg: vlm.Config, row: Row, see: str = "causal", frozen: Sequence[str] = (), adapters: lora.Config | None = None
) -> Flops:
    """FLOPs of one row of a training step.

    Backwards, a matrix takes as many FLOPs for the gradient of what it read, where anything in its part of the model or
    before is trained, and as many for its own, where it is. (So the first of all takes both, as in PaLM's 6 N.)
    Attention has no matrix: four products backwards for two forwards.

    Args:
      cfg: the model.
      row: what is in it.
      see: who sees whom in the sequence (sequence.interleave); a prefix counts as causal.
      frozen: parameters that are not trained (train.config.Update).
      adapters: beside kernels, of which tokens go through both thin matrices as well.
    """
    spec = _spec(cfg, adapters)
    names, sizes = tree.flatten(spec), matrices(cfg, adapters)
    still = tree.flatten(tree.choose(spec, frozen)[0]) if frozen else {}
    media, patches, attention, parts = 0, 0, {}, []
    if cfg.sees:
        media, patches = media_tokens(cfg, row), sum(map(cfg.vision.tokens, row.pictures))
        attention["vision"] = sum(_vision(stack, row, cfg.vision) for stack in cfg.vision.stacks.values())
        parts = ["vision", "connector", *(["deep"] if cfg.deep else [])]
    attention["decoder"] = _decoder(cfg.decoder, row, see, media)
    forward, total, before = {}, 0.0, False
    for part in (*parts, "decoder"):
        own = {n: size for n, size in sizes.items() if n.startswith(f"{part}/")}
        seen = {n: 2.0 * size * _sees(n, cfg, row, patches, media) for n, size in own.items()}
        trained = sum(flops for n, flops in seen.items() if n not in still)
        before = before or any(n not in still for n in names if n.startswith(f"{part}/"))
        forward[part] = Part(sum(seen.values()), attention.get(part, 0.0))
        total += (1 + before) * forward[part].matrices + trained + (1 + 2 * before) * forward[part].attention
    return Flops(forward, total)


def matrices(cfg: vlm.Config, adapters: lora.Config | None = None) -> dict[str, int]:
    """The size of everything that tokens are multiplied with, by name: kernels, and the table of the head.

    Scales, biases and position tables are none.
    """
    head = f"decoder/{module(cfg.decoder).head(cfg.decoder)}"
    sizes = tree.flatten(map_specs(lambda p: math.prod(p.shape), _spec(cfg, adapters)))
    return {n: size for n, size in sizes.items() if n == head or _kernel(n).rsplit("/", 1)[-1] == "kernel"}


def _spec(cfg: vlm.Config, adapters: lora.Config | None) -> Spec:
    return vlm.spec(cfg) if adapters is None else lora.spec(vlm.spec(cfg), adapters)


def _kernel(name: str) -> str:
    """The name of a kernel without that of its part, where it is adapted and the part is a matrix."""
    folder, _, part = name.rpartition("/")
    return folder if part in lora.MATRICES and folder.endswith("/kernel") else name


def media_tokens(cfg: vlm.Config, row: Row) -> int:
    """Media tokens of a row."""
    if cfg.connector.per_picture:
        return cfg.connector.per_picture * len(row.pictures)
    return row.patches // cfg.connector.square**2


def _sees(name: str, cfg: vlm.Config, row: Row, patches: int, media: int) -> int | float:
    """How many tokens go through a matrix."""
    part, *path = _kernel(name).split("/")
    if part == "vision" and path[0] == "embed":
        return _embedded(path[1], cfg, row)
    if part == "vision":
        return len(row.pictures) if path[0] == "head" else patches
    keys = any(p in ("k", "v", "kv") for p in path)
    if part == "decoder" and cfg.decoder.answers and path[0] != "encoder":
        return row.tokens if "look" in path and keys else row.answer
    if part == "decoder":
        return media if path[0] == "cross" and keys else row.tokens
    if part == "connector" and cfg.connector.of_features(tuple(path)):
        return patches if cfg.connector.prefix else row.patches
    return media


def _embedded(name: str, cfg: vlm.Config, row: Row) -> int | float:
    """Of a stem, each of a patch's squares; of a matrix for several frames, the one of a still picture."""
    embed = cfg.vision.embed
    if name.startswith("stem_"):
        return row.patches * (embed.patch // embed.stem[int(name.removeprefix("stem_"))][0]) ** 2
    return row.patches / embed.frames


def _pairs(cfg: transformer.Config, pairs: float) -> float:
    """FLOPs of so many scores in every layer: q·k and the weighted sum of values."""
    return 4.0 * cfg.heads * cfg.head * pairs


def _vision(cfg: transformer.Config, row: Row, encoder: Encoder) -> float:
    whole = float(sum(encoder.tokens(n) ** 2 for n in row.pictures))
    within = row.patches * min(row.window, max(row.pictures, default=0))
    inside = len(cfg.windowed)
    return _pairs(cfg, (cfg.layers - inside) * whole + inside * within)


def _decoder(cfg: Language, row: Row, see: str, media: int) -> float:
    blocks = cfg.blocks
    if cfg.answers:
        each, total = row.answer / max(len(row.documents), 1), float(sum(n * n for n in row.documents))
        second = len(row.documents) * each * (each + 1) / 2 + each * row.tokens
        return _pairs(blocks, blocks.layers * total) + _pairs(cfg.answer, cfg.answer.layers * second)
    pairs = sum(n * (n + 1) / 2 for n in row.documents)
    # In a sliding window a token sees its last `window` tokens.
    near = sum(n * (n + 1) / 2 - m * (m + 1) / 2 for n in row.documents for m in [max(n - cfg.window, 0)])
    if see == "bidirectional_images" and row.pictures:
        each = media / len(row.pictures)
        pairs += len(row.pictures) * each * (each - 1) / 2
        near += len(row.pictures) * each * (each - 1) / 2
    out = _pairs(blocks, (blocks.layers - len(blocks.windowed)) * pairs + len(blocks.windowed) * near)
    if cfg.cross is not None and row.pictures:
        seen = row.tokens * row.shown * media / len(row.pictures)
        out += 4.0 * cfg.cross.heads * cfg.cross.head * len(cfg.crossed) * seen
    return out
