"""Every kind of file: random access is iteration, the kept index is a fresh one, converting loses nothing."""

import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mmjax.core.errors import InputError
from mmjax.data import __main__ as program
from mmjax.data import convert
from mmjax.data.formats import draft, index, open_dataset, packed
from mmjax.data.source import load
from mmjax.sequence.document import Audio, Document, Encoded, Image, Text, Video

COUNT = 25


def png(n):
    out = io.BytesIO()
    PIL.Image.new("RGB", (n + 3, n + 2), (n, 2 * n, 7)).save(out, "PNG")
    return out.getvalue()


def record(n):
    return {
        "id": f"r{n}",
        "image": f"{n}.png",
        "conversations": [
            {"from": "human", "value": f'<image>\nWhat "is" {{[this]}}, {n}?\\'},
            {"from": "gpt", "value": f"é😀 {n}" * (n + 1)},
        ],
    }


def add(tar, name, data, **changes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def make_json(folder, numbers, name):
    path = folder / f"{name}.json"
    path.write_text(json.dumps([record(n) for n in numbers], ensure_ascii=False, indent=2))
    return path


def make_jsonl(folder, numbers, name):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(record(n)) for n in numbers))
    return path


def make_parquet(folder, numbers, name):
    path = folder / f"{name}.parquet"
    rows = [record(n) | {"image": {"bytes": png(n), "path": None}} for n in numbers]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=5, write_page_checksum=True)
    return path


def make_tar(folder, numbers, name):
    path = folder / f"{name}.tar"
    with tarfile.open(path, "w") as tar:
        for n in numbers:
            add(tar, f"dir/{n:04d}.png", png(n))
            add(tar, f"dir/{n:04d}.json", json.dumps(record(n)).encode())
    return path


def make_array_record(folder, numbers, name):
    path = folder / f"{name}.array_record"
    convert.write([document(n) for n in numbers], path)
    return path


MAKE = {
    "json": make_json,
    "jsonl": make_jsonl,
    "parquet": make_parquet,
    "tar": make_tar,
    "array_record": make_array_record,
}


@pytest.fixture
def folder(tmp_path):
    for n in range(COUNT):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    return tmp_path


def document(n):
    words = record(n)["conversations"]
    spans = (Image(n + 2, n + 3, png(n)), Text(words[0]["value"][7:]), Text(words[1]["value"], "assistant", True))
    return Document(f"d/r{n}", spans)


def plain(document):
    """With pictures as their bytes, and other media as lists."""
    out = []
    for s in document.spans:
        if not isinstance(s, Text):
            source = s.source.read() if isinstance(s.source, Encoded) else s.source
            if isinstance(source, os.PathLike):
                source = source.read_bytes()
            if not isinstance(source, bytes):
                array = source if isinstance(source, np.ndarray) else source()
                source = (str(array.dtype), array.tolist())
            s = {f: getattr(s, f) for f in s.__dataclass_fields__} | {"type": type(s), "source": source}
        out.append(s)
    return document.id, out


@pytest.mark.parametrize("kind", MAKE)
def test_every_kind_of_file_gives_the_same_documents(folder, kind):
    data = open_dataset(MAKE[kind](folder, range(COUNT), "d"))
    wanted = [plain(document(n)) for n in range(COUNT)]
    assert len(data) == COUNT
    assert [plain(d) for d in data] == wanted
    order = np.random.default_rng(0).permutation(COUNT)
    assert [plain(data[int(n)]) for n in order] == [wanted[n] for n in order]
    assert [plain(d) for d in data[3:-1:4]] == wanted[3:-1:4]
    assert plain(data[-1]) == wanted[-1]
    with pytest.raises(IndexError):
        data[COUNT]
    again = pickle.loads(pickle.dumps(data))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda n: plain(again[n % COUNT]), range(3 * COUNT))) == 3 * wanted
    read = [load(s) for d in data[:2] for s in d.images]  # as the source of batches does
    assert [r.shape for r in read] == [(2, 3, 3), (3, 4, 3)]


@pytest.mark.parametrize("kind", MAKE)
def test_the_kept_index_is_a_fresh_one(folder, kind, monkeypatch):
    path = MAKE[kind](folder, range(COUNT), "d")
    fresh = open_dataset(path, cache=False)
    assert not list(folder.glob("*.mmjax-index"))
    open_dataset(path)
    assert os.listdir(folder).count(f"{path.name}.mmjax-index") == 1
    monkeypatch.setattr("mmjax.data.formats.index.make", None)  # what is kept is used
    kept = open_dataset(path)
    assert kept.fingerprint == fresh.fingerprint
    assert kept.schema == fresh.schema
    assert [plain(d) for d in kept] == [plain(d) for d in fresh]
    for name in fresh.entries.__dataclass_fields__:
        assert np.array_equal(getattr(kept.entries, name), getattr(fresh.entries, name))


def test_an_index_that_is_out_of_date_is_made_again(folder, caplog):
    path = make_jsonl(folder, range(5), "d")
    first = open_dataset(path)
    index = folder / "d.jsonl.mmjax-index"
    text, stat = path.read_bytes(), path.stat()
    # The same size and time, other bytes.
    path.write_bytes(text.replace(b"What", b"Whet"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = open_dataset(path)
    assert "out of date" in caplog.text
    assert second.fingerprint != first.fingerprint
    with pytest.raises(InputError, match=r"d\.jsonl, byte 0: the record is not the one that was indexed"):
        first[0]
    for damage in (lambda b: b[:-3], lambda b: b[:60] + b"\xff" + b[61:], lambda b: b"", lambda b: b[:100]):
        caplog.clear()
        index.write_bytes(damage(index.read_bytes()))
        assert [plain(d) for d in open_dataset(path)] == [plain(d) for d in second]
        assert "made again" in caplog.text
    caplog.clear()
    # Of these records both make the same documents.
    assert open_dataset(path, place="front").fingerprint == second.fingerprint
    assert "out of date" in caplog.text
    with path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(InputError, match="changed while in use"):
        second[0]


FRAMES = np.zeros((2, 3, 5, 3), np.uint8)
ALIKE = [
    [Text("a", "assistant", True), Text("a", "assistant", False), Text("a", "assistant", True, True), Text("a")],
    [Text("ab"), Text("a")],
    [Image(3, 5, FRAMES[0]), Image(5, 3, FRAMES[0])],
    [
        Video(2, 3, 5, 2.0, FRAMES),
        Video(2, 3, 5, 3.0, FRAMES),
        Video(3, 2, 5, 2.0, FRAMES),
        Video(2, 5, 3, 2.0, FRAMES),
    ],
    [Audio(7, 8000, FRAMES), Audio(7, 16000, FRAMES), Audio(8, 8000, FRAMES)],
    [draft.Picture(b"", size=(2, 3)), draft.Picture(b"", size=(3, 2)), draft.Picture(b"")],
]


@pytest.mark.parametrize("spans", ALIKE, ids=lambda spans: type(spans[0]).__name__)
def test_a_document_that_differs_in_what_is_declared_is_another(spans):
    crcs = {index.crc(draft.Draft("d", (Text("before"), span))) for span in spans}
    assert len(crcs) == len(spans)


def test_other_pictures_of_the_same_sizes_are_another_dataset(tmp_path):
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "d.jsonl"
    path.write_text(json.dumps(record(3)))

    def opened(folder, color, kind="PNG"):
        (tmp_path / folder).mkdir()
        PIL.Image.new("RGB", (6, 5), color).save(tmp_path / folder / "3.png", kind)
        return open_dataset(path, root=tmp_path / folder)

    reds = opened("reds", "red")
    blues = opened("blues", "blue")
    again = opened("again", "red")
    assert reds.sizes(0) == blues.sizes(0)
    assert reds.fingerprint == again.fingerprint != blues.fingerprint
    assert opened("jpeg", "red", "JPEG").fingerprint != reds.fingerprint
    # Also where only the end differs, as the length tells; and it is known again from the kept index.
    (tmp_path / "again" / "3.png").write_bytes((tmp_path / "reds" / "3.png").read_bytes() + bytes(5000))
    assert open_dataset(path, root=tmp_path / "again", cache=False).fingerprint != reds.fingerprint
    assert open_dataset(path, root=tmp_path / "reds").fingerprint == reds.fingerprint


@pytest.mark.parametrize("kind", ["array_record", "parquet"])
def test_a_record_is_read_once_for_all_its_pictures(tmp_path, monkeypatch, kind):
    texts = (Text("a"), Text("b", "assistant", True))
    documents = [
        Document(f"{n}", (*(Image(n + i + 2, n + i + 3, png(n + i)) for i in range(3)), *texts)) for n in (0, 4)
    ]
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rows = [{"images": [{"bytes": i.source} for i in d.images], "messages": said} for d in documents]
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        convert.write(documents, path)
    data = open_dataset(path, cache=False)
    read, reads = type(data.container).read, []
    monkeypatch.setattr(type(data.container), "read", lambda self, a: reads.append(a) or read(self, a))
    wanted = [[plain(d)[1][:3] for d in documents], [plain(d)[1][:3] for d in documents[::-1]]]
    assert [plain(data[n])[1][:3] for n in (0, 1)] == wanted[0]
    assert len(reads) == 2
    # Both in hand, in turn and in another thread: whatever is kept, each picture is its own document's.
    pair = [data[0], data[1]]
    assert [plain(d)[1][:3] for d in pair[::-1]] == wanted[1]
    found = [[load(i) for i in images] for images in zip(*(d.images for d in pair), strict=True)]
    assert [[p.shape[0] for p in images] for images in found] == [[2, 6], [3, 7], [4, 8]]
    with ThreadPoolExecutor(1) as pool:
        assert list(pool.map(lambda d: plain(d)[1][:3], pair)) == wanted[0]


def test_an_index_names_no_shard_that_there_is_not(folder):
    data = open_dataset(make_jsonl(folder, range(2), "d"))
    data.entries.address.setflags(write=True)
    for address in [(9, 0, 5), (0, 10**15, 5), (0, 0, 2**50)]:
        data.entries.address[0] = address
        with pytest.raises(InputError):
            data[0]


@pytest.mark.parametrize("kind", MAKE)
def test_shards_in_a_folder_and_by_a_pattern(folder, kind):
    (folder / "s").mkdir()
    for n in range(COUNT):
        (folder / "s" / f"{n}.png").write_bytes(png(n))
    for i in range(3):
        MAKE[kind](folder / "s", range(8 * i, min(8 * i + 8, COUNT)), f"part-{i}")
    whole = [plain(document(n))[1] for n in range(24)]
    data = open_dataset(folder / "s")
    assert [plain(d)[1] for d in data] == whole
    assert data.place(8).startswith("part-1.")
    assert (folder / "s.mmjax-index").exists()
    found = open_dataset(folder / "s" / "part-[12].*", cache=False)
    assert [plain(d)[1] for d in found] == whole[8:]
    assert open_dataset(f"{folder}/s/part-*", cache=False).name == "part"


def test_what_is_no_dataset(folder):
    make_jsonl(folder, range(2), "d")
    (folder / "x.txt").write_text("x")
    (folder / "empty").mkdir()
    for path, says in [
        (folder / "x.txt", "no known kind"),
        (folder / "no.jsonl", "no file"),
        (folder / "empty", "has no file that ends in"),
        (folder / "*.tar", "has no file that ends in"),
        ("http://169.254.169.254/d.jsonl", "is an address"),
        ("s3://bucket/d.jsonl", "is an address"),
    ]:
        with pytest.raises(InputError, match=says):
            open_dataset(path)
    make_json(folder, range(2), "e")
    with pytest.raises(InputError, match="several kinds"):
        open_dataset(folder)
    with pytest.raises(InputError, match="is not a folder"):
        open_dataset(folder / "d.jsonl", root=folder / "no")


def everything():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    frames = rng.integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    clip = rng.normal(size=7).astype(np.float32)
    return Document(
        "any id / é",
        (
            Text("s <image>\0", "system"),
            Image(2, 3, png(0), "user", True),
            Image(3, 4, pixels),
            Image(3, 4, lambda: pixels),
            Image(4, 5, Encoded(lambda: png(2))),
            Video(2, 3, 5, 29.97, frames),
            Video(2, 3, 5, 2.0, lambda: frames),
            Text("", "assistant", False, True),
            Audio(7, 16000, clip, "document"),
            Text("x", "document", True),
        ),
    )


def test_a_document_with_everything_in_it_comes_back(tmp_path):
    convert.write([everything(), document(1)], tmp_path / "a.array_record")
    data = open_dataset(tmp_path / "a.array_record")
    assert data.schema == "mmjax"
    assert [plain(d) for d in data] == [plain(everything()), plain(document(1))]
    assert packed.encode(data[0]) == packed.encode(everything())


@pytest.mark.parametrize("kind", MAKE)
def test_converting_loses_nothing(folder, kind, capsys):
    path = MAKE[kind](folder, range(COUNT), "d")
    wanted = [plain(d) for d in open_dataset(path)]
    assert program.main(["convert", str(path), str(folder / "one.array_record")]) == 0
    assert f"{COUNT} documents in 1 file" in capsys.readouterr().out
    assert [plain(d) for d in open_dataset(folder / "one.array_record")] == wanted
    args = ["convert", str(path), str(folder / "many.array_record"), "--shard-bytes", "2000"]
    assert program.main(args) == 0
    assert len(os.listdir(folder / "many.array_record")) > 2
    assert [plain(d) for d in open_dataset(folder / "many.array_record")] == wanted
    with pytest.raises(InputError, match="exists"):
        program.main(args)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("shards", [None, 10])
@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError("x"), OSError(28, "No space left on device")])
def test_nothing_half_written_is_left(tmp_path, shards, error):
    def fail():
        raise error

    documents = [document(1), Document("bad", (Image(2, 3, fail),))]
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else InputError):
        convert.write(documents, tmp_path / "a.array_record", shard_bytes=shards)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_refused(tmp_path):
    for wrong, says in [
        (Document("a", (Text("\ud800"),)), "'a' cannot be written"),
        (Document("a", (Video(1, 2, 2, float("nan"), np.zeros((1, 2, 2, 3), np.uint8)),)), "'a' cannot be written"),
        (Document("a", (Image(2, 2, np.zeros((2, 3, 3), np.uint8)),)), r"span 0: declared as uint8\[2, 2, 3\] but is"),
        (Document("a", (Audio(2, 8000, np.zeros(3, np.float32)),)), "declared as"),
    ]:
        with pytest.raises(InputError, match=says):
            convert.write([wrong], tmp_path / "a.array_record")
    with pytest.raises(InputError, match="no documents"):
        convert.write([], tmp_path / "a.array_record")
    with pytest.raises(InputError, match="does not end in"):
        convert.write([document(0)], tmp_path / "a.tar")


def test_the_index_command(folder, capsys):
    path = make_jsonl(folder, range(COUNT), "d")
    assert program.main(["index", str(path)]) == 0
    out = capsys.readouterr().out
    lines = dict(line.rsplit(maxsplit=1) for line in out.splitlines()[1:5])
    assert lines == {"documents": "25", "pictures": "25", "pictures not there": "0", "places left out": "0"}
    assert "picture: width".ljust(26) + "".join(f"{v:>12}" for v in (3, 4, 15, 26, 27)) in out
    with path.open("a") as file:
        file.write('\n{"image": "../x.png", "conversations": [{"from": "human", "value": "<image>"}]}\n')
    assert program.main(["index", str(path), "--out", str(folder / "i")]) == 1
    out = capsys.readouterr().out
    assert "left out:\n  d.jsonl, byte" in out
    assert "'../x.png' leads out" in out
    with pytest.raises(InputError, match=r"d\.jsonl, byte .*leads out.*Give errors=1"):
        open_dataset(path, cache=folder / "i")
    assert len(open_dataset(path, cache=folder / "i", errors=1)) == COUNT
    urls = {"http://a/b.png": "1.png"}
    (folder / "urls").write_text(json.dumps(urls))
    (folder / "o.jsonl").write_text(json.dumps({"images": [*urls], "texts": [None]}))
    assert program.main(["index", str(folder / "o.jsonl"), "--images", str(folder / "urls")]) == 0


def test_the_program(folder):
    def run(*arguments):
        command = [sys.executable, "-m", "mmjax.data", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})

    path = make_jsonl(folder, range(3), "d")
    done = run("index", path)
    assert (done.returncode, done.stdout.count("documents")) == (0, 1)
    assert "read as llava" in done.stderr
    done = run("index", folder / "no.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mmjax: there is no file")
    assert run("index").returncode == 2


def test_the_schema_that_was_guessed_is_said(folder, caplog):
    with caplog.at_level(logging.INFO, "mmjax"):
        open_dataset(make_jsonl(folder, range(2), "d"))
    assert "d.jsonl, byte 0: read as llava" in caplog.text


def test_a_folder_that_cannot_be_written_to(folder, caplog, monkeypatch):
    def full(*_):
        raise InputError("cannot write")

    monkeypatch.setattr("mmjax.data.formats.index.write_atomic", full)
    assert len(open_dataset(make_jsonl(folder, range(2), "d"))) == 2
    assert "the index is not kept: cannot write" in caplog.text
