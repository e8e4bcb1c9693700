"""Looks at datasets, and converts them.

    python -m mmjax.data index PATH ...             what is in each, and what cannot be read; keeps the index
    python -m mmjax.data convert PATH OUT.array_record      the same documents as mmjax's own records
    python -m mmjax.data show ...                   see its own --help

Exit status 1 if `index` found something that cannot be read, 2 for bad input.
"""

import argparse
import logging
import sys
from pathlib import Path

from mmjax.core import config, strict_json
from mmjax.core.errors import InputError
from mmjax.data import convert, summary
from mmjax.data.formats import Dataset, open_dataset, paths
from mmjax.data.formats.schemas import SCHEMAS
from mmjax.data.formats.shards import read_all

MAP_BYTES = 2**30
ALL = 2**62  # more places than any dataset has


def main(arguments: list[str]) -> int:
    """The program; gives its exit status."""
    if arguments[:1] == ["show"]:
        from mmjax.data import show

        return show.main(arguments[1:])
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return given.run(given)


def _index(given: argparse.Namespace) -> int:
    if given.out and len(given.path) > 1:
        raise InputError("--out is the place of one index; give one PATH with it")
    damaged = False
    for n, path in enumerate(given.path):
        data = _opened(given, path, ALL if given.errors is None else given.errors, given.out)
        print("\n" * bool(n) + summary.table(data, path))
        damaged |= bool(data.left_out)
    return int(damaged)


def _convert(given: argparse.Namespace) -> int:
    data = _opened(given, given.path, given.errors or 0, None)
    files = convert.write(data, given.out, shard_bytes=given.shard_bytes)
    print(f"{len(data):,} documents in {len(files)} file{'s' * (len(files) > 1)}: {given.out}")
    return 0


def _opened(given: argparse.Namespace, path: str, errors: int, cache: str | None) -> Dataset:
    return open_dataset(
        path,
        schema=given.schema,
        root=given.root,
        errors=errors,
        place=given.place,
        missing=given.missing,
        images=_map(given.images) if given.images else None,
        cache=cache,
    )


def _map(name: str) -> dict[str, str]:
    path = Path(name).resolve()
    size = paths.require_regular(path).st_size
    with open(paths.open_regular(path), "rb") as file:
        data = read_all(file.fileno(), 0, min(size, MAP_BYTES + 1), name)
    found = strict_json.loads(data, name, max_bytes=MAP_BYTES, max_depth=1, max_items=2**25)
    if not isinstance(found, dict) or not all(isinstance(path, str) for path in found.values()):
        raise InputError(f"{name} is not an object of addresses and paths; write {{address: path, …}}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmjax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="index | convert | show")
    index = commands.add_parser("index", help="print what is in datasets, and keep the index beside each")
    index.add_argument("path", nargs="+", metavar="PATH", help="a file, a folder, or a pattern in quotes")
    index.add_argument("--out", metavar="FILE", help="where the index is kept; otherwise PATH.mmjax-index")
    index.set_defaults(run=_index)
    to = commands.add_parser("convert", help="write a dataset's documents to ArrayRecord files")
    to.add_argument("path", metavar="PATH", help="a file, a folder, or a pattern in quotes")
    to.add_argument("out", metavar="OUT.array_record", help="a new file; with --shard-bytes, a new folder of them")
    to.add_argument("--shard-bytes", type=int, metavar="N", help="begin a new file after so many bytes")
    to.set_defaults(run=_convert)
    commands.add_parser("show", help="see show --help", add_help=False)
    for command, unset in ((index, "no limit"), (to, "0")):
        command.add_argument("--schema", choices=SCHEMAS, help="how records are read; otherwise as the first one looks")
        command.add_argument("--root", metavar="DIR", help="the folder that pictures lie in; otherwise the dataset's")
        parts = "records, or damaged parts of files (a row group is one), that may be left out"
        command.add_argument("--errors", type=int, metavar="N", help=f"{parts}; otherwise {unset}")
        command.add_argument(
            "--place", choices=["as_written", "front", "bare"], default="as_written", help="LLaVA's pictures"
        )
        command.add_argument("--missing", choices=["refuse", "skip_image"], default="refuse", help="on pages")
        command.add_argument("--images", metavar="FILE", help="JSON: address of a picture → its path in --root")
    return parser


if __name__ == "__main__":
    config.main(main)
