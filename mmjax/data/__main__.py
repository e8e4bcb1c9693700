"""python -m mmjax.data show PATH …: looks at data."""

import sys
from collections.abc import Sequence

from mmjax.core import config
from mmjax.core.errors import InputError

USAGE = (
    "usage: python -m mmjax.data show PATH [N | ID] …\n\nshow: a document as the model gets it; show --help says more."
)


def run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] != "show":
        raise InputError(f"There is no command {arguments[0]!r}; give show.")
    from mmjax.data import show

    return show.main(list(arguments[1:]))


if __name__ == "__main__":
    config.main(run)
