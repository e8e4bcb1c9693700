"""Adapters as peft lays them out: there and back, the names and shapes of tensors, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_llava
from safetensors.numpy import load_file, save_file
from tiny import randomised

from mmjax.convert import adapter, huggingface
from mmjax.convert.model import Model, Origin
from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.nn import lora

RANK = lora.Config(3, 12.0, dropout=0.125)
Q = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
OUT = "base_model.model.model.language_model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return huggingface.load(tiny_llava.write(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def adapted(plain):
    """The same model with adapters, of which none is zero, and another connector."""
    spec = lora.spec(plain.of.spec(plain.cfg), RANK)
    new = tree.flatten(randomised(spec, 3))
    flat = tree.flatten(spec)
    old = tree.flatten(plain.params)
    params = {name: old.get(name.removesuffix("/base"), new[name]) for name in flat}
    params |= {name: jax.numpy.full(flat[name].shape, 4.0) for name in flat if name.endswith("/kernel/scale")}
    params |= {name: new[name] for name in flat if name.startswith("connector/")}
    return dataclasses.replace(plain, params=tree.unflatten(params))


@pytest.fixture(scope="module")
def written(adapted, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a"
    changed = [name for name in lora.parted(adapted.params)[0] if name.startswith("connector/")]
    adapter.save(path, adapted, base="some/llava", changed=changed, config=RANK)
    return path


@pytest.fixture
def copy(written, tmp_path):
    """A copy of it, with something changed in the config, and in the tensors."""

    def make(said=(), tensors=lambda found: found):
        path = shutil.copytree(written, tmp_path / "copy")
        config = json.loads((path / adapter.CONFIG).read_text()) | dict(said)
        (path / adapter.CONFIG).write_text(json.dumps(config))
        save_file(tensors(load_file(path / adapter.WEIGHTS)), path / adapter.WEIGHTS)
        return path

    return make


def test_there_and_back(plain, adapted, written):
    back = tree.flatten(adapter.load(written, plain).params)
    for name, x in tree.flatten(adapted.params).items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_the_layout_of_tensors(adapted, written):
    """W' x of a torch.nn.Linear [out, in]: what peft adds to W' is our product turned."""
    found = load_file(written / adapter.WEIGHTS)
    assert len(found) == 2 * 7 * 2 + 4
    merged = tree.flatten(lora.merged(adapted.params))
    for name, key, i, inputs in (("q", Q, 1, 1), ("out", OUT, 0, 2)):
        node = lora.parted(adapted.params)[1][f"decoder/blocks/attention/{name}/kernel"]
        a, b = found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"]
        more = np.asarray(merged[f"decoder/blocks/attention/{name}/kernel"][i] - node["base"][i])
        width = int(np.prod(more.shape[:inputs]))
        np.testing.assert_allclose(4.0 * (b @ a).T, more.reshape(width, -1), atol=1e-4)
    said = json.loads((written / adapter.CONFIG).read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 3, 12)
    assert said["lora_dropout"] == 0.125
    assert adapter.config(written) == RANK
    assert said["base_model_name_or_path"] == "some/llava"
    assert said["target_modules"].count(Q.removeprefix(adapter.PREFIX)) == 1


def test_names_of_files_are_read_as_well(plain, adapted, copy):
    path = copy(
        tensors=lambda found: {
            k.replace("model.model.language_model.", "model.language_model.model."): x for k, x in found.items()
        }
    )
    back = tree.flatten(adapter.load(path, plain).params)
    for name, x in tree.flatten(adapted.params).items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_layers_that_are_not_adapted_add_nothing(plain, copy):
    path = copy(tensors=lambda found: {k: x for k, x in found.items() if ".layers.0." not in k})
    node = lora.parted(adapter.load(path, plain).params)[1]["decoder/blocks/mlp/up/kernel"]
    assert not node["b"][0].any()
    assert node["b"][1].any()


def test_rslora_scales_by_the_root(plain, copy):
    node = lora.parted(adapter.load(copy({"use_rslora": True}), plain).params)[1]["decoder/blocks/mlp/up/kernel"]
    np.testing.assert_allclose(node["scale"], 12 / 3**0.5)


def wider(found):
    return found | {f"{Q}.lora_A.weight": np.zeros((3, 17), np.float32)}


def stranger(found):
    return found | {f"{Q[:-6]}r_proj.lora_A.weight": np.zeros((3, 16), np.float32)}


def half(found):
    return {k: x for k, x in found.items() if not k.endswith("linear_1.weight")} | {
        "base_model.model.model.language_model.layers.0.input_layernorm.weight": np.ones(16, np.float32)
    }


@pytest.mark.parametrize(
    ("said", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, None, "peft_type 'IA3', and only LORA"),
        ({"use_dora": True}, None, "use_dora is True, which is not computed here"),
        ({"rank_pattern": {"q_proj": 2}}, None, "rank_pattern"),
        ({"bias": "all"}, None, "bias is 'all'"),
        ({"r": 0}, None, "r is 0 and lora_alpha 12"),
        ({"r": 2}, None, r"is \[3, 16\].*this model has \[2, 16\]"),
        ({"lora_alpha": "x"}, None, "numbers above 0"),
        ({"lora_dropout": 1.0}, None, r"lora_dropout is 1\.0, which is no share below 1"),
        ({"lora_dropout": "x"}, None, "lora_dropout is 'x', which is no share below 1"),
        ({}, wider, r"lora_A.weight in .* is \[3, 17\]"),
        ({}, stranger, r"1 tensors that are not this model's, as .*r_proj"),
        ({}, half, "layers.0.input_layernorm.weight whole, but not all"),
    ],
)
def test_refused(plain, copy, said, tensors, message):
    path = copy(said, tensors) if tensors else copy(said)
    with pytest.raises(InputError, match=message):
        adapter.load(path, plain)


def test_files_that_are_not_there(plain, written, tmp_path):
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        adapter.load(tmp_path, plain)
    shutil.copy(written / adapter.CONFIG, tmp_path)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
        adapter.load(tmp_path, plain)


def tied(plain):
    config = {**plain.origin.raw, "tie_word_embeddings": True}
    config["text_config"] = {**config["text_config"], "tie_word_embeddings": True}
    origin = Origin.of(config)
    return Model(plain.of, origin.found.cfg, {}, origin)


def test_what_peft_has_no_layout_for(plain, adapted, tmp_path):
    with pytest.raises(InputError, match="No kernel of this model is adapted"):
        adapter.save(tmp_path / "x", plain, base="b")
    with pytest.raises(InputError, match="mlp/up/kernel is trained beside its adapter"):
        adapter.save(tmp_path / "x", adapted, base="b", changed=["decoder/blocks/mlp/up/kernel"])
    with pytest.raises(InputError, match="class_embedding is trained, a parameter of no layer of its own"):
        adapter.save(tmp_path / "x", adapted, base="b", changed=["vision/class"])
    kernels = lora.parted(adapted.params)[1]
    adapter.refuse(plain, kernels, ["decoder/embed"])
    with pytest.raises(InputError, match="decoder/embed is trained, which the head is tied to"):
        adapter.refuse(tied(plain), kernels, ["decoder/embed"])
    assert not (tmp_path / "x").exists()
