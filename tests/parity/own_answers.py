"""What configs/own_vlm.py's model answers about drawings in the style that is never trained on, and without a picture.

    python -m tests.parity.own_answers own_vlm [answers.png]

Every one of the 1,594 drawings is shown alone, at its own size; the answer is written greedily, of all words. The last
line is one JSON object: the shares of exact answers of the 512 names of one word and of all names, what is answered
without a picture, the shares that this is right for, and the differences. The picture shows twenty of the answers.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image as PIL

from mmjax.convert import huggingface, processor
from mmjax.data import drawings
from mmjax.generate.session import Session
from mmjax.sequence.document import Document, Image, Text
from mmjax.train import report
from mmjax.train.answers import Asked, equal

ROWS = 32  # asked at a time
LONGEST = 10  # tokens of an answer


def answers(session: Session, documents: Sequence[Document]) -> list[str]:
    """What is said about each, without the space around it."""
    out = []
    for first in range(0, len(documents), ROWS):
        some = list(documents[first : first + ROWS])
        full = some + [some[-1]] * (ROWS - len(some))  # one program for all
        out += [answer.text.strip() for answer in session.answer(full, max_tokens=LONGEST)[: len(some)]]
    return out


def main(folder: Path, sheet: Path | None = None) -> None:
    model = huggingface.load(folder)
    session = Session(model, processor.load(folder, model))
    concepts, files = drawings.archive()
    style = drawings.Config().held_out
    shown = [(Image(*c.size[style], files[f"{style}/{c.code}"]), Text(drawings.NAMING)) for c in concepts]
    documents = [Document(c.code, spans) for c, spans in zip(concepts, shown, strict=True)]
    start = time.monotonic()
    said = answers(session, documents)
    right = [equal(answer, c.name) for answer, c in zip(said, concepts, strict=True)]
    (blind,) = answers(session, [Document("blind", (Text(drawings.NAMING),))])
    chance = [equal(blind, c.name) for c in concepts]
    words = [n for n, c in enumerate(concepts) if c.name.isalpha()]
    if sheet is not None:
        asked = [(Asked(documents[n], concepts[n].name), concepts[n].name if right[n] else said[n]) for n in words]
        report.draw_sheet(sheet.parent, sheet.name, [q for q, _ in asked], [a for _, a in asked], most=20)
        PIL.open(sheet).convert("RGB").quantize(128).save(sheet, optimize=True)
    for n in words:
        if not right[n]:
            print(f"{concepts[n].name}: {said[n]}")

    def share(of: Sequence[bool], which: Sequence[int]) -> float:
        return sum(of[n] for n in which) / len(which)

    out = {"seconds": round(time.monotonic() - start), "without a picture": blind}
    for name, which in (("words", words), ("names", range(len(concepts)))):
        out[name] = {"exact": share(right, which), "blind": share(chance, which)}
    above = out["words"]["exact"] - out["words"]["blind"]
    out["aims"] = [{"name": "exact above text alone", "measured": above, "at_least": 0.5}]
    print(json.dumps(out, ensure_ascii=False))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
