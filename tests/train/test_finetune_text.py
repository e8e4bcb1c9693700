"""Fine-tuning language models alone, a decoder and an encoder–decoder: without a picture anywhere, in the same way."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llava
import tokenizer_files
from PIL import Image as Pictures
from tiny_llava import BLOCKS, CONTROLS

from mmjax.connectors import mlp
from mmjax.convert import adapter, huggingface
from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.models import decoder, vlm
from mmjax.nn import lora
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Bucket
from mmjax.sequence.document import Document, Text
from mmjax.tokenizers.vocab import Vocab
from mmjax.train import export, finetune, loop, prepare, stages, start
from mmjax.train.step import loss_fn

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}<|endoftext|>"
TEMPLATE += "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
ANSWERS = {"red": "green", "blue": "red", "green": "blue"}


def llama(path):
    spec = tokenizer_files.letters()
    config = {"model_type": "llama", "vocab_size": 320, "num_key_value_heads": 1, "tie_word_embeddings": True, **BLOCKS}
    files = {"tokenizer.json": spec, "tokenizer_config.json": CONTROLS | {"chat_template": TEMPLATE}}
    return tiny_llava.saved(path, config, files)


def t5(path):
    spec, end = tokenizer_files.letters(), "<|endoftext|>"
    number = next(t["id"] for t in spec["added_tokens"] if t["content"] == end)
    last = {"SpecialToken": {"id": end, "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, last],
        "pair": [],
        "special_tokens": {end: {"id": end, "ids": [number], "tokens": [end]}},
    }
    config = {"model_type": "t5", "vocab_size": 320, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    config |= {"num_heads": 2, "decoder_start_token_id": number, "pad_token_id": number, "eos_token_id": number}
    return tiny_llava.saved(path, config, {"tokenizer.json": spec, "tokenizer_config.json": CONTROLS})


MODELS = {"llama": llama, "t5": t5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    for name, write in MODELS.items():
        write(path / name)
    told = [said(i, *list(ANSWERS.items())[i % 3]) for i in range(60)]
    (path / "train.jsonl").write_text("".join(json.dumps(t) + "\n" for t in told))
    (path / "test.jsonl").write_text("".join(json.dumps(t) + "\n" for t in told[:4]))
    return path


def said(i, question, answer):
    turns = [{"role": "user", "content": f"What is {question}?"}, {"role": "assistant", "content": answer}]
    return {"id": str(i), "messages": turns}


def arguments(place, name, out, *more, stages=("lora:3:1e-2",)):
    given = ["--model", place / name, "--data", place / "train.jsonl", "--eval", place / "test.jsonl"]
    given += ["--stages", *stages, "--out", out, "--packing.rows", 2, "--answer", 3, "--save-every", 9]
    return [str(a) for a in (*given, *(("--lora.rank", 2) if "lora" in stages[0] else ()), *more)]


@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_alone_is_a_model_that_sees_nothing(place, tmp_path, name):
    """Its parameters lie where those of a vision-language model's do, and batches have no room for pictures."""
    cfg, _ = finetune.config_of(arguments(place, name, tmp_path / "out"))
    whole, alone = start.opened(place / name), huggingface.load(place / name)
    assert (cfg.resolution, cfg.model) == (None, vlm.Config(None, None, alone.cfg))
    leaves = tree.flatten(whole.params)
    assert (
        {f"decoder/{n}" for n in tree.flatten(alone.params)}
        == leaves.keys()
        == tree.flatten(vlm.spec(cfg.model)).keys()
    )
    for leaf, x in tree.flatten(alone.params).items():
        np.testing.assert_array_equal(leaves[f"decoder/{leaf}"], x)
    (part,) = stages.parts(cfg)
    assert part.cfg.lora.targets == (lora.TARGETS if name == "llama" else finetune._targets(cfg.model))
    adapter.refuse(whole, lora.targets(vlm.spec(cfg.model), cfg.lora))  # its table names the leaves where they lie
    source = prepare.prepare_data(cfg).training
    batch = source[0]
    assert (batch.patches.shape[1:], batch.grid.shape[1]) == ((0, 0), 0)
    assert len(source.plan.buckets) == 1


def test_the_loss_is_the_decoder_s_own(place, tmp_path):
    cfg, _ = finetune.config_of(arguments(place, "llama", tmp_path / "out"))
    batch, model = prepare.prepare_data(cfg).training[0], huggingface.load(place / "llama")

    @jax.jit
    def both(params, batch):
        see = {name: getattr(batch, name) for name in ("order", "lo", "hi", "position")}
        hidden = decoder.apply(params, decoder.embed(params, batch.tokens, model.cfg), model.cfg, **see)
        scores = jax.nn.log_softmax(decoder.logits(params, hidden, model.cfg))
        own = jnp.take_along_axis(scores, batch.target[..., None], -1)[..., 0]
        return loss_fn({"decoder": params}, batch, cfg.model)[1]["loss"], -(own * batch.weight).sum()

    assert batch.weight.sum() > 8
    np.testing.assert_allclose(*both(model.params, batch), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "record", "change", "message"),
    [
        (
            "llama",
            "image",
            (),
            r"Document 'with/0', span 0 is no text, and this model reads nothing else; leave it out\.$",
        ),
        ("t5", "image", (), r"Document 'with/0', span 0 is no text, and this model reads nothing else"),
        ("llama", "", ("--packing.patches", "8"), "reads text alone, and packing.patches or packing.shapes is of pic"),
        ("llama", "", ("--features.memory", "8"), "features are kept of pictures, and this model reads text alone"),
        ("llama", "", ("--stages", "connector:3"), "names no parameter"),
    ],
)
def test_what_has_to_do_with_pictures_is_refused(place, tmp_path, name, record, change, message):
    told = said(0, "red", "green")
    if record:
        told["messages"][0]["content"] = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
        Pictures.new("RGB", (8, 8)).save(tmp_path / "a.png")
        (tmp_path / "with.jsonl").write_text((json.dumps(told) + "\n") * 4)
        change = ("--data", str(tmp_path / "with.jsonl"))
    given = arguments(place, name, tmp_path / "out")
    if change[0] in given:
        given[given.index(change[0]) + 1] = change[1]
        change = ()
    if "connector:3" in given:
        del given[given.index("--lora.rank") : given.index("--lora.rank") + 2]

    def begun():
        cfg, _ = finetune.config_of([*given, *change])
        return stages.parts(cfg), prepare.prepare_data(cfg)

    with pytest.raises(InputError, match=message):
        begun()


def test_a_model_that_writes_nothing(tmp_path):
    tiny_llava.saved(
        tmp_path / "x", {"model_type": "clip_vision_model", "patch_size": 8, "image_size": 16, **BLOCKS}, {}
    )
    with pytest.raises(InputError, match=r"holds a clip_vision_model, which writes no text and cannot be trained here"):
        start.opened(tmp_path / "x")


def test_one_of_encoder_and_connector_is_no_model(place):
    cfg = huggingface.opened(place / "llama").cfg
    with pytest.raises(InputError, match="go together; give both or neither"):
        vlm.Config(None, mlp.Config(16, 16), cfg)
    with pytest.raises(InputError, match="placeholder is of models that see pictures"):
        vlm.Config(None, None, cfg, placeholder=3)
    batch = batches.abstract(Bucket(1, 8, 4, 1), 12, Vocab(*range(9), size=cfg.vocab))
    with pytest.raises(InputError, match="This model reads text alone; make batches without pictures"):
        vlm.hidden({}, batch, vlm.Config(None, None, cfg))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_run_from_end_to_end(place, tmp_path, name, monkeypatch):
    """What it exports, merged and apart, says the same, to whoever loads a language model."""
    devices, make = jax.devices()[:1], loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make(cfg, devices))
    out = tmp_path / "out"
    assert finetune.run(arguments(place, name, out, "--export", "merged")) == 0
    result = json.loads((out / loop.RESULT).read_text())
    assert result["held_out"]["test"]["loss"] < result["before"]["held_out"]["test"]["loss"]
    assert result["held_out"]["test"]["questions"] == 4
    export.export(out, tmp_path / "adapter", "adapter")
    base, merged = huggingface.load(place / name), huggingface.load(out / "merged")
    apart = adapter.load(tmp_path / "adapter", base)
    targets = json.loads((tmp_path / "adapter" / adapter.CONFIG).read_text())["target_modules"]
    known = {"llama": "model.layers.1.self_attn.q_proj", "t5": "decoder.block.1.layer.1.EncDecAttention.k"}
    assert known[name] in targets
    assert len(targets) == 2 * len(lora.parted(apart.params)[1]) == {"llama": 14, "t5": 2 * (4 + 2 + 8 + 2)}[name]
    its = start.both(place / name)[1]
    batch = its.batch([Document("d", (Text("What is red?"),))])
    logits = jax.jit(vlm.logits, static_argnums=2)
    cfg = vlm.Config(None, None, base.cfg)
    of = functools.partial(lambda m: logits({"decoder": m.params}, batch, cfg))
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(of(apart), of(merged), atol=1e-4)
        assert np.abs(of(base) - of(merged)).max() > 1e-2
