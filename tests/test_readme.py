"""What the README says, tried out."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs_and_prints_what_it_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 17
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"# (\(.*\))$", code.strip())[1]


def test_every_folder_it_names_exists_and_every_folder_is_named():
    named = set(re.findall(r"^\| `([\w/.]+)` \|", README, re.M))
    root = Path(__file__).parents[1]
    assert all((root / name).exists() for name in named)
    assert {f"mmjax/{p.name}" for p in (root / "mmjax").iterdir() if (p / "__init__.py").exists()} <= named
