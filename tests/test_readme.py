"""What the README says, tried out."""

import re
from pathlib import Path

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


def test_every_folder_it_names_exists_and_every_folder_is_named():
    named = set(re.findall(r"^\| `([\w/.]+)` \|", README, re.M))
    root = Path(__file__).parents[1]
    assert all((root / name).exists() for name in named)
    assert {f"mmjax/{p.name}" for p in (root / "mmjax").iterdir() if (p / "__init__.py").exists()} <= named
