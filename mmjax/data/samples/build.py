"""Makes drawings.zip and text.model from four npm packages: run it again only to change the built-in dataset.

    pip install resvg-py
    python -m mmjax.data.samples.build            # needs npm; writes both files beside this one

Every emoji that all three styles have (skin tones and components left out) is rendered from its SVG, cropped to its
ink, so that a giraffe is tall and a bus is wide, scaled so that its longer side is 32, 40 or 48 pixels, put on white
and stored as WebP. Which of the three sizes is drawn by a hash of style and code point: the same on every machine.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

VOCAB = 1024
STYLES = {
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
}
NAMES = "emojibase-data@17.0.0"
SIDES = (32, 40, 48)
RENDERED = 256
QUALITY = 85
COMPONENT = 2  # emojibase's group of skin tones and hair styles, which are no drawings of their own


def fetch(package: str, folder: Path) -> dict[str, bytes]:
    """The JSON files of an npm package, by their path in it."""
    done = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, capture_output=True, text=True)
    with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as tar:
        return {
            member.name.removeprefix("package/"): tar.extractfile(member).read()
            for member in tar
            if member.isfile() and member.name.endswith(".json")
        }


def code_point(hexcode: str) -> str:
    """One spelling for a code point sequence: lower case, without the emoji variation selector."""
    return "-".join(part.lower() for part in hexcode.split("-") if part != "FE0F")


def side_of(style: str, code: str) -> int:
    digest = hashlib.sha256(f"{style}/{code}".encode()).digest()
    return SIDES[digest[0] % len(SIDES)]


def render(body: str, width: int, height: int, side: int) -> tuple[bytes, int, int]:
    """An icon's SVG body as (WebP bytes, height, width), cropped to its ink."""
    import resvg_py
    from PIL import Image

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED, height=RENDERED))
    ink = Image.open(io.BytesIO(png)).convert("RGBA")
    box = ink.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    ink = ink.crop(box)
    scale = side / max(ink.size)
    # At least 12 pixels: a minus sign is 1:8, and a picture thinner than a patch and a half says nothing.
    size = tuple(max(12, round(s * scale)) for s in ink.size)
    ink = ink.resize(size, Image.Resampling.LANCZOS)
    paper = Image.new("RGB", size, (255, 255, 255))
    paper.paste(ink, mask=ink.getchannel("A"))
    out = io.BytesIO()
    paper.save(out, "WEBP", quality=QUALITY, method=6)
    return out.getvalue(), size[1], size[0]


def dated(name: str) -> zipfile.ZipInfo:
    """An archive entry with a fixed date, so that the same drawings give the same file."""
    return zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))


def main() -> None:
    draw(Path(__file__).with_name("drawings.zip"))
    # Only now: the corpus is read from the archive that was just written.
    from mmjax.data import drawings
    from mmjax.tokenizers import text

    Path(__file__).with_name("text.model").write_bytes(text.train(drawings.corpus(), VOCAB))


def draw(target: Path) -> None:
    """Renders every drawing and writes the archive."""
    with tempfile.TemporaryDirectory() as folder:
        packages = {style: fetch(name, Path(folder)) for style, name in STYLES.items()}
        names = fetch(NAMES, Path(folder))
    icons = {style: json.loads(files["icons.json"]) for style, files in packages.items()}
    chars = {style: json.loads(files["chars.json"]) for style, files in packages.items()}
    groups = json.loads(names["meta/groups.json"])
    index, images = [], {}
    for entry in json.loads(names["en/data.json"]):
        code = code_point(entry["hexcode"])
        if entry.get("group", COMPONENT) == COMPONENT or not all(code in chars[style] for style in STYLES):
            continue
        concept = {
            "code": code,
            "name": entry["label"],
            "group": groups["groups"][str(entry["group"])],
            "subgroup": groups["subgroups"][str(entry["subgroup"])],
        }
        for style, pack in icons.items():
            icon = chars[style][code]
            icon = pack["aliases"][icon]["parent"] if icon not in pack["icons"] else icon
            shape = pack["icons"][icon]
            size = shape.get("width", pack["width"]), shape.get("height", pack["height"])
            image, height, width = render(shape["body"], *size, side_of(style, code))
            concept[style] = [height, width]
            images[f"{style}/{code}.webp"] = image
        index.append(concept)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(dated("drawings.json"), json.dumps(index, separators=(",", ":")), zipfile.ZIP_DEFLATED, 9)
        for name, data in sorted(images.items()):
            archive.writestr(dated(name), data)
    print(f"{len(index)} concepts, {len(images)} drawings, {target.stat().st_size / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
