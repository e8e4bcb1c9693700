"""`python -m mmjax.train finetune` on a tiny LLaVA: what it leaves, how it resumes, what it exports and refuses."""

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
import tiny_llava
from hub_configs import PUBLISHED
from PIL import Image

from mmjax.convert import adapter, huggingface, orbax, processor
from mmjax.convert.model import Origin
from mmjax.core import config, tree
from mmjax.core.errors import InputError
from mmjax.core.manifest import read_manifest
from mmjax.data.source import Holes
from mmjax.models import vlm
from mmjax.nn import lora
from mmjax.sequence import document
from mmjax.sequence.budget import Budget, Limited
from mmjax.tokenizers.resolution import Ended, Fixed
from mmjax.tokenizers.tiles import AnyRes
from mmjax.train import __main__ as program
from mmjax.train import answers, export, finetune, loop, report, start
from mmjax.train.prepare import prepare_data

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def conversation(i: int, name: str) -> dict:
    said = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": name}]
    return {"id": str(i), "image": f"{name}.png", "conversations": said}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, training and test documents."""
    path = tmp_path_factory.mktemp("finetune")
    tiny_llava.write(path / "model")
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(path / f"{name}.png")
    for file, n in (("train.json", 40), ("test.json", 4)):
        (path / file).write_text(json.dumps([conversation(i, list(COLOURS)[i % 3]) for i in range(n)]))
    return path


def arguments(place, out, *more, stages=("connector:2", "lora:3:1e-2")):
    given = ["--model", place / "model", "--data", place / "train.json", "--eval", place / "test.json"]
    shape = [
        "--packing.rows",
        2,
        "--packing.buckets",
        1,
        "--lora.rank",
        2,
        "--lora.dropout",
        0.1,
        "--answer",
        3,
        "--save-every",
        2,
    ]
    return [str(a) for a in (*given, "--stages", *stages, "--out", out, *shape, *more)]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices, make = jax.devices()[:1], loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make(cfg, devices))


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A run that was never disturbed."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        devices, make = jax.devices()[:1], loop.make_mesh
        patch.setattr(loop, "make_mesh", lambda cfg: make(cfg, devices))
        assert finetune.run(arguments(place, out, "--export", "merged")) == 0
    return out


def leaves(out, step):
    """The checksums of a step's arrays."""
    return read_manifest(out / "checkpoints", step)["leaves"]


@pytest.mark.slow
def test_what_a_run_leaves(finished):
    result = json.loads((finished / loop.RESULT).read_text())
    for judged in (result["held_out"]["test"], result["before"]["held_out"]["test"]):
        assert judged["questions"] == 4
        assert judged["tokens"] > 8
        assert 0 <= judged["exact_match"] <= 1
    assert result["held_out"]["test"]["loss"] < result["before"]["held_out"]["test"]["loss"]
    assert [stage["name"] for stage in result["stages"]] == ["connector", "lora"]
    assert result["compiles"] == 2  # one of each stage
    assert result["compiles_in_loop"] == 0
    assert [a["answer"] for a in result["answers"]["test"]] == ["red", "green", "blue", "red"]
    assert (finished / "answers.png").stat().st_size > 1000
    assert [step for step, _ in report.losses(finished)] == [1, 2, 3, 4, 5]
    last = leaves(finished, 5)
    kernels = [f"decoder/blocks/{n}/kernel" for n in ("attention/q", "attention/k", "attention/v", "attention/out")]
    kernels += [f"decoder/blocks/mlp/{n}/kernel" for n in ("gate", "up", "down")]
    moments = {name.partition("/mu/")[2] for name in last if "/mu/" in name}
    assert moments == {f"{kernel}/{part}" for kernel in kernels for part in "ab"}


@pytest.mark.slow
def test_only_what_a_stage_trains_moves(finished, place):
    before = tree.flatten(start.opened(place / "model").params)
    after = export._leaves(export.parts.stored(finished / "checkpoints", read_manifest(finished / "checkpoints", 5)))
    for name, leaf in before.items():
        # What is the base's is in no checkpoint.
        assert (name in after) is name.startswith("connector/"), name
        assert f"{name}/base" not in after
        assert name not in after or not np.array_equal(leaf, after[name]), name
    assert all(np.asarray(x).any() for name, x in after.items() if name.endswith("/kernel/b"))


@pytest.mark.slow
def test_the_merged_directory_says_what_the_run_said(finished, place, tmp_path):
    """And so do the adapter beside the base, and a checkpoint made of the directory."""
    merged = huggingface.load(finished / "merged")
    its = processor.load(finished / "merged", merged)
    batch = its.batch([document.Document("d", (document.Image(16, 16, place / "red.png"), document.Text("What?")))])
    logits = jax.jit(vlm.logits, static_argnums=2)
    with jax.default_matmul_precision("highest"):
        whole = logits(merged.params, batch, merged.cfg)
        export.export(finished, tmp_path / "adapter", "adapter")
        apart = adapter.load(tmp_path / "adapter", huggingface.load(place / "model"))
        assert len(lora.parted(apart.params)[1]) == 7
        np.testing.assert_allclose(logits(apart.params, batch, apart.cfg), whole, atol=1e-4)
        base = huggingface.load(place / "model")
        assert np.abs(logits(base.params, batch, base.cfg) - whole).max() > 1e-2
    said = json.loads((tmp_path / "adapter" / adapter.CONFIG).read_text())
    assert (said["r"], said["lora_alpha"], len(said["target_modules"])) == (2, 32, 14)
    assert said["lora_dropout"] == adapter.config(tmp_path / "adapter").dropout == 0.1
    linear = [f"model.multi_modal_projector.linear_{n}" for n in (1, 2)]
    assert said["modules_to_save"] == linear
    assert (finished / "merged" / "tokenizer.json").read_bytes() == (place / "model" / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_stopped_and_resumed_is_bit_identical(finished, place, tmp_path, monkeypatch):
    """Where a stage ends, and in the middle of the next."""
    real = report.Progress.update
    for stop_after in (0, 2):  # one more runs while a step is read
        out = tmp_path / str(stop_after)

        def update(self, step, *rest, at=stop_after):
            real(self, step, *rest)
            if step == at + 1:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(report.Progress, "update", update)
        assert finetune.run(arguments(place, out)) == 143
        assert report.losses(out)[-1][0] < 5
        monkeypatch.setattr(report.Progress, "update", real)
        assert finetune.run(arguments(place, out)) == 0
        assert report.losses(out) == report.losses(finished)
        assert leaves(out, 5) == leaves(finished, 5)
        a, b = (json.loads((o / loop.RESULT).read_text()) for o in (finished, out))
        assert a["answers"] == b["answers"]
        assert a["before"] == b["before"]


def test_a_checkpoint_is_as_good_as_its_directory(place, tmp_path):
    orbax.write(tmp_path / "base", huggingface.opened(place / "model"))
    (one, its), (other, others) = start.both(place / "model"), start.both(tmp_path / "base")
    assert (one.cfg, its.fingerprint) == (other.cfg, others.fingerprint)
    for name, leaf in tree.flatten(one.params).items():
        np.testing.assert_array_equal(tree.flatten(other.params)[name], leaf, err_msg=name)


def test_the_config_comes_from_the_directory(place, tmp_path):
    cfg, to = finetune.config_of(arguments(place, tmp_path / "out", "--stages.1.steps", "7", "--export", "adapter"))
    assert to == "adapter"
    assert cfg.steps == 9
    assert cfg.model.decoder.vocab == start.opened(place / "model").cfg.decoder.vocab
    assert cfg.resolution.patch == 8
    assert cfg.lora == lora.Config(2, 32.0, dropout=0.1)
    assert {source.place for source in cfg.data.sources + cfg.data.evaluation} == {"bare"}  # the template's newline
    two = arguments(place, tmp_path / "out", stages=("connector:2",))
    two[two.index("--data") + 1] += "=0.5"
    with pytest.raises(SystemExit):  # without a stage that trains adapters there are no fields of them
        finetune.config_of(two)
    del two[two.index("--lora.rank") : two.index("--lora.rank") + 4]
    cfg, _ = finetune.config_of(two)
    assert (cfg.lora, cfg.data.sources[0].weight) == (None, 0.5)


def test_what_is_learnt_ends_as_answers_do(place):
    _, its = start.both(place / "model")
    said = document.Document("d", (document.Text("Hi"), document.Text("red", "assistant", train=True)))
    laid = start.layout_of(its)(said)
    assert its.layout(said).pieces == laid.pieces[:-1]
    assert (laid.pieces[-1].ids, laid.pieces[-1].train) == (its.stops, True)
    asked = document.Document("d", said.spans[:1])
    assert start.layout_of(its)(asked) == its.layout(asked)
    ended = dataclasses.replace(its, stops=(*its.stops, laid.pieces[-2].ids[-1]))  # the template writes one of them
    assert start.layout_of(ended)(said) == ended.layout(said)


def test_a_budget_of_documents(place, tmp_path):
    cfg, _ = finetune.config_of(arguments(place, tmp_path / "out", "--budget.tokens", "512"))
    assert prepare_data(cfg).training[0].tokens.shape == (2, cfg.packing.tokens)
    _, its = start.both(place / "model")
    spans = (document.Image(16, 16, b""), document.Image(16, 16, b""), document.Text("Hi"))
    said = document.Document("d", (*spans, document.Text("red", "assistant", train=True)))
    lay = start.layout_of(its)
    whole, less = lay(said).tokens, lay(document.Document("d", said.spans[1:])).tokens
    assert Limited(lay, Budget(tokens=whole), its.resolution, its.clips)(said) == lay(said)
    with pytest.raises(InputError, match=f"over the budget of {less} tokens"):
        Limited(lay, Budget(tokens=less), its.resolution, its.clips)(said)
    with pytest.raises(InputError, match="a chat template leaves nothing out"):
        Limited(lay, Budget(tokens=less, over=("images",)), its.resolution)(said)


def test_a_resolution_reaches_pictures_that_are_not_alone(place, tmp_path, monkeypatch):
    """LLaVA-OneVision shows each of several pictures once, as large as a tile of a single one."""
    model, its = start.both(place / "model")
    patch, tile = its.patch, its.resolution.height
    single, others = AnyRes(patch, tile, newline=False), Ended(Fixed(patch, tile, tile, "pad", fill=(1, 2, 3)))
    given = dataclasses.replace(its, resolution=single, several=others)
    monkeypatch.setattr(start, "both", lambda path: (model, given))
    plain, _ = finetune.config_of(arguments(place, tmp_path / "out"))
    assert start.processor(plain).several == others
    cfg, _ = finetune.config_of(arguments(place, tmp_path / "out", "--resolution.filter", "bilinear"))
    used = start.processor(cfg)
    assert (used.resolution.filter, used.several) == (
        "bilinear",
        Ended(dataclasses.replace(others.whole, filter="bilinear")),
    )
    other = start.processor(dataclasses.replace(cfg, resolution=Fixed(patch, tile, tile)))
    assert other.several is None  # of another kind: all pictures are shown by it


def test_questions_and_what_is_exact():
    user, said = document.Text("a"), document.Text("No", "assistant", train=True)
    other = document.Text("yes", "assistant")
    documents = [
        document.Document("1", (user, said)),
        document.Document("2", (user, said, user, dataclasses.replace(said, text="Yes"))),
        document.Document("3", (user, other)),  # is not to be learnt
        document.Document("4", (document.Text("b", "document", train=True),)),
        document.Document("5", (user, said, user)),
    ]
    found = answers.asked(documents)
    assert [(q.document.id, q.answer, len(q.document.spans)) for q in found] == [("1", "No", 1), ("2", "Yes", 3)]
    assert [q.question for q in found] == [user.text, user.text]
    assert answers.equal(" YES\n", "Yes")
    assert not answers.equal("yes.", "yes")


@pytest.mark.parametrize(
    ("most", "unread", "said"),
    [
        (0, (), "a 75% of 4"),
        (3, (), "a 67% of 3 (of 4 the first 3 were asked)"),
        (3, ("1",), "a 50% of 2 (of 4 the first 3 were asked; 1 cannot be read)"),
        (0, ("0", "1", "2", "3"), ""),
    ],
)
def test_which_questions_are_asked(place, tmp_path, monkeypatch, most, unread, said):
    """The first so many, without those whose pictures cannot be read."""
    monkeypatch.setattr(answers, "Session", lambda *model, **how: None)
    monkeypatch.setattr(answers.Answers, "_said", lambda self, session, asked: ["no" for q in asked])
    cfg, _ = finetune.config_of(arguments(place, tmp_path, "--questions", str(most), "--packing.holes", "4"))
    losses = answers.HeldOut({})
    losses.sources = {"a": Broken(unread)}
    user, right = document.Text("q"), ("no", "no", "yes", "no")
    questions = [answers.Asked(document.Document(str(n), (user,)), a) for n, a in enumerate(right)]
    judge = answers.Answers(losses, {"a": questions}, start.both(place / "model")[1])
    judge.cfg, judge.mesh = cfg, None
    monkeypatch.setattr(losses, "judge", lambda params, out: {"held_out": {"a": {"loss": 1.0}}})
    judged = judge.judge({}, tmp_path)
    assert [a["document"] for a in judged["answers"].get("a", [])] == [
        str(n) for n in range(most or 4) if str(n) not in unread
    ]
    assert judge.said(judged).partition("exact: ")[2] == said


class Broken:
    """A source that could not read some documents."""

    def __init__(self, ids):
        self.holes = Holes(len(ids))
        for n in ids:
            self.holes.add(n, InputError("no picture."))


def messages(place, name, *records):
    (place / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return place / name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "nowhere is neither a Hugging Face directory"),
        ({"--stages": "lora:0"}, "at least 1 step"),
        ({"--stages": "conector:3"}, "did you mean 'connector'"),
        ({"--data": "silent.jsonl"}, "In none of the 2 first documents of .* is there anything to learn"),
        ({"--data": "train.json=much"}, "The weight of .* is 'much'"),
        ({"--data": "missing.json"}, "missing.json"),
        ({"--steps": "4"}, "leave --steps out"),
        ({"--optimizer.learning_rate": "5e-5"}, r"say it in the stage, as lora:3:5e-05\.$"),
        ({"--data.epochs": "1"}, r"give --stages whose steps add up to \d+, or mix"),
        ({"--export": "adapter", "--stages": "lora+vision/class:1"}, "class_embedding is trained, a parameter of no"),
        ({"--export": "adapter", "--stages": "lora+decoder:1"}, "is trained beside its adapter"),
        ({"--data.convention": "chatml"}, "its own tokenizer and template"),
        ({"--model.newline": "True"}, "is not the config's"),
        ({"--lora.targets": "decoder/blocks/atention"}, "did you mean 'decoder/blocks/attention'"),
        ({"--questions": "-1"}, "questions is -1; give how many"),
        ({"--packing.tokens": "16"}, "more than a row of 16"),
    ],
)
def test_refused_before_anything_is_written(place, tmp_path, change, message, monkeypatch, capsys):
    monkeypatch.chdir(place)
    user = {"messages": [{"role": "user", "content": "Hello."}]}
    messages(place, "silent.jsonl", user, user)
    given = arguments(place, tmp_path / "out", stages=("lora:3",))
    for name, value in change.items():
        if name in given:
            given[given.index(name) + 1] = value
        else:
            given += [name] if value == "True" else [name, value]
    monkeypatch.setattr(sys, "argv", ["train", "finetune", *given])
    with pytest.raises(SystemExit) as ended:
        config.main(program.run)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_what_changes_no_number_may_differ_from_the_directory(place, tmp_path):
    cfg, _ = finetune.config_of(arguments(place, tmp_path / "out", "--model.decoder.blocks.remat", "attention"))
    assert cfg.model.decoder.blocks.remat == "attention"
    assert start.processor(cfg).vocab.size == cfg.model.decoder.vocab


def test_every_block_of_an_encoder_decoder_is_adapted_by_default():
    cfg = Origin.of(PUBLISHED["Salesforce/blip2-flan-t5-xl"][0]).found.cfg
    names = lora.targets(vlm.spec(cfg), lora.Config(targets=finetune._targets(cfg)))
    assert len(names) == (4 + 3) + (4 + 4 + 3)  # attention and MLP; the answer's blocks look at the others, too
    cfg = Origin.of(PUBLISHED["llava-hf/llava-1.5-7b-hf"][0]).found.cfg
    assert finetune._targets(cfg) == lora.TARGETS


def test_layers_of_cross_attention_are_adapted_by_default():
    for name in ("meta-llama/Llama-3.2-11B-Vision", "HuggingFaceM4/idefics-9b"):
        cfg = Origin.of(PUBLISHED[name][0]).found.cfg
        names = lora.targets(vlm.spec(cfg), lora.Config(targets=finetune._targets(cfg)))
        crossed = [n.removeprefix("decoder/cross/") for n in names if n.startswith("decoder/cross/")]
        products = ("q", "k", "v", "out", "mlp/gate", "mlp/up", "mlp/down")
        assert (len(names), sorted(crossed)) == (14, sorted(f"{n}/kernel" for n in products))


def test_no_model_and_no_data():
    with pytest.raises(InputError, match="Give --model DIR"):
        finetune.run([])
    with pytest.raises(InputError, match="Give --data PATH"):
        finetune.run(["--model", "x"])


def test_an_export_that_is_there_already(place, tmp_path):
    (tmp_path / "out" / "merged").mkdir(parents=True)
    with pytest.raises(InputError, match="is there already"):
        finetune.run(arguments(place, tmp_path / "out", "--export", "merged"))


@pytest.mark.parametrize("number", [0, 1])
def test_only_the_first_process_exports(place, tmp_path, monkeypatch, number):
    """Which one that is is known as long as they are joined."""
    inside, done = [], []

    @contextlib.contextmanager
    def joined(cfg):
        inside.append(number)
        yield
        inside.clear()

    def from_first(do):
        return do() if inside == [0] else None

    monkeypatch.setattr(finetune.cluster, "joined", joined)
    monkeypatch.setattr(finetune.processes, "from_first", from_first)
    monkeypatch.setattr(loop, "run", lambda cfg: 0)
    monkeypatch.setattr(export, "export", lambda *given, **more: done.append((given, bool(inside))))
    out = tmp_path / "out"
    assert finetune.run(arguments(place, out, "--export", "merged")) == 0
    assert done == ([((out, out / "merged", "merged"), True)] if number == 0 else [])


def test_no_run_to_export(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}"):
        export.export(tmp_path, tmp_path / "x")


@pytest.mark.slow
def test_what_cannot_be_exported(finished, place, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        export.export(finished, finished / "merged", "merged")
    with pytest.raises(InputError, match="step 1 "):
        export.export(finished, tmp_path / "x", "merged", step=1)
    tiny_llava.write(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"not the one that .* started from"):
        export.export(finished, tmp_path / "x", "merged", base=tmp_path / "other")
    shutil.copytree(place / "model", tmp_path / "moved")
    export.export(finished, tmp_path / "x", "merged", base=tmp_path / "moved")
    for path in (finished / "merged").iterdir():
        assert (tmp_path / "x" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_base_that_was_moved_or_is_another(finished, place, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "checkpoints" / "done" / "5.json").unlink()
    tiny_llava.write(tmp_path / "model", seed=1)
    given = arguments(place, tmp_path / "out")
    given[given.index("--model") + 1] = str(tmp_path / "model")
    with pytest.raises(InputError, match=r"is not the one that .* began with"):
        finetune.run(given)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(place / "model", tmp_path / "model")
    assert finetune.run(given) == 0
    assert report.losses(tmp_path / "out") == report.losses(finished)
