import dataclasses
import json

import pytest

from mmjax.core import config
from mmjax.core.errors import InputError
from mmjax.train.config import Config


def test_every_config_that_comes_with_mmjax_loads():
    assert "quickstart" in config.names()
    for name in config.names():
        assert isinstance(config.load(name), Config)


def test_a_path_beats_a_name(tmp_path, monkeypatch):
    (tmp_path / "quickstart.py").write_text("def config():\n    return 'mine'\n")
    monkeypatch.chdir(tmp_path)
    assert config.load("quickstart.py") == "mine"
    assert isinstance(config.load("quickstart"), Config)
    assert isinstance(config.load("configs/quickstart.py"), Config)  # as typed in the README, from anywhere


def test_fields_are_set_by_dotted_names():
    cfg = config.from_command_line(
        "mmjax.train", ["quickstart", "--model.vision.blocks.layers", "7", "--out", "x/y"], ""
    )
    assert cfg.model.vision.blocks.layers == 7
    flat = config.flatten(cfg)
    assert flat["model.vision.blocks.layers"] == 7
    assert flat["out"] == "x/y"
    assert flat["model.vision.blocks.rope.sections"] == [6, 6]


def test_what_is_given_by_name_on_a_command_line_or_in_code():
    """A field that is a name or a dataclass with one: MiniGPT-4's convention is its config's own."""
    cfg = config.from_command_line("mmjax.train", ["minigpt4", "--steps", "7"], "")
    assert (cfg.steps, cfg.data.convention) == (7, config.load("minigpt4").data.convention)
    assert config.flatten(cfg)["data.convention.name"] == "minigpt-4"
    assert json.loads(json.dumps(config.flatten(cfg))) == config.flatten(cfg)
    for name in ("minigpt4", "mixture"):
        cfg = config.from_command_line("mmjax.train", [name, "--data.convention", "chatml"], "")
        assert cfg.data.convention == "chatml"


def test_a_flat_config_survives_json():
    """It is compared with the one in a checkpoint, where tuples have become lists, nested ones too."""
    flat = config.flatten(config.load("quickstart"))
    assert flat["model.vision.embed.stem"] == [[2, 24], [4, 96]]
    assert json.loads(json.dumps(flat)) == flat


def test_unknown_configs_name_the_nearest():
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        config.find("quikstart")


@dataclasses.dataclass(frozen=True)
class Leaf:
    size: int = 1
    sides: tuple[int, ...] = (2, 3)


@dataclasses.dataclass(frozen=True)
class Twig:
    leaf: Leaf
    name: str = "twig"


@dataclasses.dataclass(frozen=True)
class Tree:
    parts: tuple[Leaf | Twig | None, ...]
    none: tuple[Leaf, ...] = ()


def test_several_of_one_field_are_numbered():
    """With their kinds: two kinds may have the same fields."""
    flat = config.flatten(Tree((Leaf(5), Twig(Leaf(6)))))
    assert flat == {
        "parts.0": "Leaf",
        "parts.0.size": 5,
        "parts.0.sides": [2, 3],
        "parts.1": "Twig",
        "parts.1.leaf.size": 6,
        "parts.1.leaf.sides": [2, 3],
        "parts.1.name": "twig",
        "none": [],
    }
    assert json.loads(json.dumps(flat)) == flat
    assert config.flatten(Tree((Twig(Leaf(6)), Leaf(5)))) != flat
    assert config.flatten(Tree((Leaf(5), None))) == {
        "parts.0": "Leaf",
        "parts.0.size": 5,
        "parts.0.sides": [2, 3],
        "parts.1": None,
        "none": [],
    }
