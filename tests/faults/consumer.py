"""One host of a run that trains nothing: it writes down every example it gets, until it is done or killed.

python tests/faults/consumer.py HOST HOSTS START FILE     # what tests/faults/test_exactly_once.py starts
"""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmjax.data import index
from mmjax.data.mixture import Mixture
from mmjax.data.source import Source, read
from mmjax.sequence.batch import Batch
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.layout import layout
from mmjax.tokenizers.resolution import Native
from mmjax.tokenizers.vocab import Vocab

SIZES = {"pets": 60, "maps": 90, "signs": 40}
EPOCHS, ROWS, TOKENS, PATCH, CONTROLS = 2, 4, 48, 4, 9
VOCAB = Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=CONTROLS + 256)
PAUSE = 0.008  # seconds a line, so that a kill can fall between any two
END = "end"  # instead of an id: the host has completed the step


class Bytes:
    vocab = VOCAB

    def encode(self, text: str) -> list[int]:
        return [CONTROLS + b for b in text.encode()]


def document(name: str, number: int) -> Document:
    """It says in words and in grey levels which one it is."""
    shape = (8, 4 * (1 + number % 5), 3)
    picture = Image(*shape[:2], functools.partial(np.full, shape, number, np.uint8))
    return Document(str(number), (picture, Text(f"{name}:{number}"), Text("yes", "assistant", True)))


@functools.cache
def source() -> Source:
    """A run on one host that sees each of three small datasets twice."""
    sources = [[document(name, n) for n in range(size)] for name, size in SIZES.items()]
    documents = Mixture(sources, names=tuple(SIZES), epochs=EPOCHS, seed=0)
    lay = functools.partial(layout, tokenizer=Bytes(), resolution=Native(PATCH, 1, PATCH * PATCH, 32 * 32))
    index.WINDOW = 64  # so that documents wait for the next window, as they do in large datasets
    plan = index.training(documents, lay, steps=None, k=2, tokens=TOKENS, rows=ROWS, seed=0)
    return Source(documents, lay, plan, VOCAB, PATCH)


def found(batch: Batch, row: int) -> list[str]:
    """What the documents of a row say that they are; their pictures must say the same."""
    out = []
    for number in range(batch.document[row].max() + 1):
        here = batch.document[row] == number
        tokens = batch.tokens[row, here & (batch.modality[row] == 1)]
        said = bytes((tokens[tokens >= CONTROLS] - CONTROLS).tolist()).decode().removesuffix("yes")
        patches = batch.patches[row, batch.slot[row, here & (batch.modality[row] == 2)]]
        if not (patches == int(said.split(":")[1])).all():
            raise AssertionError(f"{said} came with the picture of number {patches.min()}")
        out.append(said)
    return out


def lines(host: int, hosts: int, start: int) -> Iterator[str]:
    """Every example from a step on, as the host gets it: "step id", and "step end" after the last of a step."""
    of = dataclasses.replace(source(), parts=(host,), of=hosts)
    share = ROWS // hosts
    for step, batch in enumerate(read(of, start, threads=2, ahead=3), start):
        planned = len(of.plan.steps[step].rows)
        for row in range(share):
            number = host * share + row
            ids = of.ids(step, number) if number < planned else []
            said = found(batch, row)
            if said != [id.replace("~2", "") for id in ids]:
                raise AssertionError(f"step {step}, row {number}: {said} instead of {ids}")
            yield from (f"{step} {id}\n" for id in ids)
        yield f"{step} {END}\n"


def main(host: int, hosts: int, start: int, file: Path) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for line in lines(host, hosts, start):
        os.write(fd, line.encode())
        time.sleep(PAUSE)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
