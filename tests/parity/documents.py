"""Whole models compared on documents: our batch and the reference's tensors from the same ids and the same pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity.harness import Compare, double, gradient_model, saved, weights_for

from mmjax.convert import huggingface
from mmjax.models import vlm
from mmjax.sequence import interleave, invariants
from mmjax.sequence.batch import Batch, Bucket, build
from mmjax.sequence.layout import IMAGE, TEXT, VIDEO, Layout, Piece
from mmjax.tokenizers.resolution import Fixed
from mmjax.tokenizers.video import Pooled
from mmjax.tokenizers.vocab import Vocab

VOCAB = Vocab(pad=0, begin=1, end=2, image=56, video=57, image_newline=56, size=60)
Part = tuple[Piece, np.ndarray | None]  # a piece of the layout, and the patches u8[P, C] of one that has some


def words(n: int, seed: int) -> Part:
    ids = np.random.default_rng(seed).integers(3, 50, n)
    return Piece(TEXT, n, tuple(int(i) for i in ids)), None


def patchify(view: np.ndarray, patch: int) -> np.ndarray:
    """u8[H, W, 3] → u8[P, C] row by row."""
    rows, columns = view.shape[0] // patch, view.shape[1] // patch
    x = view[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch, 3)
    return x.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)


def random_view(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def learnt(n: int, seed: int) -> Part:
    """Words that are learnt: of an encoder–decoder, those of the second stream."""
    piece, nothing = words(n, seed)
    return replace(piece, train=True), nothing


def picture(views: Sequence[np.ndarray], patch: int, slots: tuple[int, ...] | None = None, **more: Any) -> Part:
    """A picture in one or several views, one media token a patch."""
    grids = [(1, v.shape[0] // patch, v.shape[1] // patch) for v in views]
    media = sum(r * c for _, r, c in grids)
    piece = Piece(
        IMAGE,
        media if slots is None else len(slots),
        (),
        grids[0],
        tiles=tuple(grids[1:]),
        slots=slots,
        media=media,
        **more,
    )
    return piece, np.concatenate([patchify(v, patch) for v in views])


def clip(frames: Sequence[np.ndarray], patch: int) -> Part:
    """A video whose frames are pooled (LLaVA-OneVision)."""
    grid = (len(frames), frames[0].shape[0] // patch, frames[0].shape[1] // patch)
    slots, mixes = Pooled(Fixed(patch, *frames[0].shape[:2])).places(grid)
    shows = {"slots": slots, "mixes": mixes, "media": grid[0] * grid[1] * grid[2]}
    return Piece(VIDEO, len(slots), (), grid, **shows), np.concatenate([patchify(f, patch) for f in frames])


def pixels(views: Sequence[np.ndarray], colours: Any) -> np.ndarray:
    """f64[N, 3, H, W], normalised as the reference's processors do it."""
    mean, deviation = np.array(colours)
    return ((np.stack(views) / 255 - mean) / deviation).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class Given:
    """batch: ours. ids, there: the reference's `input_ids` and `attention_mask`, right-padded."""

    batch: Batch
    ids: np.ndarray
    there: np.ndarray

    @property
    def said(self) -> np.ndarray:
        """Where there are logits: of an encoder–decoder, in the second stream."""
        return self.there if self.batch.answer is None else self.batch.answer.order >= 0


def given(
    documents: Sequence[Sequence[Part]],
    values: int,
    cfg: interleave.Config = interleave.PLAIN,
    said: Sequence[np.ndarray | None] | None = None,
    **vocab: int,
) -> Given:
    """A row for each document, with two places more than the longest needs.

    said: of each, what the connector reads beside its pictures (interleave.Example.instruction).
    vocab: ids that are not VOCAB's.
    """
    known = replace(VOCAB, **vocab)
    rows, sizes = [], []
    for i, parts in enumerate(documents):
        layout = Layout.of(str(i), tuple(p for p, _ in parts), cfg.answer > 0)
        example = interleave.interleave(layout, known, cfg)
        example = example if said is None else replace(example, instruction=said[i])
        rows.append([(example, [x for _, x in parts if x is not None])])
        sizes.append(layout.size)
    tokens, patches, images, *_ = np.max(sizes, axis=0)
    bucket = Bucket(len(rows), int(tokens) + 2, int(patches) + 4, int(images) + 1, answers=cfg.answer)
    batch = build(rows, bucket, values, known, cfg)
    ids = np.where(batch.order >= 0, batch.tokens, VOCAB.pad)[:, :tokens]
    return Given(batch, ids, (batch.order >= 0)[:, :tokens])


def compare(
    c: Compare,
    model: torch.nn.Module,
    given: Given,
    call: Callable[[torch.nn.Module], torch.Tensor],
    rewrite: Callable[[Any], Any] = lambda path: path,
    shard: str = "1GB",
) -> huggingface.Model:
    """Logits at every real place, gradients by every parameter, and that the pictures matter.

    Args:
      model: the reference.
      given: the documents.
      call: the reference's logits of them.
      rewrite: changes the directory that the reference wrote, and returns it.
      shard: how large its files may be.
    """
    loaded = huggingface.load(rewrite(saved(model, max_shard_size=shard)))
    assert loaded.of is vlm
    cfg, batch, there = loaded.cfg, given.batch, given.said
    placed = jax.tree.map(jnp.asarray, batch)
    found = invariants.violations(placed, cfg.decoder.vocab, cfg.placeholder, vlm.present(placed, cfg), cfg.newline)
    assert not np.asarray(found).any(), found
    weight = weights_for((*there.shape, cfg.decoder.said)) * there[..., None]

    def loss(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        out = vlm.logits(params, batch, cfg)[:, : there.shape[1]]
        return (out * jnp.asarray(weight, jnp.float32)).sum(), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, out), gradient = run(loaded.params, batch)
    with torch.no_grad():
        single, exact = (call(m).numpy() for m in (model, double(model)))
    c.value("logits", np.asarray(out)[there], single[there], exact[there])
    if batch.grid.any():
        (_, other), _ = run(loaded.params, batch.replace(patches=255 - batch.patches))
        change = np.abs(np.asarray(other - out)).max((1, 2))
        assert (change[batch.grid.any((1, 2))] > 1e-2).all(), change
    slopes = gradient_model(model, lambda m: (call(m) * torch.tensor(weight)).sum())
    c.gradients(gradient, huggingface.load(rewrite(saved(slopes))).params)
    return loaded
