"""Whether a directory holds this run, to be gone on with, or another one."""

import re
from typing import Any

from mmjax.checkpoint import Checkpoints
from mmjax.core import config as configs
from mmjax.core import processes
from mmjax.core.errors import InputError
from mmjax.core.manifest import listed_steps
from mmjax.train.config import Config
from mmjax.train.prepare import Data

# Fields that resuming may change; where base, documents and tokenizer lie may, for what they are is compared by
# fingerprint.
MAY_CHANGE = re.compile(
    r"out|base|(mesh|cluster|features)\..*|threads|keep|keep_every|save_every|fallback|update\.patience|"
    r"data\.tokenizer|data\.(sources|evaluation)\.\d+\.(path|root|errors)"
)


def refuse_another_run(cfg: Config, data: Data, checkpoints: Checkpoints) -> dict[str, Any]:
    """The last checkpoint's metadata, {} where there is none.

    Raises:
      InputError: it belongs to a run with other settings; the message names them. Or there are steps, but the manifest
        of none is whole.
    """
    steps = checkpoints.steps() or processes.from_first(lambda: listed_steps(checkpoints.directory))
    if not steps:
        return {}
    before = checkpoints.metadata(steps[-1])
    what = differences(before, cfg, data)
    if what:
        raise InputError(
            f"{cfg.out} holds a run with other settings: {', '.join(what)}; set them back to resume it, or give "
            f"another --out."
        )
    return before


def differences(before: dict[str, Any], cfg: Config, data: Data) -> list[str]:
    """What a run's checkpoint was made with and this config is not, so that going on would be another run."""
    now, then = configs.flatten(cfg), before["config"]
    changed = [k for k in sorted(now.keys() | then.keys()) if now.get(k) != then.get(k) and not _may_change(k, cfg)]
    what = [f"{k} ({then.get(k)} → {now.get(k)})" for k in changed]
    told, found = before.get("datasets", {}), data.fingerprints
    what += [f"the documents of {name!r}" for name in sorted(told | found) if told.get(name) != found.get(name)]
    if list(told) != list(found) and told.keys() == found.keys():
        what.append(f"the order of data.sources ({', '.join(told)} → {', '.join(found)})")
    return what + ([] if before["tokenizer"] == data.writing else ["the tokenizer"])


def _may_change(field: str, cfg: Config) -> bool:
    # With less memory a picture may be too large, which is an error or, where holes are allowed, other data.
    return bool(MAY_CHANGE.fullmatch(field)) or (field == "packing.memory" and not cfg.packing.holes)
