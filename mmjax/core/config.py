"""Configs: frozen dataclasses made by the `config()` function of a Python file, changed on the command line."""

import dataclasses
import difflib
import runpy
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmjax
from mmjax.core.errors import InputError


def folder() -> Path:
    """Where the configs that come with mmjax lie: inside the installed package, or beside it in a clone."""
    package = Path(mmjax.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """The names of those configs."""
    return sorted(p.stem for p in folder().glob("*.py") if not p.stem.startswith("_"))


def find(name: str) -> Path:
    """The file of a config, from its path or its name.

    Raises:
      InputError: there is none; the message names the nearest.
    """
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    if path.stem in names() and path.parent in (Path("."), Path("configs")):
        return folder() / f"{path.stem}.py"
    near = difflib.get_close_matches(path.stem, names(), 1, 0.5)
    hint = f"did you mean {near[0]!r}" if near else f"mmjax comes with {', '.join(names())}"
    raise InputError(f"There is no config {name!r}: {hint}? A path to a .py file with a config() function works too.")


def load(name: str) -> Any:
    """The config that a file's `config()` returns."""
    path = find(name)
    made = runpy.run_path(str(path)).get("config")
    if not callable(made):
        raise InputError(f"{path} has no function config(); add one that returns the config of the run.")
    return made()


def from_command_line(program: str, arguments: Sequence[str], description: str) -> Any:
    """The config named first on a command line, with its other arguments applied: `quickstart --steps 100`.

    Prints help for --help; answers a wrong name with the nearest right one and exits with status 2.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: python -m {program} CONFIG [--field value ...]\n\n{description}\n\n"
            f"CONFIG is a .py file with a function config(), or one of: {', '.join(names())}.\n"
            f"python -m {program} CONFIG --help lists every field that can be set."
        )
        raise SystemExit(0 if arguments else 2)
    if arguments[0].startswith("-"):
        raise InputError(f"The first argument must be a config, not {arguments[0]!r}; for example: {names()[0]}.")
    return changed(load(arguments[0]), arguments[1:], f"python -m {program} {arguments[0]}")


def changed(config: Any, arguments: Sequence[str], program: str) -> Any:
    """A config with the fields that a command line sets: `--optimizer.learning-rate 3e-4`.

    A field that may be one of several dataclasses keeps the config's own kind, and its fields are flags. One that is a
    name, or in its place a dataclass with a `name` of its own, is given as a name.

    Prints help for --help; exits with status 2 where an argument is none.
    """
    import tyro

    known = tyro.constructors.ConstructorRegistry()

    @known.primitive_rule
    def named(info: Any) -> Any:
        kinds = typing.get_args(info.type)
        if len(kinds) != 2 or kinds[0] is not str or not dataclasses.is_dataclass(kinds[1]):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="NAME",
            instance_from_str=lambda given: given[0],
            is_instance=lambda value: isinstance(value, kinds),
            str_from_instance=lambda value: [value if isinstance(value, str) else value.name],
        )

    @known.struct_rule
    def kept(info: Any) -> Any:
        """Of a field that may be None, what it is: its type may be a base of the config's own kind, as an Encoder."""
        if type(None) not in typing.get_args(info.type) or not dataclasses.is_dataclass(info.default):
            return None
        return known.get_struct_spec(dataclasses.replace(info, type=type(info.default)))

    how = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(type(config), default=config, args=list(arguments), prog=program, config=how, registry=known)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name, as numbers, text or None: to be stored, compared and shown."""
    out = {}
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            out |= flatten(value, f"{name}.")
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            for n, item in enumerate(value):
                whole = dataclasses.is_dataclass(item)
                out[f"{name}.{n}"] = type(item).__name__ if whole else _plain(item)
                out |= flatten(item, f"{name}.{n}.") if whole else {}
        else:
            out[name] = _plain(value)
    return out


def _plain(value: Any) -> Any:
    """What JSON gives back unchanged."""
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def main(run: Any) -> None:
    """Ends with the status of `run(arguments)`; an InputError becomes its one sentence and exit status 2."""
    try:
        raise SystemExit(run(sys.argv[1:]))
    except InputError as error:
        print(f"mmjax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # before the program handles it itself: nothing is written yet
        raise SystemExit(130) from None
