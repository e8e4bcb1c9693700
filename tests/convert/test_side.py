"""The small files beside the weights: carried as they are, and nothing else, from nowhere else."""

import os
import socket

import pytest
from convert import fake
from convert.fake import write

from mmjax.convert import side
from mmjax.convert.huggingface import load, opened, save
from mmjax.core.errors import InputError

CARRIED = {
    "tokenizer.json": b'{"a": 1}',
    "tokenizer_config.json": b"\xff not even text",
    "tokenizer.model": b"\x80\x04.",
    "chat_template.jinja": b"{{ cycler.__init__.__globals__ }}",
    "generation_config.json": b"{}",
    "preprocessor_config.json": b"",
    "LICENSE": b"MIT",
    "LICENSE.txt": b"MIT",
    "README.md": b"# A model",
}
LEFT = ["modeling_evil.py", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "trainer_state.json", ".git"]
LEFT += ["vocab.json.bak", "flax_model.msgpack", "model.onnx", "LICENSE\n.md", "setup.sh", "tokenizer.pkl"]


@pytest.fixture(autouse=True)
def family(monkeypatch):
    fake.register(monkeypatch)


@pytest.mark.parametrize("read", [load, opened])
def test_they_come_along(tmp_path, read):
    path = write(tmp_path / "in")
    for name, data in CARRIED.items():
        (path / name).write_bytes(data)
    for name in LEFT:
        (path / name).write_bytes(b"\x80\x04.")
    for name in ("qformer_tokenizer", "other_tokenizer"):  # the Q-Former's is read, others are nobody's
        (path / name).mkdir()
        for file in ("tokenizer.json", "evil.py"):
            (path / name / file).write_bytes(b"{}")
    model = read(path)
    inner = {"qformer_tokenizer/tokenizer.json": b"{}"}
    assert model.origin.files == CARRIED | inner
    save(tmp_path / "out", model)
    written = [str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert sorted(written) == sorted([*CARRIED, *inner, "config.json", "model.safetensors"])
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in CARRIED.items())


def refused(path, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        side.read(path, sorted(os.listdir(path)))
    assert "\n" not in str(caught.value)


def test_no_pipes_devices_folders_or_sockets(tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    os.mkfifo(file)
    refused(tmp_path, "tokenizer.json is not a regular file")
    os.remove(file)
    file.mkdir()
    refused(tmp_path, "tokenizer.json is not a regular file")
    file.rmdir()
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("tokenizer.json")
        refused(tmp_path, "tokenizer.json is not a regular file")


def test_links_lead_no_further_than_the_cache_of_the_hub(tmp_path):
    """Or what they lead to, a key for example, would be in the directory that somebody publishes."""
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs/9f").write_bytes(b"{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/9f")
    (snapshot / "LICENSE").symlink_to("tokenizer.json")
    assert side.read(snapshot, ["LICENSE", "tokenizer.json"]) == {"LICENSE": b"{}", "tokenizer.json": b"{}"}
    for target in (secret, "../../../id_rsa", "/dev/zero", "/etc/passwd", "nowhere/x"):
        os.remove(snapshot / "LICENSE")
        (snapshot / "LICENSE").symlink_to(target)
        refused(snapshot, "LICENSE is a link to a file elsewhere, which is not copied")
    os.remove(snapshot / "LICENSE")
    (cache / "blobs/8e").symlink_to(secret)  # a link to a link
    (snapshot / "LICENSE").symlink_to("../../blobs/8e")
    refused(snapshot, "LICENSE is a link to a file elsewhere")
    os.remove(snapshot / "LICENSE")
    (snapshot / "qformer_tokenizer").symlink_to(tmp_path, target_is_directory=True)
    refused(snapshot, "qformer_tokenizer is a link to a file elsewhere")
    os.remove(snapshot / "qformer_tokenizer")
    (snapshot / "LICENSE").symlink_to("LICENSE")
    with pytest.raises(InputError, match="LICENSE"):
        side.read(snapshot, ["LICENSE"])


def test_they_are_bounded(tmp_path, monkeypatch):
    with open(tmp_path / "README.md", "wb") as file:
        file.truncate(1 << 40)  # sparse
    refused(tmp_path, "README.md has 1,099,511,627,776 bytes, where 67,108,864 are allowed")
    os.remove(tmp_path / "README.md")
    for name in ("merges.txt", "vocab.txt"):
        (tmp_path / name).write_bytes(bytes(60))
    with monkeypatch.context() as m:
        m.setattr(side, "MAX_ALL", 100)
        refused(tmp_path, "vocab.txt has 60 bytes, where 40 are allowed")
    for i in range(64):
        (tmp_path / f"NOTICE.{i}").touch()
    refused(tmp_path, "has more than 64 files beside its weights")


@pytest.mark.parametrize(
    "name",
    [
        *("../tokenizer.json", "/etc/passwd", "evil.py", "", "a\0", ".bashrc", "x/README.md"),
        *("qformer_tokenizer/evil.py", "qformer_tokenizer/../README.md", "x/qformer_tokenizer/vocab.txt"),
    ],
)
def test_a_checkpoint_carries_no_others(name):
    with pytest.raises(InputError, match="step 3 carries the file"):
        side.refuse({"README.md": 3, name: 3}, "step 3")
    with pytest.raises(InputError, match="step 3 carries files that are too many or too large"):
        side.refuse({"README.md": side.MAX_FILE + 1}, "step 3")
