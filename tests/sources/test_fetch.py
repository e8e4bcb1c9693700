"""The parts of tests/sources that need no network: hostile packages, caption files, what becomes of pictures."""

import hashlib
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from sources import datasets, deb, fetch

from mmjax.core.errors import InputError
from mmjax.tokenizers import image as images


def ar(members):
    """An `ar` archive, as dpkg writes it."""
    out = b"!<arch>\n"
    for name, data in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def entry(name, kind=tarfile.REGTYPE, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def tar(files, extra=()):
    """A tar of name → bytes, and of entries without content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            archive.addfile(entry(name, size=len(data)), io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return out.getvalue()


@pytest.fixture
def package(tmp_path):
    """Makes a .deb of files (or of the bytes of a tar), and of entries without content."""

    def make(files=(), extra=(), name="made.deb"):
        data = files if isinstance(files, bytes) else tar(dict(files), extra)
        path = tmp_path / name
        packed = lzma.compress(data, preset=1)
        path.write_bytes(ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": packed}))
        return path

    return make


def png(pixels):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_regular_files_come_whole_and_links_empty(package):
    files = {"./usr/a.txt": b"one", "./usr/big.bin": bytes(range(256)) * 9000, "usr/ünicode.txt": b""}
    extra = [
        entry("./usr", tarfile.DIRTYPE),
        entry("./usr/out", tarfile.SYMTYPE, "../../../etc/passwd"),
        entry("./usr/hard", tarfile.LNKTYPE, "/etc/passwd"),
    ]
    expected = {name.removeprefix("./"): data for name, data in files.items()} | {"usr/out": None, "usr/hard": None}
    assert dict(deb.members(package(files, extra))) == expected


@pytest.mark.parametrize(
    "name", ["../up.png", "/etc/cron.d/x", "./a/../../b", "a//b", "a/./b", "a\\b", "a\nb", "..", "\x1b[2Jx"]
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE])
def test_names_that_lead_elsewhere_are_refused(package, name, kind):
    with pytest.raises(InputError, match=r"holds a file called .*; do not use this package") as error:
        list(deb.members(package({}, [entry(name, kind, "x")])))
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_are_refused(package, kind):
    with pytest.raises(InputError, match="'dev/x' is neither file, directory nor link"):
        list(deb.members(package({}, [entry("dev/x", kind)])))


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (deb.Limits(members=2), "over 2 files"),
        (deb.Limits(file=99), "'b' has 100 bytes, over 99"),
        (deb.Limits(total=1000), "unpacks to over 1,000 bytes"),
    ],
)
def test_bounds(package, limits, says):
    path = package({"a": b"", "b": b"x" * 100, "c": b""})
    assert len(dict(deb.members(path))) == 3
    with pytest.raises(InputError, match=says):
        list(deb.members(path, limits))


def test_a_bomb_is_left_before_it_goes_off(package):
    """A hundred megabytes of zeros in a few KB, said to be the header of a file: read no further than the bounds."""
    header = entry("bomb", tarfile.XHDTYPE, size=200 * 2**20).tobuf()
    path = package(header + bytes(100 * 2**20))
    assert path.stat().st_size < 2**16
    with pytest.raises(InputError, match="unpacks to over"):
        list(deb.members(path, deb.Limits(total=8 * 2**20)))


def test_broken_packages(package, tmp_path):
    whole = package({"a": np.random.default_rng(0).bytes(5000)}).read_bytes()
    path = tmp_path / "x.deb"
    for broken in (b"", b"no", whole[:70], whole[:300], whole[:-3000], whole[:-100] + b"x" * 100):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"x\.deb.*(package|data\.tar\.xz)"):
            list(deb.members(path))
    path.write_bytes(ar({"debian-binary": b"2.0\n", "data.tar.zst": b"odd"}))
    with pytest.raises(InputError, match=r"has no data.tar.xz \(only debian-binary, data.tar.zst\)"):
        list(deb.members(path))


def test_captions():
    data = "A frog. \nes.utf8=Una rana.\nar.utf8=ضفدع.\nca@valencia.utf8=Granota = verda\nzh_CN.utf8=\nnonsense\n"
    data += "es.utf8=Otra.\nfr=Une grenouille\nja.utf8= かえる\u200e \t\u0007だ\r\n"
    assert datasets.captions(data.encode("utf-8-sig")) == {
        "en": "A frog.",
        "es": "Una rana.",
        "ar": "ضفدع.",
        "ca@valencia": "Granota = verda",
        "ja": "かえる だ",
    }
    assert datasets.captions(b"") == {}
    with pytest.raises(InputError, match="not UTF-8"):
        datasets.captions(b"A caf\xe9.")


def test_joiners_of_scripts_that_need_them_stay():
    for said in ("क्\u200dष", "می\u200cشود"):
        assert datasets.one_line(f" {said}\n") == said


@pytest.mark.parametrize(
    ("title", "said"),
    [
        ("bat", "bat"),
        ("magnifying glass 4", "magnifying glass"),
        ("Tigre04", "Tigre"),
        ("recycle_water", "recycle water"),
        ("Clipart by Jeff Smith - Christian", "Christian"),
        ("Flag of <b>", "Flag of <b>"),
        ("M", ""),
        ("12345", ""),
        ("wo\ufffdrd", ""),
        ("a long " * 20, ""),
    ],
)
def test_titles(title, said):
    assert datasets.caption(title) == said


def test_titles_of_svgs():
    svg = "<svg><dc:title>\n Caf&#233; &amp;  bar</dc:title><dc:title>Ann</dc:title></svg>"
    assert datasets.title(svg.encode()) == "Café & bar"
    assert datasets.title(b"<svg><dc:title/><title>no</title></svg>") == ""


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def check_pictures(out, rows):
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        shown, question = user["content"]
        assert not Path(shown["image"]).is_absolute()
        assert max(images.decode(out / shown["image"]).shape[:2]) <= datasets.SIDE
        assert question["type"] == "text"


def test_stamps(package, tmp_path):
    root = "./usr/share/tuxpaint/stamps/animals/"
    small, large = noise(0, 20, 30), noise(1, 300, 150)
    made = datasets.tuxpaint(
        package(
            {
                "./usr/share/doc/x.png": png(small),
                f"{root}frog.txt": "A frog.\nes.utf8=Una rana.\nfr.utf8=a FROG\nru.utf8=Жаба.".encode(),
                f"{root}frog.png": png(small),
                f"{root}giraffe.png": png(large),
                f"{root}giraffe.txt": b"A giraffe.\nde.utf8=" + b"lang " * 30,
                f"{root}mirror.png": png(small),
                f"{root}broken.png": png(small)[:100],
                f"{root}broken.txt": b"A cup.",
                f"{root}line.png": png(noise(2, 4, 300)),
                f"{root}line.txt": b"A line.",
                f"{root}cat.svg": b"<svg/>",
            }
        ),
        tmp_path,
    )
    made.close()
    rows = rows_of(tmp_path / "tuxpaint.jsonl")
    said = {r["id"]: (r["messages"][0]["content"][1]["text"], r["messages"][1]["content"]) for r in rows}
    assert said == {
        "animals/frog/en": ("Describe this in English.", "A frog."),
        "animals/frog/es": ("Describe this in Spanish.", "Una rana."),
        "animals/frog/ru": ("Describe this in Russian.", "Жаба."),
        "animals/giraffe/en": ("Describe this in English.", "A giraffe."),
    }
    check_pictures(tmp_path, rows)
    np.testing.assert_array_equal(images.decode(tmp_path / "tuxpaint/animals/frog.png"), small)
    shrunk = images.decode(tmp_path / "tuxpaint/animals/giraffe.png")
    np.testing.assert_array_equal(shrunk, images.resize(large, 128, 64))
    left = {"SVG": 1, "without a caption": 1, "not decoded: broken": 1, "narrower than 12 pixels": 1}
    assert left.items() <= made.left.items()
    assert made.left["captions: the same as in English, so perhaps not translated"] == 1
    assert made.left["captions: over 100 characters"] == 1
    assert (made.pictures, len(made.texts)) == (2, 8)


def test_clip_art(package, tmp_path):
    png_root, svg_root = "./usr/share/openclipart/png/", "./usr/share/openclipart/svg/"
    titles = {"bat_01": "bat 1", "bat_02": "bat 1", "none": "", "m": "M", **{f"set{i}": "my theme" for i in range(5)}}
    svgs = {f"{svg_root}a/{name}.svg": f"<dc:title>{title}</dc:title>".encode() for name, title in titles.items()}
    pngs = {f"{png_root}a/{name}.png": png(noise(i, 20, 20)) for i, name in enumerate(titles)}
    pngs[f"{png_root}a/bat_02.png"] = pngs[f"{png_root}a/bat_01.png"]
    links = [entry(f"{png_root}b/bat.png", tarfile.SYMTYPE, "../a/bat_01.png")]
    made = datasets.clipart(package(pngs, links), package(svgs, name="svg.deb"), tmp_path)
    made.close()
    rows = rows_of(tmp_path / "clipart.jsonl")
    assert rows == [datasets.row("a/bat_01", "clipart/a/bat_01.png", "What is this?", "bat")]
    check_pictures(tmp_path, rows)
    assert made.left == {
        "links to another picture": 1,
        "the same picture and words twice": 1,
        "without a title": 1,
        "with a title of no word of three letters, or of too many": 1,
        "with a title that over 4 pictures have, a collection's": 5,
    }


def test_the_mirror_is_not_trusted(tmp_path, monkeypatch):
    data = b"a package"
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(data))
    with pytest.raises(InputError, match=r"has the SHA-256 .*do not use it"):
        fetch.from_mirror("openclipart-svg", tmp_path)
    monkeypatch.setitem(fetch.PACKAGES, "openclipart-svg", ("x", hashlib.sha256(data).hexdigest()))
    assert fetch.from_mirror("openclipart-svg", tmp_path).read_bytes() == data


def test_without_apt_the_mirror_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetch, "from_mirror", lambda package, folder: folder / package)
    assert fetch.download("openclipart-svg", tmp_path) == tmp_path / "openclipart-svg"


def test_sources_that_do_not_exist(capsys):
    with pytest.raises(SystemExit):
        fetch.main(["--out", "x", "clipart", "photos"])
    assert "there is no source 'photos'" in capsys.readouterr().err
