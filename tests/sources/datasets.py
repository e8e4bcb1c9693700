"""Datasets out of Debian packages: pictures written anew, conversations as OpenAI's messages, and what is left out."""

import hashlib
import html
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import PIL.Image

from mmjax.core.errors import InputError
from mmjax.core.files import write_atomic
from mmjax.data import drawings
from mmjax.tokenizers import image as images

from . import deb

SIDE = 128  # pixels of a picture's longer side, at most
NARROW = 12  # pixels of its shorter side then, at least
LIMITS = images.Limits(max_bytes=8 * 2**20, max_pixels=4_000_000)  # 18 pictures are larger, one of 623 megapixels
LONGEST = 100  # characters of a caption
COLLECTION = 4  # pictures with the same title; a title that more have is that of a collection
LANGUAGES = {
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "de": "German",
    "pt": "Portuguese",
    "ru": "Russian",
    "el": "Greek",
    "ar": "Arabic",
    "hi": "Hindi",
    "ja": "Japanese",
    "ko": "Korean",
    "zh_CN": "Chinese",
}
DESCRIBE = "Describe this in {}."


class Dataset:
    """A dataset on its way to the disk: pictures as they come, the conversations last. `left` counts what is not in."""

    def __init__(self, out: Path, name: str):
        self.out, self.name, self.left, self.lines = out, name, Counter(), {}
        self.pictures = self.bytes = 0
        self._seen = set()

    def add(self, name: str, picture: bytes, pairs: list[tuple[str, str, str]]) -> None:
        """A picture and (id, question, answer) of every conversation about it."""
        try:
            small = shrink(picture)
        except InputError as error:
            self.left["not decoded: over the limits" if "limit" in str(error) else "not decoded: broken"] += 1
            return
        if min(small.size) < NARROW:
            self.left[f"narrower than {NARROW} pixels"] += 1
            return
        file = io.BytesIO()
        small.save(file, "PNG")
        # The same thing in two categories.
        fingerprint = hashlib.sha256(file.getvalue() + repr([pair[1:] for pair in pairs]).encode()).digest()
        if fingerprint in self._seen:
            self.left["the same picture and words twice"] += 1
            return
        self._seen.add(fingerprint)
        path = f"{self.name}/{name}"
        (self.out / path).parent.mkdir(parents=True, exist_ok=True)
        (self.out / path).write_bytes(file.getvalue())
        self.pictures += 1
        self.bytes += len(file.getvalue())
        self.lines |= {id: (path, question, answer) for id, question, answer in pairs}

    def close(self) -> None:
        """Writes the conversations, in the order of their ids, and says what there is and is not."""
        rows = [json.dumps(row(id, *self.lines[id]), ensure_ascii=False) + "\n" for id in sorted(self.lines)]
        data = "".join(rows).encode()
        write_atomic(self.out / f"{self.name}.jsonl", data)
        print(
            f"{self.name}: {len(rows):,} pairs, {self.pictures:,} pictures of {self.bytes:,} bytes, {len(data):,} bytes"
        )
        print(f"  SHA-256 of the list: {hashlib.sha256(data).hexdigest()}")
        for question, count in Counter(question for _, question, _ in self.lines.values()).most_common():
            print(f"  {count:6,} {question}")
        for reason, count in self.left.most_common():
            print(f"  left out {count:6,} {reason}")

    @property
    def texts(self) -> list[str]:
        return [said for id in sorted(self.lines) for said in self.lines[id][1:]]


def row(id: str, picture: str, question: str, answer: str) -> dict:
    """A conversation as OpenAI's messages."""
    shown = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return {"id": id, "messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": answer}]}


def shrink(picture: bytes) -> PIL.Image.Image:
    """On white, in RGB, no side over SIDE pixels. InputError as of tokenizers.image.decode."""
    pixels = images.decode(picture, limits=LIMITS)
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    if scale < 1:
        pixels = images.resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
    return PIL.Image.fromarray(pixels)


def one_line(said: str) -> str:
    """Without line breaks, characters that are not seen, and space that says nothing."""
    seen = "".join(c if c in "\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf") else " " for c in said)
    return " ".join(seen.split())


def captions(data: bytes) -> dict[str, str]:
    """A stamp's caption by language: the first line is English, others are "es.utf8=Una rana." and the like.

    Raises:
      InputError: it is not UTF-8.
    """
    try:
        first, *others = data.decode("utf-8-sig").splitlines() or [""]
    except UnicodeDecodeError as error:
        raise InputError(f"a caption file is not UTF-8 ({error}); leave it out.") from error
    out = {"en": one_line(first)}
    for line in others:
        language, found, said = line.partition(".utf8=")
        if found and re.fullmatch(r"[A-Za-z_@]+", language):
            out.setdefault(language, one_line(said))
    return {language: said for language, said in out.items() if said}


def tuxpaint(package: Path, out: Path) -> Dataset:
    """The stamps that are PNG, each with its captions in LANGUAGES."""
    root, made = "usr/share/tuxpaint/stamps/", Dataset(out, "tuxpaint")
    files = {name.removeprefix(root): data for name, data in deb.members(package) if name.startswith(root) and data}
    for name in sorted(files):
        stem, _, kind = name.rpartition(".")
        if kind == "svg":
            made.left["SVG"] += 1
        if kind != "png":
            continue
        if f"{stem}.txt" not in files:
            made.left["without a caption"] += 1
            continue
        pairs = []
        said = captions(files[f"{stem}.txt"])
        for language, word in LANGUAGES.items():
            if language not in said:
                made.left["captions: not translated"] += 1
            elif len(said[language]) > LONGEST:
                made.left[f"captions: over {LONGEST} characters"] += 1
            elif language != "en" and _bare(said[language]) == _bare(said.get("en", "")):
                made.left["captions: the same as in English, so perhaps not translated"] += 1
            else:
                pairs.append((f"{stem}/{language}", DESCRIBE.format(word), said[language]))
        if pairs:
            made.add(name, files[name], pairs)
    return made


def _bare(said: str) -> str:
    return said.casefold().rstrip(" .!")


def title(svg: bytes) -> str:
    """The title in an SVG's metadata, as its author wrote it; "" if there is none."""
    found = re.search(rb"<dc:title[^<>]*>([^<]*)</dc:title>", svg)
    return one_line(html.unescape(found[1].decode("utf-8", "replace"))) if found else ""


def caption(title: str) -> str:
    """A title as words, without who drew it and the number at its end; "" if no words are left."""
    said = re.sub(r"^Clipart by [^-]* - ", "", title)
    said = one_line(re.sub(r"[\s_\-(]*\d+$", "", said).replace("_", " "))
    return said if re.search(r"[^\W\d_]{3}", said) and "\ufffd" not in said and len(said) <= LONGEST else ""


def clipart(pngs: Path, svgs: Path, out: Path) -> Dataset:
    """The pictures whose SVG has a title that says what they are."""
    root, made = "usr/share/openclipart/", Dataset(out, "clipart")
    titles = {
        name.removeprefix(f"{root}svg/").removesuffix(".svg"): title(data)
        for name, data in deb.members(svgs)
        if name.startswith(f"{root}svg/") and name.endswith(".svg") and data
    }
    shared = Counter(titles.values())
    for name, data in _pictures(pngs, f"{root}png/"):
        stem = name.removesuffix(".png")
        given = titles.get(stem, "")
        if data is None:
            made.left["links to another picture"] += 1
        elif not given:
            made.left["without a title"] += 1
        elif shared[given] > COLLECTION:
            made.left[f"with a title that over {COLLECTION} pictures have, a collection's"] += 1
        elif not (said := caption(given)):
            made.left["with a title of no word of three letters, or of too many"] += 1
        else:
            made.add(name, data, [(stem, drawings.NAMING, said)])
    return made


def _pictures(package: Path, root: str) -> Iterator[tuple[str, bytes | None]]:
    for name, data in deb.members(package):
        if name.startswith(root) and name.endswith(".png"):
            yield name.removeprefix(root), data
