"""What the README says, tried out."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny_llava
from PIL import Image
from tiny import randomised

from mmjax.convert import huggingface
from mmjax.convert.families import siglip

README = (Path(__file__).parents[1] / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out.strip()


def test_the_first_example_runs_and_prints_what_it_says(capsys):
    assert len(EXAMPLES[0].splitlines()) <= 17
    assert run(EXAMPLES[0], capsys) == re.search(r"# (\(.*\))$", EXAMPLES[0].strip())[1]


def test_the_sequence_engine_stands_alone(capsys):
    """Documents of 17, 43, 69 and 95 tokens: the two longest cannot share a row."""
    assert len(EXAMPLES[1].splitlines()) < 30
    shape, longest = run(EXAMPLES[1], capsys).rsplit("[", 1)
    assert shape.strip() == "(2, 72, 588)"
    assert sorted(map(int, longest.strip("]").split())) == [69, 95]


def test_weights_in_and_out(capsys, tmp_path, monkeypatch):
    """A tiny directory under the name the README has."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "siglip_vision_model", "patch_size": 4, "image_size": 8, **sizes}
    keys = frozenset({"vision_model.embeddings.patch_embedding.bias"})
    found = siglip.read(config, keys)
    params = randomised(found.of.spec(found.cfg))
    made = huggingface.Model(found.of, found.cfg, params, huggingface.Origin.of(config))
    huggingface.save("siglip-so400m-patch14-384", made)
    at = {
        "image": jnp.array([[0, 0, 0, 1]]),
        "grid": jnp.array([[[1, 1, 3], [1, 1, 1]]]),
        "patches": jnp.ones((1, 4, 48)),
        "see": {
            "order": jnp.arange(4)[None],
            "lo": jnp.array([[0, 0, 0, 3]]),
            "hi": jnp.array([[2, 2, 2, 3]]),
            "position": jnp.array([[[0, 0], [0, 1], [0, 2], [0, 0]]]),
        },
    }
    exec(compile(EXAMPLES[2], "README.md", "exec"), at)
    assert capsys.readouterr().out.strip() == "(1, 2, 8) (2, 1, 4, 8)"
    for name in ("config.json", "model.safetensors"):
        assert Path("elsewhere", name).read_bytes() == Path("siglip-so400m-patch14-384", name).read_bytes()


def test_whole_models_talk(capsys, tmp_path, monkeypatch):
    """A tiny directory under the name the README has."""
    monkeypatch.chdir(tmp_path)
    tiny_llava.write(tmp_path / "llava-1.5-7b-hf")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save("cat.jpg")
    *said, reasons = run(EXAMPLES[3], capsys).splitlines()
    assert said
    assert re.fullmatch(r"\[\('(length|stop|end)', \d+\), \('(length|stop|end)', \d+\)\]", reasons)


def test_a_module_inside_somebodys_model(capsys):
    assert run(EXAMPLES[4], capsys) == re.search(r"# (\(.*\))$", EXAMPLES[4].strip())[1]


def test_parts_of_two_directories_become_a_third(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 30, **tiny, "hidden_size": 12, "num_attention_heads": 3}
    speaks = {"model_type": "opt", "vocab_size": 40, "ffn_dim": 12, "word_embed_proj_dim": 8, **tiny}
    sees = {"model_type": "blip-2", "image_token_index": 39, "num_query_tokens": 3, "text_config": speaks}
    sees["vision_config"] = {"image_size": 8, "patch_size": 4, **tiny}
    sees["qformer_config"] = {"encoder_hidden_size": 8, **tiny}
    for name, config in (("blip2-opt-2.7b", sees), ("vicuna-7b", text)):
        found = huggingface.Origin.of(config)
        of = found.found
        huggingface.save(name, huggingface.Model(of.of, of.cfg, randomised(of.of.spec(of.cfg)), found))
    exec(compile(EXAMPLES[6], "README.md", "exec"), {})
    parts, made = {n: huggingface.load(n) for n in ("blip2-opt-2.7b", "vicuna-7b")}, huggingface.load("minigpt4")
    assert made.cfg.connector.outputs == made.cfg.decoder.blocks.width == 12
    assert made.cfg.placeholder == 0
    for got, want in (
        (made.params["decoder"], parts["vicuna-7b"].params),
        (made.params["vision"], parts["blip2-opt-2.7b"].params["vision"]),
        (made.params["connector"]["layers"], parts["blip2-opt-2.7b"].params["connector"]["layers"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_every_folder_it_names_exists_and_every_folder_is_named():
    named = set(re.findall(r"^\| `([\w/.]+)` \|", README, re.M))
    root = Path(__file__).parents[1]
    assert all((root / name).exists() for name in named)
    assert {f"mmjax/{p.name}" for p in (root / "mmjax").iterdir() if (p / "__init__.py").exists()} <= named


def test_a_conversation_in_a_familys_own_words(capsys):
    said = run(EXAMPLES[5], capsys)
    assert "'Is <|im_end|> a token?'" in said  # as text, between two control tokens, which decode to nothing
    assert "(1, 4, 6)" in said
    assert said.endswith("True, True, False]")  # the answer and the end of its turn, not the line end behind it
