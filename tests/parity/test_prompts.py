"""Families without chat templates: processors and greedy answers, whole, against those of transformers 5.23."""

import json
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")

from parity import vocabularies
from parity.harness import twin
from parity.test_conventions import square, words
from parity.test_processors import in_patches, normalised, write
from parity.test_whole import BLOCKS, END, STEPS, same
from PIL import Image as Pictures
from transformers import image_processing_backends  # noqa: F401  (the *Pil classes ask for it)
from transformers.processing_utils import ProcessorMixin

from mmjax.convert import huggingface, processor
from mmjax.generate.session import Session
from mmjax.sequence.document import Document, Image, Text

QUERIES, SIDE = 3, 28
VISION = BLOCKS | {"num_hidden_layers": 2, "image_size": SIDE, "patch_size": 14}
QFORMER = BLOCKS | {"num_hidden_layers": 3, "vocab_size": 21_200, "encoder_hidden_size": 32}
OPT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 48, "word_embed_proj_dim": 32}
OPT |= {"model_type": "opt", "max_position_embeddings": 200}
# name: (its class, vocabulary, symbols, names, begin, the language model)
SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
LLAMA = BLOCKS | {"model_type": "llama", "num_key_value_heads": 2, "num_hidden_layers": 2}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
DIRECTORIES = {
    "blip-2": ("Blip2", "short", SYMBOLS, NAMES, "<s>", OPT),
    "instructblip": ("InstructBlip", "llama", SYMBOLS, NAMES, "<s>", LLAMA),
    "blip-2 t5": ("Blip2", "llama", SYMBOLS, NAMES, "", T5),
}


@pytest.fixture(autouse=True)
def _any_part(monkeypatch):
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)


def ended(folder):
    """A tokenizer that writes </s> behind every text, as T5's does."""
    path, made = vocabularies.pair(folder, "llama", SYMBOLS, "", **NAMES)
    own = json.loads(path.read_text())
    end = {"</s>": {"id": "</s>", "ids": [made.convert_tokens_to_ids("</s>")], "tokens": ["</s>"]}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    own["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": end}
    path.write_text(json.dumps(own))
    return path, transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **NAMES)


def directory(folder, name, layout):
    """A directory with everything, and its model, as on the hub ("older": before 2024) or of version 5."""
    kind, vocabulary, symbols, names, begin, text = DIRECTORIES[name]
    older = layout == "older"
    symbols = [s for s in symbols if s != "<image>" or not older]
    made, tokenizer = ended(folder) if text is T5 else vocabularies.pair(folder, vocabulary, symbols, begin, **names)
    image = len(tokenizer) if older else tokenizer.convert_tokens_to_ids("<image>")
    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    config = cls.config_class(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text | {"vocab_size": len(tokenizer) + 5, "eos_token_id": END, "pad_token_id": 0},
        num_query_tokens=QUERIES,
        image_token_index=image,
    )
    model = twin(cls, config)
    out = folder / layout
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    made.replace(out / "tokenizer.json")
    images = {"image_processor_type": "BlipImageProcessor", "size": square(SIDE)}
    own = {"processor_class": f"{kind}Processor", "num_query_tokens": QUERIES}
    if layout == "five":
        write(out, "processor_config.json", own | {"image_processor": images})
    else:
        write(out, "processor_config.json", own)
        write(out, "preprocessor_config.json", images)
    write(out, "generation_config.json", {"eos_token_id": END})
    if kind == "InstructBlip":
        bert = transformers.BertTokenizer(vocab=str(vocabularies.file("bert")))
        bert.save_pretrained(out / "qformer_tokenizer")
    if older:
        said = json.loads((out / "config.json").read_text())
        write(out, "config.json", {k: v for k, v in said.items() if k != "image_token_index"})
    return out, model


def questions(rng, count):
    """(text, picture or None), and the documents of them."""
    for n in range(count):
        text = words(rng, False)
        noise = np.random.default_rng(rng.randint(0, 10**6))
        view = noise.integers(0, 256, (rng.randint(20, 90), rng.randint(20, 90), 3), np.uint8) if n % 3 else None
        spans = (Text(text),) if view is None else (Text(text), Image(*view.shape[:2], view))
        yield (text, None if view is None else Pictures.fromarray(view)), Document(str(n), spans)


LAYOUTS = [
    ("blip-2", "older"),
    ("blip-2", "hub"),
    ("blip-2", "five"),
    ("instructblip", "hub"),
    ("instructblip", "five"),
    ("blip-2 t5", "hub"),
]


ANSWERED = [("blip-2", "older"), ("instructblip", "five"), ("blip-2 t5", "hub")]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_prompts(name, layout, tmp_path):
    """Ids, pixels and positions of questions; then greedy answers of 64 tokens."""
    torch.set_num_threads(1)
    path, model = directory(tmp_path, name, layout)
    ours, theirs = processor.load(path), transformers.AutoProcessor.from_pretrained(path)
    assert ours.stops == (END,)
    made = list(questions(random.Random(name), 6))
    batch, inputs = ours.batch([document for _, document in made]), []
    for row, ((text, view), document) in enumerate(made):
        want = theirs(images=view, text=text, return_tensors="pt")
        ids = want["input_ids"][0].tolist()
        n = len(ids)
        assert batch.tokens[row][:n].tolist() == ids, (theirs.tokenizer.decode(ids), ours.plain.decode(ids))
        assert (batch.order[row, n:] == -1).all()
        assert batch.position[row, :n, 0].tolist() == list(range(n))
        example, _ = ours.example(document)
        p = len(example.patch_raster)
        assert p == (0 if view is None else (SIDE // 14) ** 2)
        if p:
            raster = in_patches(want["pixel_values"].numpy(), 14)
            np.testing.assert_allclose(normalised(ours, batch.patches[row, None, :p])[0], raster, atol=1e-6)
            inputs.append(want)
            if ours.sequence.answer:
                assert example.answer.tokens.tolist() == [0]
            if ours.reader is not None:
                assert example.instruction.tolist() == want["qformer_input_ids"].tolist()
    if (name, layout) not in ANSWERED:
        return
    some = [document for (_, view), document in made if view is not None][:3]
    session = Session(processor.with_colours(huggingface.load(path), ours), ours)
    same(model, inputs[:3], session.answer(some, max_tokens=STEPS), alone=bool(ours.sequence.answer))


def test_texts_of_an_encoder_decoder(tmp_path):
    """T5 by itself: prompts of different lengths in one batch, a head that is not its token table."""
    torch.set_num_threads(1)
    made, tokenizer = ended(tmp_path)
    config = transformers.T5Config(**T5 | {"vocab_size": len(tokenizer) + 3})
    model = twin(transformers.T5ForConditionalGeneration, config)
    path = tmp_path / "t5"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    made.replace(path / "tokenizer.json")
    write(path, "generation_config.json", {"eos_token_id": END, "decoder_start_token_id": 0})
    ours = processor.load(path)
    texts = ["The quick brown fox jumps over", "a", "who is it? What colour has it? " * 20]
    documents = [Document(text, (Text(text, "document" if n else "user"),)) for n, text in enumerate(texts)]
    inputs = [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in texts]
    for document, want in zip(documents, inputs, strict=True):
        assert ours.example(document)[0].tokens.tolist() == want["input_ids"][0].tolist()
    same(model, inputs, Session(huggingface.load(path), ours).answer(documents, max_tokens=STEPS), alone=True)
