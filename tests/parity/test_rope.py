"""Rotary tables and rotations against transformers."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.pixtral import modeling_pixtral
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from mmjax.nn import rope
from mmjax.nn.rope_scaling import Dynamic, Linear, Llama3, LongRope, Proportional, Yarn

FAR = np.array([0, 1, 17, 4095, 32_768, 99_999, 131_071, 131_072])


def ulps(a, b):
    a, b = (np.ascontiguousarray(x, np.float32).view(np.int32).astype(np.int64) for x in (a, b))
    return np.abs(a - b).max()


def theirs(kind, head, theta, length=None, **parameters):
    cfg = transformers.LlamaConfig(
        hidden_size=4 * head,
        num_attention_heads=4,
        head_dim=head,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )
    table, factor = ROPE_INIT_FUNCTIONS[kind](cfg, "cpu", seq_len=length)
    return table.numpy(), factor


def variants(head):
    n = head // 2
    short, long = [1 + 0.01 * i for i in range(n)], [1 + 0.37 * i for i in range(n)]
    longrope = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 4096, "factor": 32.0}
    ours = LongRope(tuple(short), tuple(long), 4096, 32.0)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    yarn = {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.0}
    return {
        "linear": (Linear(4.0), {"factor": 4.0}, None),
        "yarn": (Yarn(8.0, 4096), {"factor": 8.0, "original_max_position_embeddings": 4096}, None),
        "yarn, not truncated": (
            Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=1.0, truncate=False),
            {**yarn, "truncate": False},
            None,
        ),
        "llama3": (Llama3(8.0, 1.0, 4.0, 8192), {"factor": 8.0, **llama3}, None),
        "proportional": (Proportional(0.25, 2.0), {"factor": 2.0, "partial_rotary_factor": 0.25}, None),
        "longrope, short": (ours, longrope, 4096),
        "longrope, long": (ours, longrope, 4097),
        "dynamic, as trained": (Dynamic(4.0, 4096), {"factor": 4.0}, 100),
        "dynamic, longer": (Dynamic(4.0, 4096), {"factor": 4.0}, 20_000),
        "dynamic, longest": (Dynamic(2.0, 4096), {"factor": 2.0}, 131_072),
    }


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("variant", variants(64))
def test_scaled_tables(variant, head, theta):
    scaling, parameters, length = variants(head)[variant]
    expected, factor = theirs(variant.split(",")[0], head, theta, length, **parameters)
    cfg = rope.Config(head, (head // 2,), theta, scaling=scaling)
    table = rope.frequencies(cfg, None if length is None else jnp.int32(length))
    # Four for a base that depends on data: the device takes that power, in float32.
    assert ulps(table, expected) <= (4 if variant in ("dynamic, longer", "dynamic, longest") else 2)
    assert scaling.attention == pytest.approx(factor, rel=1e-7)
    if length is not None and not isinstance(scaling, LongRope):
        return
    # Given the table, the cosines and sines at positions up to 131,072.
    cosine, sine = rope.angles(
        jnp.asarray(FAR)[None, :, None], cfg, None if length is None else jnp.full((1, len(FAR)), length)
    )
    angle = torch.tensor(FAR).float()[:, None] * torch.tensor(np.asarray(table))
    np.testing.assert_allclose(cosine[0], angle.cos().numpy() * factor, atol=1e-6)
    np.testing.assert_allclose(sine[0], angle.sin().numpy() * factor, atol=1e-6)


def far(rng, shape):
    return rng.choice(FAR, shape)


def test_plain_and_partial_rotation(rng):
    """Llama's own rotation, of a whole head and of its first half."""
    q = rng.normal(size=(2, 4, 7, 32)).astype(np.float32)
    position = far(rng, (2, 7))
    for rotated in (32, 16):
        cfg = transformers.LlamaConfig(hidden_size=128, num_attention_heads=4, head_dim=rotated)
        cosine, sine = modeling_llama.LlamaRotaryEmbedding(cfg)(torch.tensor(q), torch.tensor(position))
        turned, _ = modeling_llama.apply_rotary_pos_emb(
            torch.tensor(q[..., :rotated]), torch.tensor(q[..., :rotated]), cosine, sine
        )
        expected = np.concatenate([turned.numpy(), q[..., rotated:]], -1).transpose(0, 2, 1, 3)
        ours = rope.Config(32, (rotated // 2,), cfg.rope_parameters["rope_theta"])
        got = rope.rotate(jnp.asarray(q.transpose(0, 2, 1, 3)), *rope.angles(jnp.asarray(position)[..., None], ours))
        np.testing.assert_allclose(got, expected, atol=3e-6)


@pytest.mark.parametrize(
    ("rotary", "config", "layout"),
    [
        (modeling_qwen2_vl.Qwen2VLRotaryEmbedding, transformers.Qwen2VLTextConfig, "sections"),
        (modeling_qwen3_vl.Qwen3VLTextRotaryEmbedding, transformers.Qwen3VLTextConfig, "interleaved"),
    ],
)
def test_multimodal_tables(rng, rotary, config, layout):
    sections = (16, 24, 24) if layout == "sections" else (24, 20, 20)
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    cfg = config(hidden_size=512, num_attention_heads=4, rope_parameters=parameters)
    cfg.head_dim = 128
    position = far(rng, (3, 2, 9))
    model, ours = rotary(cfg), rope.Config(128, sections, 1e6, layout)
    table = rope.frequencies(ours)
    assert ulps(table, model.inv_freq.numpy()) <= 2
    model.inv_freq.copy_(torch.tensor(table))  # given the table
    cosine, sine = model(torch.zeros(1), torch.tensor(position))
    got = rope.angles(jnp.asarray(position.transpose(1, 2, 0)), ours)
    np.testing.assert_allclose(got[0], cosine.numpy()[..., :64], atol=1e-6)
    np.testing.assert_allclose(got[1], sine.numpy()[..., :64], atol=1e-6)


def test_pixtral(rng):
    cfg = types.SimpleNamespace(
        rope_parameters={"rope_type": "axial", "rope_theta": 1e4}, head_dim=64, hidden_size=256, num_attention_heads=4
    )
    position = rng.integers(0, 64, (11, 2))
    try:
        cosine, _ = modeling_pixtral.PixtralVisionRotaryEmbedding(cfg)(torch.zeros(1), torch.tensor(position))
    except IndexError:  # it takes a leading axis
        cosine, _ = modeling_pixtral.PixtralVisionRotaryEmbedding(cfg)(torch.zeros(1), torch.tensor(position)[None])
    got, _ = rope.angles(jnp.asarray(position)[None], rope.Config(64, (16, 16), 1e4, "alternating"))
    np.testing.assert_allclose(got[0], cosine.numpy().reshape(11, 64)[:, :32], atol=1e-6)
