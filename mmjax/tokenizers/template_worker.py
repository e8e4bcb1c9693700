"""Renders chat templates in a process of its own, with little memory and time, and no files: see `template_process`.

It is started by path and imports nothing of mmjax. It reads a line of JSON and writes a line of JSON, and ends when its
input does, even in the middle of a rendering.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime

try:
    import resource
except ImportError:  # Windows: no limit of memory, only the caller's of time
    resource = None

OLDEST = (3, 1, 6)  # of jinja2: there are known ways out of the sandboxes of older ones
SHOWN = 300  # characters of an error message


class TooLong(Exception):
    """The rendering is longer than allowed."""


def environment():
    """The environment of `transformers` (utils.chat_template_utils, 5.23): what templates are written for."""
    import jinja2
    import jinja2.debug  # jinja2 loads it at the first error: no file can be opened by then
    import jinja2.ext
    import jinja2.sandbox

    if tuple(int("".join(filter(str.isdigit, n)) or 0) for n in jinja2.__version__.split(".")[:3]) < OLDEST:
        raise ImportError

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}`: what is inside is what the assistant writes.

        Marks travel with the text; `transformers` counts characters instead, wrongly inside macros.
        """

        tags = frozenset({"generation"})

        def parse(self, parser):
            self.environment.generation = True
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller):
            begin, end = self.environment.marks
            return begin + caller() + end

    class Dictionary:
        """`dict` without the attributes of the class, as in transformers."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        """`namespace` that takes no private names, as in transformers."""

        def __init__(*args, **kwargs):
            attributes = dict(*args[1:], **kwargs)
            for name in attributes:
                refuse_private(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name, value):
            refuse_private(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def refuse_private(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no private name, but got {name!r}")

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.generation, made.marks, made.now = False, ("", ""), datetime.now()
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: made.now.strftime(format),
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    return made


def words(made, source: str) -> tuple[list[str], list[str]]:
    """The strings that a template compares with, and the names it asks objects for."""
    import jinja2.nodes

    tree = made.parse(source)
    strings = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    strings = {s for s in strings if s == s.encode(errors="ignore").decode()}  # half a surrogate is in no text
    return sorted(strings), sorted({node.attr for node in tree.find_all(jinja2.nodes.Getattr)})


def warm(made) -> None:
    """Loads what Python loads late: string escapes, time zone, the way errors are shown. Later it has no files."""
    made.from_string("{{ '\\n' ~ strftime_now('%c') ~ {'a': 1} | tojson }}").render()
    try:
        made.from_string("{{ 1 / 0 }}").render()
    except ZeroDivisionError:
        return


def confine(memory: int) -> None:
    """Takes away files, further processes and all memory but so many bytes more than is in use now."""
    if resource is None:
        return
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        used = 2**28
    limits = {"AS": used + memory, "FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 0}
    for name, most in limits.items():
        _limit(name, most, most)


def _limit(name: str, soft: int, hard: int) -> None:
    number = getattr(resource, f"RLIMIT_{name}", None)
    if number is None:
        return
    before = resource.getrlimit(number)[1]
    if before != resource.RLIM_INFINITY:
        soft, hard = min(soft, before), before if hard == resource.RLIM_INFINITY else min(hard, before)
    try:
        resource.setrlimit(number, (soft, hard))
    except (OSError, ValueError):  # a system that knows the limit but does not have it
        return


def read(made, source: str):
    """A template, and what is told of it."""
    template = made.from_string(source)
    strings, names = words(made, source)
    return template, {"strings": strings, "names": names, "generation": made.generation}


def render(made, template, request: dict, most: int) -> dict:
    """The renderings asked for: each of so many messages of one of the sets, with or without the answer's beginning."""
    made.now = datetime.now()  # one for all, or one could say it is yesterday
    out = []
    for number, messages, prompt, marks in request["jobs"]:
        given = request["sets"][number]
        made.marks = tuple(marks)
        context = given["variables"] | {"messages": given["messages"][:messages], "add_generation_prompt": prompt}
        try:
            out.append("".join(_limited(template.generate(context), most)))
        except (MemoryError, TooLong):
            raise
        except Exception:
            # It may refuse texts in disguise where it takes them plain.
            if not any(marks):
                raise
            out.append(None)
    return {"texts": out}


def _limited(blocks: Iterator[str], most: int) -> Iterator[str]:
    for block in blocks:
        most -= len(block)
        if most < 0:
            raise TooLong
        yield block


def _allow(seconds: float) -> None:
    """So much of the processor's time for the next request, in addition to what was used before."""
    if resource is not None:
        _limit("CPU", int(time.process_time() + seconds) + 2, resource.RLIM_INFINITY)


def _listen(lines: queue.SimpleQueue) -> None:
    # A thread: the main one may be in an endless loop when the caller goes.
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(0)


def _say(answer: dict) -> None:
    try:
        line = json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        line = json.dumps({"error": "failed", "message": "it wrote a lone surrogate, which is not text"}).encode()
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    lines = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    first = json.loads(lines.get())
    sys.path[:] = first["path"]
    try:
        made = environment()
        warm(made)
    except ImportError:
        _say({"error": "missing"})
        return
    confine(first["memory"])
    _say({})
    template = None
    while True:
        request = json.loads(lines.get())
        _allow(first["seconds"])
        try:
            if template is None:
                template, said = read(made, request["source"])
            else:
                said = render(made, template, request, first["characters"])
            _say(said)
        except MemoryError:
            # Who knows what is still whole; another process takes over.
            _say({"error": "memory"})
            return
        except TooLong:
            _say({"error": "long"})
        except RecursionError:
            _say({"error": "failed", "message": "it calls itself without end"})
        except Exception as error:  # whatever a template makes of Python
            _say({"error": "failed", "message": f"{type(error).__name__}: {error}"[:SHOWN]})
        if template is None:
            return


if __name__ == "__main__":
    main()
