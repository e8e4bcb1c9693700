"""The whole way, document to batch, over random documents: nothing is lost, moved, doubled or seen by a neighbour."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import InputError
from mmjax.sequence import batch as batches
from mmjax.sequence import invariants
from mmjax.sequence.batch import Bucket, Values
from mmjax.sequence.document import Audio, Document, Image, Text, Video
from mmjax.sequence.interleave import Config, interleave
from mmjax.sequence.layout import AUDIO, EMPTY, IMAGE, TEXT, VIDEO, layout
from mmjax.sequence.pack import pack_shapes
from mmjax.sequence.positions import MRope, mrope_ids
from mmjax.tokenizers.audio import Frames
from mmjax.tokenizers.resolution import NaFlex, Native
from mmjax.tokenizers.tiles import AnyRes
from mmjax.tokenizers.video import Sampled
from mmjax.tokenizers.vocab import Vocab

VOCAB = Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=300, image_newline=9)
VALUES = Values(3, 2)


class Bytes:
    """Ids that give the text back."""

    vocab = VOCAB

    def encode(self, text):
        return [10 + b for b in text.encode()]

    @staticmethod
    def decode(ids):
        return bytes(i - 10 for i in ids).decode()


ROLES = st.sampled_from(["system", "user", "assistant"])
SIDES = st.integers(1, 40)
SPANS = st.one_of(
    st.builds(Text, st.text(max_size=6), ROLES, st.booleans()),
    st.builds(lambda h, w, role: Image(h, w, b"", role), SIDES, SIDES, ROLES),
    st.builds(lambda n, h, w, role: Video(n, h, w, 2.0, lambda: None, role), st.integers(1, 9), SIDES, SIDES, ROLES),
    st.builds(lambda n, role: Audio(n, 10, lambda: None, role), st.integers(1, 12), ROLES),
)
DOCUMENTS = st.lists(st.lists(SPANS, min_size=1, max_size=6), min_size=1, max_size=5)
MERGED = lambda g: g[0] * g[1] * g[2] // 4  # noqa: E731
POLICIES = {
    "native": (Native(1, 2, 16, 64, 1000.0), Config(merge=2, rope=MRope(2)), MERGED),
    "windows": (
        Native(1, 2, 16, 64, 1000.0),
        Config(merge=2, window=2, rope=MRope(2)),
        lambda g: g[0] * g[1] * g[2] // 4,
    ),
    "naflex": (NaFlex(1, 12), Config(see="bidirectional_images"), lambda g: g[0] * g[1] * g[2]),
    "any-res": (AnyRes(1, 2), Config(position="sequential", see="prefix"), lambda g: g[0] * g[1] * g[2]),
    "resampled": (NaFlex(1, 12), Config(position="sequential"), lambda g: 3),
    "aside": (NaFlex(1, 12), Config(cross="last_image"), lambda g: 3),
}


def present(name, batch):
    """Which media tokens exist, worked out from the grids alone."""
    if name in ("resampled", "aside"):
        return np.repeat(batch.grid.prod(-1) > 0, 3, axis=1)
    if name in ("native", "windows"):
        return batch.patch_order[:, ::4] >= 0
    return None


def pixels(x, piece, salt):
    """Patches that are all different."""
    n = sum(int(np.prod(v)) for v in piece.views)
    if piece.modality == AUDIO:
        return np.full((piece.grid[0], 2), salt, np.float32)
    return np.stack([np.arange(n) % 256, np.arange(n) // 256, np.full(n, salt)], 1).astype(np.uint8)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(DOCUMENTS)
def test_every_document_arrives_whole(name, given):
    resolution, cfg, connector = POLICIES[name]
    clips = Sampled(resolution if name != "any-res" else NaFlex(1, 4), most=3)
    lay = functools.partial(
        layout,
        tokenizer=Bytes(),
        resolution=resolution,
        media_tokens=connector,
        clips=clips,
        sounds=Frames(10, 2),
        fuse="cross" if name == "aside" else "sequence",
    )
    documents = [Document(f"d{i}", tuple(spans)) for i, spans in enumerate(given)]
    laid = [lay(d) for d in documents]
    sizes = np.array([x.size for x in laid])
    shape = np.maximum(sizes.max(0), [240, 240, 24, 40, 0])  # mostly one shape: compiling is what it costs
    shape[1] += -shape[1] % 4
    packed, left = pack_shapes(sizes, [tuple(shape.tolist())])
    assert not left
    rows = []
    for _, row in packed:
        media = [[pixels(None, p, 10 * i + k) for k, p in enumerate(laid[i].pieces) if p.grid] for i in row]
        rows.append([(interleave(laid[i], VOCAB, cfg), m) for i, m in zip(row, media, strict=True)])
    bucket = Bucket(5, *map(int, shape))
    batch = batches.build(rows, bucket, VALUES, VOCAB, cfg)
    exists = present(name, batch)
    invariants.check(batch, VOCAB, media=exists)
    for r, (_, row) in enumerate(packed):
        assert (batch.modality[r] != EMPTY).sum() == sizes[row, 0].sum()
        assert (batch.patch_order[r] >= 0).sum() == sizes[row, 1].sum()
        assert (batch.frame_order[r] >= 0).sum() == sizes[row, 3].sum()
        for d, i in enumerate(row):
            _document_is_whole(batch, r, d, documents[i], laid[i], name)
            if cfg.position == "mrope" and name != "aside":
                alone = interleave(laid[i], VOCAB, cfg).position
                np.testing.assert_array_equal(batch.position[r, batch.document[r] == d], alone)
    if cfg.position == "mrope" and name != "aside":
        slot = np.where(batch.modality == AUDIO, -1, batch.slot)
        interval = np.ones(batch.grid.shape[:2], np.float32)
        found = mrope_ids(
            *map(jnp.asarray, (batch.document, slot, batch.grid)), cfg.rope, interval=jnp.asarray(interval)
        )
        np.testing.assert_array_equal(found, batch.position)


def _document_is_whole(batch, r, d, document, laid, name):
    here = np.flatnonzero(batch.document[r] == d)
    tokens, modality = batch.tokens[r, here], batch.modality[r, here]
    # Text comes back, span by span, and roles' marks and media stand between as they were given.
    at = 0
    for piece in laid.pieces:
        part = slice(at, at + piece.length)
        at += piece.length
        if piece.modality == TEXT:
            assert tuple(tokens[part]) == piece.ids
            assert (batch.slot[r, here[part]] == -1).all()
            if piece.span >= 0:
                assert Bytes.decode(tokens[part]) == document.spans[piece.span].text
        elif piece.modality == AUDIO:
            assert (
                batch.frames[r, batch.slot[r, here[part]]] == batch.frames[r, batch.slot[r, here[part][0]]][0]
            ).all()
        elif name in ("naflex", "native", "windows", "any-res") and piece.length:
            slots = batch.slot[r, here[part]]
            shown = slots >= 0
            assert (tokens[part][shown] == VOCAB.image).all()
            assert (tokens[part][~shown] == VOCAB.image_newline).all()
            merge = 4 if name in ("native", "windows") else 1
            first = batch.patches[r, slots[shown] * merge].astype(int)
            assert len({tuple(p) for p in first}) == shown.sum()  # each another patch of one picture
            assert len(set(first[:, 2])) == 1
    assert at == len(here)
    kinds = {Text: TEXT, Image: IMAGE, Video: VIDEO, Audio: AUDIO}
    if name != "aside":
        order = [kinds[type(s)] for s in document.spans if not isinstance(s, Text)]
        runs = [m for m, before in zip(modality, [TEXT, *modality[:-1]], strict=True) if m != TEXT and before == TEXT]
        assert runs == order
    # Nothing but trained text is learnt.
    learnt = np.flatnonzero(batch.weight[r, here])
    assert (modality[learnt + 1] == TEXT).all()
    np.testing.assert_array_equal(batch.target[r, here[learnt]], tokens[learnt + 1])
    expected = sum(p.length for p in laid.pieces if p.train)
    assert len(learnt) == expected
    low, high = here[0], here[-1]
    assert (batch.lo[r, here] >= low).all()
    assert (batch.hi[r, here] <= high).all()


def test_device_and_host_count_alike_whatever_is_broken(rng):
    """Random damage to any field: both sides give the same numbers."""
    lay = functools.partial(layout, tokenizer=Bytes(), resolution=NaFlex(1, 12))
    documents = [Document(f"d{i}", (Image(3, 4, b""), Text("abc"), Image(2, 9, b""), Text("de"))) for i in range(2)]
    rows = [[(interleave(x, VOCAB), [pixels(None, p, 0) for p in x.pieces if p.grid]) for x in map(lay, documents)]]
    whole = batches.build(rows, Bucket(2, 90, 50, 5), 3, VOCAB)
    count = jax.jit(functools.partial(invariants.violations, vocab_size=300, placeholder=VOCAB.image))
    caught = 0
    for _ in range(300):
        batch = jax.tree.map(np.copy, whole)
        field = str(rng.choice(["tokens", "slot", "order", "lo", "hi", "modality", "target", "patch_lo", "patch_kind"]))
        array = getattr(batch, field)
        array[0, rng.integers(array.shape[1])] = rng.integers(-2, 60)
        found = np.array(count(jax.tree.map(jnp.asarray, batch)))
        np.testing.assert_array_equal(
            invariants._count(batch, 300, VOCAB.image, None, invariants._Host), found, err_msg=field
        )
        if found.any():
            caught += 1
            with pytest.raises(InputError):
                invariants.check(batch, VOCAB)
        else:
            invariants.check(batch, VOCAB)
    assert caught > 150
