"""What one of several JAX processes finds out or gets wrong, and all of them then know.

Every process calls the same functions in the same order, from one thread. They talk through JAX's coordination service
(`jax.distributed`) and not through devices: so a process may be slow to come, which collectives on CPUs do not forgive
(gloo gives up after 30 seconds), and nothing is compiled. With one process they cost nothing.
"""

import contextlib
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from mmjax.core.errors import InputError

# The other processes wait this long. One that has died is noticed by JAX itself, after two minutes or so.
_SECONDS = 3600
_round = itertools.count()


def several() -> bool:
    """Whether this is one of several processes. Starts no backend where `jax.distributed` was not initialised."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def index() -> int:
    """Which process this is."""
    return jax.process_index() if several() else 0


def count() -> int:
    """How many processes there are."""
    return jax.process_count() if several() else 1


def from_first(do: Callable[[], Any]) -> Any:
    """Calls `do` in process 0 only, and returns what it returned (JSON) in every process.

    Raises:
      InputError: in every process, if `do` raised it in process 0; so do its subclasses.
      RuntimeError: in the others, if it raised anything else.
    """
    if not several():
        return do()
    key = f"mmjax/{next(_round)}"
    if index() == 0:
        try:
            value = do()
        except BaseException as error:
            _client().key_value_set(key, json.dumps({"error": _described(error)}))
            raise
        _client().key_value_set(key, json.dumps({"value": value}))
        return value
    told = json.loads(_client().blocking_key_value_get(key, _SECONDS * 1000))
    if "error" in told:
        raise _error(*told["error"])
    return told["value"]


def together(error: BaseException | None = None) -> None:
    """Returns when every process has come here; if one of them brought an error, every process raises it.

    Raises:
      InputError: a process brought one; so do its subclasses.
      RuntimeError: another process brought another error. The process itself raises that as it is.
    """
    if not several():
        if error is not None:
            raise error
        return
    number = next(_round)
    mine = None if error is None else _described(error)
    _client().key_value_set(f"mmjax/{number}/{index()}", json.dumps(mine))

    def first_error() -> list | None:
        keys = [f"mmjax/{number}/{process}" for process in range(count())]
        told = [json.loads(_client().blocking_key_value_get(key, _SECONDS * 1000)) for key in keys]
        # Everyone has come, so everyone has read what was said before.
        for past in range(_forgotten[0], number):
            _client().key_value_delete(f"mmjax/{past}")
            _client().key_value_delete(f"mmjax/{past}/")
        _forgotten[0] = number
        return next((said for said in told if said is not None), None)

    found = from_first(first_error)
    if found is not None:
        raise error if error is not None and found == mine else _error(*found)


def meet(seconds: float) -> None:
    """Returns when every process has come here, or after so many seconds."""
    if several():
        with contextlib.suppress(Exception):
            _client().wait_at_barrier("mmjax/meet", int(seconds * 1000))


_forgotten = [0]  # the first round whose keys are still there


def _client() -> Any:
    # JAX has no public name for its key-value store; Orbax and Flax take the same.
    from jax._src import distributed

    return distributed.global_state.client


def _described(error: BaseException) -> list:
    # Not its text, to which a subclass may have added.
    return [index(), type(error).__name__, error.args[0] if isinstance(error, InputError) else str(error)]


def _error(process: int, kind: str, text: str) -> Exception:
    kinds = {known.__name__: known for known in (InputError, *InputError.__subclasses__())}
    if kind in kinds:
        return kinds[kind](text)
    return RuntimeError(f"process {process} failed with {kind}: {text}")
