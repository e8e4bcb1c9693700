import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.nn import rope
from mmjax.nn.rope_scaling import Dynamic, Linear, Llama3, LongRope, Proportional, Yarn

SERIES = 100.0 ** -(np.arange(6) / 6)


@pytest.mark.parametrize(
    ("layout", "sections", "axis", "series"),
    [
        ("sections", (3, 2, 1), [0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 5]),
        ("interleaved", (4, 1, 1), [0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 5]),
        ("interleaved", (2, 2, 2), [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]),
        ("alternating", (3, 3), [0, 0, 0, 1, 1, 1], [0, 2, 4, 1, 3, 5]),
    ],
)
def test_every_layout_equals_complex_rotation(rng, layout, sections, axis, series):
    """The tables written out by hand, for both pairings, and with a tail of the head that does not turn."""
    x = rng.normal(size=(2, 5, 3, 14))
    position = rng.integers(0, 50, (2, 5, 3))
    turn = np.exp(1j * position[..., axis] * SERIES[series])[:, :, None]
    for pairs in ("half", "adjacent"):
        cfg = rope.Config(14, sections, 100.0, layout, pairs)
        first, second = (x[..., :6], x[..., 6:12]) if pairs == "half" else (x[..., 0:12:2], x[..., 1:12:2])
        z = (first + 1j * second) * turn
        turned = np.concatenate([z.real, z.imag], -1) if pairs == "half" else np.stack([z.real, z.imag], -1)
        expected = np.concatenate([turned.reshape(2, 5, 3, 12), x[..., 12:]], -1)
        ours = rope.rotate(jnp.asarray(x, jnp.float32), *rope.angles(jnp.asarray(position), cfg), pairs)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_repeated_frequencies_start_anew_for_every_axis():
    cfg = rope.Config(8, (2, 2), 100.0, "repeated")
    np.testing.assert_allclose(rope.frequencies(cfg), [1, 0.1, 1, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(rope.axes(cfg), [0, 0, 1, 1])


@pytest.mark.parametrize("layout", ["sections", "interleaved"])
def test_equal_axes_are_plain_rope(rng, layout):
    """Text has one number three times: M-RoPE must then be RoPE."""
    position = rng.integers(0, 1000, (2, 7, 1))
    three = rope.angles(jnp.asarray(np.repeat(position, 3, -1)), rope.Config(16, (4, 2, 2), layout=layout))
    one = rope.angles(jnp.asarray(position), rope.Config(16, (8,)))
    np.testing.assert_array_equal(three[0], one[0])


def test_scores_depend_on_distance_alone(rng):
    """What rotary embedding is for; with real positions, too."""
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))
    cfg = rope.Config(16, (4, 4), scaling=Yarn(4.0, 64))

    def score(a, b):
        turned = [rope.rotate(x, *rope.angles(jnp.asarray(p)[None, None], cfg)) for x, p in ((q, a), (k, b))]
        return float((turned[0] * turned[1]).sum())

    np.testing.assert_allclose(score([3.5, 9.25], [1.0, 2.0]), score([102.5, 7.25], [100.0, 0.0]), atol=1e-4)


def test_bfloat16_is_turned_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(1, 3, 2, 8)), jnp.bfloat16)
    turn = rope.angles(jnp.array([[[5], [600], [70000]]]), rope.Config(8, (4,)))
    exact = rope.rotate(x.astype(jnp.float32), *turn)
    np.testing.assert_array_equal(rope.rotate(x, *turn), exact.astype(jnp.bfloat16))


SCALINGS = [
    Linear(4.0),
    Dynamic(2.0, 100),
    Yarn(8.0, 4096),
    LongRope((1.0,) * 8, (3.0,) * 8, 100, 32.0),
    Llama3(8.0, 1.0, 4.0, 8192),
    Proportional(0.25, 2.0),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: type(s).__name__)
def test_scalings_against_their_definitions(scaling):
    """In float64, from the papers' formulas."""
    d, theta, length = 16, 1e4, 300
    plain = theta ** -(np.arange(0, d, 2) / d)
    turns = 4096 * plain / (2 * np.pi)
    wavelength = 2 * np.pi / plain
    match scaling:
        case Linear():
            expected = plain / 4
        case Dynamic():
            base = theta * (2 * length / 100 - 1) ** (d / (d - 2))
            expected = base ** -(np.arange(0, d, 2) / d)
        case Yarn():
            # Pairs from the last that turns at least 32 times to the first that turns at most once, as whole numbers.
            low, high = np.floor(np.interp(-32, -turns, np.arange(8))), np.ceil(np.interp(-1, -turns, np.arange(8)))
            ramp = np.clip((np.arange(8) - low) / (high - low), 0, 1)
            expected = plain * (1 - ramp) + plain / 8 * ramp
        case LongRope():
            expected = plain / 3
        case Llama3():
            smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
            expected = (1 - smooth) * plain / 8 + smooth * plain
        case Proportional():
            expected = np.where(np.arange(8) < 2, plain / 2, 0)
    got = rope.frequencies(rope.Config(d, (8,), theta, scaling=scaling), jnp.array([[length]]))
    np.testing.assert_allclose(np.asarray(got).reshape(-1), expected, rtol=2e-6)


@pytest.mark.parametrize("scaling", [SCALINGS[1], SCALINGS[3]], ids=lambda s: type(s).__name__)
def test_scalings_by_length_follow_each_document(scaling):
    """A short and a long document packed into a row are turned as they are alone."""
    cfg = rope.Config(16, (8,), scaling=scaling)
    position = jnp.concatenate([jnp.arange(20), jnp.arange(300)])[None, :, None]
    length = jnp.concatenate([jnp.full(20, 20), jnp.full(300, 300)])[None]
    turn = jax.jit(rope.angles, static_argnums=1)
    together = turn(position, cfg, length)
    for part in (slice(0, 20), slice(20, 320)):
        alone = turn(position[:, part], cfg, length[:, part])
        np.testing.assert_allclose(together[0][:, part], alone[0], atol=1e-6)
    assert not np.allclose(together[0][:, 5], together[0][:, 25])  # the same place in documents of other lengths


def test_attention_factors():
    assert Yarn(8.0, 4096).attention == pytest.approx(0.1 * np.log(8) + 1)
    assert Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=1.0).attention == pytest.approx(
        (0.0707 * np.log(40) + 1) / (0.1 * np.log(40) + 1)
    )
    assert Yarn(8.0, 4096, attention_factor=1.5).attention == 1.5
    long = LongRope((1.0,) * 8, (1.0,) * 8, 4096, 32.0)
    assert long.attention == pytest.approx(np.sqrt(1 + np.log(32) / np.log(4096)))
    cosine, _ = rope.angles(jnp.zeros((1, 1, 1)), rope.Config(16, (8,), scaling=long), jnp.ones((1, 1)))
    np.testing.assert_allclose(cosine, long.attention, rtol=1e-6)


def test_what_is_refused():
    with pytest.raises(InputError, match=r"\(8, 8\) rotate 32 values of a head that has 24; .* 12"):
        rope.Config(24, (8, 8))
    with pytest.raises(InputError, match="'alternating' needs equal sections"):
        rope.Config(16, (4, 2), layout="alternating")
    with pytest.raises(InputError, match="takes no scaling"):
        rope.Config(16, (4, 4), layout="repeated", scaling=Linear(2.0))
    with pytest.raises(InputError, match="Dynamic depends on the document's length"):
        rope.angles(jnp.zeros((1, 2, 1)), rope.Config(16, (8,), scaling=Dynamic(2.0, 10)))
    with pytest.raises(InputError, match="`short` has 3 factors for 8 rotated pairs"):
        rope.frequencies(rope.Config(16, (8,), scaling=LongRope((1.0,) * 3, (1.0,) * 8, 10, 2.0)), jnp.int32(3))
    with pytest.raises(InputError, match=r"give positions of shape \[B, L, 3\]"):
        rope.angles(jnp.zeros((1, 2, 1)), rope.Config(16, (4, 2, 2)))


@pytest.mark.parametrize("layout", ["sections", "interleaved", "alternating", "repeated"])
def test_positions_that_are_constants_under_jit(layout):
    """As positions that are arguments: XLA folds what it knows, and jax 0.7's folded a gather wrongly."""
    cfg = rope.Config(16, (4, 4) if layout in ("alternating", "repeated") else (3, 3, 2), 100.0, layout)
    position = jnp.asarray(np.random.default_rng(0).integers(0, 9, (3, 7, 3)))
    want = jax.jit(lambda p: rope.angles(p, cfg))(position)
    got = jax.jit(lambda: rope.angles(position, cfg))()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
