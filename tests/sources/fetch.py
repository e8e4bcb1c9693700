"""Fetches two real datasets, in several languages, and makes a tokenizer for them and the built-in drawings.

    python -m tests.sources.fetch --out DIR [clipart] [tuxpaint]

Writes DIR/clipart.jsonl and DIR/tuxpaint.jsonl, one conversation a line with the paths of pictures inside DIR; the
pictures; and DIR/text.model, trained on all questions and answers and on those of mmjax.data.drawings.

clipart   OpenClipart 0.18 (Debian's openclipart-png and openclipart-svg, public domain): a picture, "What is this?",
          its title. Titles are those of the SVG that a picture was drawn from, without a number at the end; most are
          English, some Italian or French.
tuxpaint  Tux Paint's stamps (Debian's tuxpaint-stamps-default, GPL-2): a picture, "Describe this in Spanish.", its
          caption in that language; twelve languages, in eight scripts.

Every picture is written anew: on white, in RGB, shrunk to at most 128 pixels a side. What is left out is counted, by
reason. The same packages under the same Pillow and SentencePiece give the same bytes. Nothing fetched may be committed.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from mmjax.core.errors import InputError
from mmjax.core.files import write_atomic
from mmjax.data import drawings
from mmjax.tokenizers import text

from .datasets import Dataset, clipart, tuxpaint

VOCAB = 4096
MIRROR = "https://deb.debian.org/debian/pool/main/"
PACKAGES = {  # where in the mirror, and SHA-256: of what is fetched without apt, which checks what it fetches itself
    "openclipart-png": (
        "o/openclipart/openclipart-png_0.18%2bdfsg-19_all.deb",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    ),
    "openclipart-svg": (
        "o/openclipart/openclipart-svg_0.18%2bdfsg-19_all.deb",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    ),
    "tuxpaint-stamps-default": (
        "t/tuxpaint-stamps/tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    ),
}
LARGEST = 256 * 2**20  # bytes of a package


def download(package: str, folder: Path) -> Path:
    """A Debian package: by apt where that can, else from the mirror.

    Raises:
      InputError: neither can be had, or what the mirror gave is not what it was.
    """
    if shutil.which("apt-get"):
        done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
        found = list(folder.glob(f"{package}_*.deb"))
        if done.returncode == 0 and len(found) == 1:
            return found[0]
        print(f"apt cannot download {package}: {' '.join(done.stderr.split()[-20:])}", file=sys.stderr)
    return from_mirror(package, folder)


def from_mirror(package: str, folder: Path) -> Path:
    """A package over HTTPS, checked against the SHA-256 above."""
    place, wanted = PACKAGES[package]
    target = folder / f"{package}.deb"
    digest, left = hashlib.sha256(), LARGEST
    try:
        with urllib.request.urlopen(MIRROR + place, timeout=60) as answer, open(target, "wb") as file:
            while (data := answer.read(2**20)) and left > 0:
                digest.update(data)
                file.write(data)
                left -= len(data)
    except OSError as error:
        raise InputError(f"{MIRROR}{place} cannot be downloaded ({error}); try again, or where apt-get is.") from error
    if digest.hexdigest() != wanted:
        raise InputError(f"{MIRROR}{place} has the SHA-256 {digest.hexdigest()}, not {wanted}; do not use it.")
    return target


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sources.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("sources", nargs="*", metavar="clipart|tuxpaint", help="which; both if none is named")
    given = parser.parse_args(arguments)
    wanted = given.sources or ["clipart", "tuxpaint"]
    if unknown := set(wanted) - {"clipart", "tuxpaint"}:
        parser.error(f"there is no source {sorted(unknown)[0]!r}; name clipart, tuxpaint, or none for both")
    made: list[Dataset] = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if "clipart" in wanted:
            made.append(clipart(*(download(f"openclipart-{kind}", folder) for kind in ("png", "svg")), given.out))
        if "tuxpaint" in wanted:
            made.append(tuxpaint(download("tuxpaint-stamps-default", folder), given.out))
    for dataset in made:
        dataset.close()
    model = text.train(drawings.corpus() + [said for dataset in made for said in dataset.texts], VOCAB)
    write_atomic(given.out / "text.model", model)
    print(f"text.model: {VOCAB} ids, {len(model):,} bytes, SHA-256 {hashlib.sha256(model).hexdigest()}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
