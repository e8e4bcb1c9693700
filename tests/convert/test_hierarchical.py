"""The tables of Swin and PVT: there and back, what is dropped, what is refused."""

import numpy as np
import pytest
from tiny import randomised

from mmjax.convert import rules
from mmjax.convert.families import pvt, swin
from mmjax.core import tree
from mmjax.core.errors import InputError

SWIN = {"model_type": "swin", "embed_dim": 4, "depths": [1, 2], "num_heads": [1, 2], "window_size": 3, "image_size": 16}
LISTS = {"depths": [1, 2], "hidden_sizes": [4, 8], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
PVT = {"model_type": "pvt", **LISTS, "patch_sizes": [4, 2], "strides": [4, 2], "sequence_reduction_ratios": [2, 1]}
PVT |= {"num_encoder_blocks": 2, "image_size": 32, "num_labels": 7, "id2label": None}
V2 = {"model_type": "pvt_v2", **LISTS, "patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1]}
V2 |= {"num_encoder_blocks": 2, "id2label": {"0": "a", "1": "b", "2": "c"}}


@pytest.mark.parametrize(
    ("read", "config", "keys", "prefix"),
    [
        (swin.read, SWIN, {"swin.embeddings.norm.bias", "classifier.weight"}, "swin."),
        (swin.read, SWIN | {"use_absolute_embeddings": True, "qkv_bias": False}, set(), ""),
        (swin.read, SWIN, {"hidden_states_norms.stem.bias", "hidden_states_norms.stage2.bias"}, ""),
        (pvt.read, PVT, {"pvt.encoder.layer_norm.bias", "classifier.weight"}, "pvt."),
        (pvt.read, V2, {"pvt_v2.encoder.layers.0.layer_norm.bias", "classifier.weight"}, "pvt_v2."),
        (pvt.read, V2 | {"linear_attention": True}, set(), ""),
    ],
)
def test_there_and_back(read, config, keys, prefix):
    found = read(config, frozenset(keys))
    spec = found.of.spec(found.cfg)
    params = randomised(spec)
    arrays = rules.save(spec, found.rules, params)
    assert keys <= set(arrays)
    assert any(key.startswith(f"{prefix}encoder.") for key in arrays)
    # What older files hold besides.
    if config["model_type"] == "swin":
        arrays[f"{prefix}encoder.layers.0.blocks.0.attention.self.relative_position_index"] = np.zeros((9, 9), np.int64)
    again = tree.flatten(rules.load(spec, found.rules, rules.Arrays(arrays), drop=found.dropped))
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_what_configs_say():
    backbone = swin.read(SWIN, frozenset({"hidden_states_norms.stage1.bias"}))
    assert (backbone.cfg.map_norms, backbone.cfg.always_shift, backbone.cfg.final_norm) == ((1,), True, False)
    assert swin.read(SWIN, frozenset({"classifier.weight"})).cfg.classes == 2
    assert pvt.read(PVT, frozenset({"classifier.weight"})).cfg.classes == 7
    assert pvt.read(V2, frozenset({"classifier.weight"})).cfg.classes == 3
    assert pvt.read(V2, frozenset()).cfg.classes is None


@pytest.mark.parametrize(
    ("read", "config", "words"),
    [
        (swin.read, SWIN | {"hidden_act": "mish"}, "mish"),
        (swin.read, SWIN | {"patch_size": [4, 2]}, "patch_size"),
        (pvt.read, PVT | {"strides": [4, 3]}, "strides"),
        (pvt.read, V2 | {"hidden_act": "mish"}, "mish"),
    ],
)
def test_refusals(read, config, words):
    with pytest.raises(InputError, match=words):
        read(config, frozenset())
