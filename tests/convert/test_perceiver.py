"""What config.json files of Perceivers become: published sizes, defaults, refusals."""

import pytest

from mmjax.connectors import perceiver, perceiver_io
from mmjax.convert.families import perceiver as tables
from mmjax.convert.rules import plan
from mmjax.core import spec as specs
from mmjax.core.errors import InputError

LANGUAGE = {
    "architectures": ["PerceiverForMaskedLM"],
    "model_type": "perceiver",
    "num_latents": 256,
    "d_latents": 1280,
    "d_model": 768,
    "num_blocks": 1,
    "num_self_attends_per_block": 26,
    "qk_channels": 256,
    "v_channels": 1280,
}
PICTURES = {
    "architectures": ["PerceiverForImageClassificationFourier"],
    "model_type": "perceiver",
    "num_latents": 512,
    "d_latents": 1024,
    "d_model": 261,
    "num_blocks": 8,
    "num_self_attends_per_block": 6,
    "num_cross_attention_heads": 1,
    "id2label": {str(i): str(i) for i in range(1000)},
}


@pytest.mark.parametrize(("config", "millions"), [(LANGUAGE, 201.1), (PICTURES, 48.4)], ids=["language", "pictures"])
def test_published_sizes(config, millions):
    """Jaegle et al. 2021 give 201 and 48.4 million parameters."""
    found = tables.read(config, frozenset())
    spec = perceiver_io.spec(found.cfg)
    assert round(specs.count(spec) / 1e6, 1) == millions
    plan(spec, found.rules)  # raises where the table does not fit the spec


@pytest.mark.parametrize(
    ("config", "change", "says"),
    [
        (LANGUAGE, {"architectures": ["PerceiverForOpticalFlow"]}, "PerceiverForOpticalFlow.*mmjax reads"),
        (LANGUAGE, {"architectures": None}, "architecture None"),
        (LANGUAGE, {"cross_attention_shape_for_attention": "v"}, "it must be 'kv' or 'q'"),
        (LANGUAGE, {"v_channels": 256}, "values of 256, but latents of 1280"),
        (LANGUAGE, {"num_self_attention_heads": 7}, "do not divide into 7 heads"),
        (LANGUAGE, {"hidden_act": "mish"}, "'mish'"),
        (LANGUAGE, {"d_latents": -1}, "d_latents.*no size"),
        (PICTURES, {"num_cross_attention_heads": 8}, "do not divide into 8 heads"),
    ],
)
def test_refusals(config, change, says):
    with pytest.raises(InputError, match=says):
        tables.read(config | change, frozenset())


def test_resamplers_of_published_configs():
    """idefics-9b-instruct and idefics2-8b, as far as their files say what transformers does not assume anyway."""
    own = {"qk_layer_norms_perceiver": True, "use_resampler": True}
    first = tables.idefics_config(
        {"use_resampler": True, "vision_config": {"embed_dim": 1280}, "perceiver_config": own}
    )
    assert first == perceiver.Config(1280, 1280, 64, 6, 16, 96, 5120, qk_norm=True, activation="relu")
    plan(perceiver.spec(first), tables.idefics(first))
    second = tables.idefics2_config({"vision_config": {"hidden_size": 1152}, "text_config": {}, "perceiver_config": {}})
    assert (second.inputs, second.width, second.kv_heads, second.projection.hidden) == (1152, 4096, 4, 14336)
    plan(perceiver.spec(second), tables.idefics2(second))
    with pytest.raises(InputError, match="no resampler"):
        tables.idefics_config({"vision_config": {"embed_dim": 1280}})
    with pytest.raises(InputError, match="'mish'"):
        tables.idefics2_config({"perceiver_config": {"hidden_act": "mish"}})
