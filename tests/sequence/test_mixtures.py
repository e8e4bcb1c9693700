"""Places that show mixtures of media tokens, and the ends of a picture's rows: from the policy to the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised, tiny_model

from mmjax.core.errors import InputError
from mmjax.models import vlm
from mmjax.sequence import invariants
from mmjax.sequence.batch import Bucket, build
from mmjax.sequence.interleave import Config, interleave
from mmjax.sequence.layout import IMAGE, TEXT, VIDEO, Layout, Piece
from mmjax.tokenizers.mix import shrunk
from mmjax.tokenizers.resolution import Fixed
from mmjax.tokenizers.tiles import AnyRes
from mmjax.tokenizers.video import Pooled
from mmjax.tokenizers.vocab import Vocab

PICTURE, FILM = 6, 9
VOCAB = Vocab(0, 1, 2, image=PICTURE, video=FILM, image_newline=PICTURE, size=30)
CFG = Config(position="sequential", mixes=True)
VALUES = 4 * 4 * 3


def test_a_map_halved_is_means_of_pairs():
    slots, mixes = shrunk(tuple(tuple(range(4 * y, 4 * y + 4)) for y in range(4)), 2, 2)
    assert slots == [[0, 2], [8, 10]]
    assert mixes[0][0] == ((1, 4, 5), (0.25,) * 4)


def test_a_map_of_its_own_size_is_itself():
    slots, mixes = shrunk(((0, 1, 2), (3, 4, 5)), 2, 3)
    assert slots == [[0, 1, 2], [3, 4, 5]]
    assert {mix.shares for row in mixes for mix in row} == {(1.0, 0.0, 0.0, 0.0)}


def test_any_res_resizes_what_is_larger_than_so_many_tiles():
    policy = AnyRes(4, 12, ((1, 1), (2, 2), (3, 3)), most=4)
    small, large = policy.picture(24, 24), policy.picture(36, 36)
    assert small.mixes is None
    # 9 × 9 patches of 9 tiles, of which 4 tiles have 36: 9 // 1.5 rows.
    assert len(large.slots) == len(large.mixes) == 9 + 6 * 7
    assert [n for n, mix in enumerate(large.mixes) if mix is None] == [*range(9), *range(15, 51, 7)]
    assert max(i for mix in large.mixes if mix for i in mix.others) == 10 * 9 - 1


def picture(rows: int, columns: int, slots: tuple[int, ...] | None = None) -> Piece:
    length = rows * columns if slots is None else len(slots)
    return Piece(IMAGE, length, (), (1, rows, columns), slots=slots, media=rows * columns)


def film(*grid: int) -> Piece:
    slots, mixes = Pooled(Fixed(4, 12, 12)).places(grid)
    return Piece(VIDEO, len(slots), (), grid, slots=slots, mixes=mixes, media=grid[0] * grid[1] * grid[2])


def example(name: str, *pieces: Piece, cfg: Config = CFG):
    text = Piece(TEXT, 2, (20, 21))
    return interleave(Layout.of(name, (text, *pieces, text)), VOCAB, cfg)


def test_the_ends_of_rows_carry_the_mediums_own_id():
    x = example("d", picture(2, 2, (0, 1, -1, 2, 3, -1)), film(2, 2, 2))
    np.testing.assert_array_equal(x.tokens[2:-2], [PICTURE] * 6 + [FILM] * 3)
    np.testing.assert_array_equal(x.slot[2:-2], [0, 1, -1, 2, 3, -1, 4, 8, -1])
    np.testing.assert_array_equal(x.mix_slot[8], [5, 6, 7])
    np.testing.assert_array_equal(x.mix_share[[2, 8]], [[1, 0, 0, 0], [0.25] * 4])
    own = interleave(Layout.of("d", (film(1, 2, 2),)), dataclasses.replace(VOCAB, image_newline=10), CFG)
    np.testing.assert_array_equal(own.tokens, [FILM, 10])


def test_mixtures_without_the_setting_are_refused():
    with pytest.raises(InputError, match=r"set sequence\.mixes"):
        example("d", film(1, 2, 2), cfg=Config(position="sequential"))


def documents():
    rng = np.random.default_rng(0)
    found = [
        example("mixed", film(3, 3, 3)),
        example("rows", picture(2, 3, (0, 1, 2, -1, 3, 4, 5, -1)), picture(1, 2)),
        example("words"),
    ]
    return [(x, [rng.integers(0, 256, (int(np.prod(g)), VALUES), dtype=np.uint8) for g in x.grid]) for x in found]


def test_packed_equals_alone_and_rows_end_with_the_learnt_vector():
    model = dataclasses.replace(tiny_model(vocab=30), placeholder=(PICTURE, FILM), newline=True)
    params = randomised(vlm.spec(model))
    run = jax.jit(lambda p, b: (vlm.logits(p, b, model), invariants.violations(b, 30, model.placeholder, None, True)))
    bucket = Bucket(1, 40, 40, 4)
    given = documents()
    packed = build([given], bucket, VALUES, VOCAB, CFG)
    invariants.check(packed, VOCAB)
    together, wrong = run(params, packed)
    assert not np.any(wrong)
    for number, document in enumerate(given):
        alone, _ = run(params, build([[document]], bucket, VALUES, VOCAB, CFG))
        mine = np.asarray(together)[0, packed.document[0] == number]
        np.testing.assert_allclose(mine, np.asarray(alone)[0, : len(mine)], atol=1e-5)
    ends = (packed.slot[0] < 0) & (packed.modality[0] >= IMAGE)
    assert ends.sum() == 3
    changed, _ = run(params | {"newline": params["newline"] + 1}, packed)
    moved = np.abs(np.asarray(changed - together))[0].max(-1) > 1e-4
    first = {d: np.flatnonzero(ends & (packed.document[0] == d))[0] for d in (0, 1)}
    at = np.arange(40)
    np.testing.assert_array_equal(
        moved, [packed.document[0, i] in first and i >= first[packed.document[0, i]] for i in at]
    )


def test_a_mixture_of_tokens_that_do_not_exist_is_counted():
    batch = jax.tree.map(jnp.asarray, build([documents()], Bucket(1, 40, 40, 4), VALUES, VOCAB, CFG))
    wrong = np.array(batch.mix_slot)
    wrong[0, np.flatnonzero(batch.mix_slot[0, :, 2] >= 0)[0], 2] = 39
    broken = batch.replace(mix_slot=jnp.asarray(wrong))
    found = np.asarray(invariants.violations(broken, 30, (PICTURE, FILM), None, True))
    assert found[0, invariants.KINDS.index("places of media tokens that do not exist")] == 1
    # And without the model's own vector, an end of a row is a placeholder that shows nothing.
    found = np.asarray(invariants.violations(batch, 30, (PICTURE, FILM)))
    assert found[0, 1] == 3
