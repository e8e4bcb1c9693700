"""Batches from a stream of documents, for data without an index: Grain packs, with a stated look-ahead.

Where documents can be counted beforehand use data.index: its plan fills rows better, and resuming is one integer.
"""

import itertools
from typing import Any

import numpy as np

from mmjax.core.errors import InputError
from mmjax.data.index import LayoutOf, Plan, Step
from mmjax.data.source import Holes, Source
from mmjax.sequence.batch import Batch, Bucket
from mmjax.sequence.document import Document
from mmjax.sequence.layout import DIMENSIONS, described
from mmjax.tokenizers.vocab import Vocab


def stream(
    documents: Any,
    layout: LayoutOf,
    bucket: Bucket,
    vocab: Vocab,
    patch: int,
    *,
    look_ahead: int = 64,
    holes: Holes | None = None,
    **of: Any,
) -> Any:
    """A Grain dataset of batches, all of one bucket; its iterator's `get_state` and `set_state` resume it exactly.

    Documents are measured, packed by lengths alone (best fit, Grain's `BestFitPackIterDataset`), and then decoded.

    Args:
      documents: a `grain.IterDataset` of documents.
      layout: counts a document.
      bucket: the shape of every batch; the rows of the last one may be empty.
      vocab, patch: as of data.source.Source.
      look_ahead: how many rows are open at a time: a document waits for a fitting neighbour until so many are full.
      holes: documents that may be unreadable; none by default.
      of: other fields of data.source.Source (cfg, latents, sound, limits, memory …).

    Raises:
      InputError: a document that does not fit a row, by name, when it is met.
    """
    import grain  # 3 seconds: not for those who only ask for --help

    room = {name: most for name, most in zip(DIMENSIONS, bucket.row, strict=True) if most}
    holes = Holes() if holes is None else holes

    def measured(document: Document) -> dict[str, Any]:
        sizes = dict(zip(DIMENSIONS, layout(document).size, strict=True))
        large = [name for name, n in sizes.items() if n > room.get(name, 0)]
        if large:
            what = ", ".join(f"{sizes[name]} {name}" for name in large)
            raise InputError(
                f"Document {document.id!r} takes {what}, more than a row of {described(bucket.row)}; raise the "
                f"row's sizes, split it (sequence.split) or lower the resolution."
            )
        # Grain packs arrays: these have the lengths and nothing in them.
        return {name: np.zeros(sizes[name], bool) for name in room} | {"document": document}

    def build(rows: list[dict[str, Any]]) -> Batch:
        found = [list(row["document"]) for row in rows]
        first = itertools.accumulate((len(row) for row in found), initial=0)
        step = Step(0, tuple(tuple(range(a, a + len(row))) for a, row in zip(first, found, strict=False)))
        plan = Plan((bucket,), (step,), ((0,) * len(DIMENSIONS),))
        every = [document for row in found for document in row]
        return Source(every, layout, plan, vocab, patch, holes=holes, **of)[0]

    packed = grain.experimental.BestFitPackIterDataset(
        documents.map(measured),
        length_struct=room,
        num_packing_bins=look_ahead,
        meta_features=("document",),
        shuffle_bins=False,
    )
    return packed.batch(bucket.rows, drop_remainder=False, batch_fn=list).map(build)
