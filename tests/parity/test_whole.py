"""A directory in, text out: prompts with pictures through processor, encoder, cache and loop, against transformers.

Each directory holds a random model beside its processor and tokenizer. Greedy answers of 64 tokens are compared as long
as the likeliest token leads by more than 1e-4: behind a tie, both go on with something of their own.
"""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")

from parity import vocabularies
from parity.harness import twin
from parity.test_processors import CONFIGS, DIRECTORIES, directory, encoded, idefics, kosmos2, reference, write
from parity.test_videos import SIZES, Videos, clip
from PIL import Image as Pictures
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.processing_utils import ProcessorMixin

from mmjax.convert import huggingface, processor
from mmjax.generate.session import Session
from mmjax.sequence.document import Document, Image, Text, Video

STEPS, MARGIN, END = 64, 1e-4, 2
BLOCKS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = BLOCKS | {"num_key_value_heads": 2, "num_hidden_layers": 2}
CLIP = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "num_hidden_layers": 3} | BLOCKS
SIGLIP = {"model_type": "siglip_vision_model", "patch_size": 14, "num_hidden_layers": 2} | BLOCKS
M_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
QWEN = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
MODELS = {
    "llava": ("LlavaForConditionalGeneration", CLIP, TEXT | {"model_type": "llama"}),
    "llava_next": ("LlavaNextForConditionalGeneration", CLIP, TEXT | {"model_type": "llama"}),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration",
        SIGLIP | {"image_size": 60},
        TEXT | {"model_type": "qwen2"},
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        {"image_size": 28, "patch_size": 14, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4}
        | {"hidden_size": 32, "intermediate_size": 48, "intermediate_layers_indices": [0], "vision_output_dim": 64},
        TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3], "pad_token_id": 0},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        QWEN | {"embed_dim": 32, "hidden_size": 32},
        TEXT | {"rope_parameters": M_ROPE},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        QWEN
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 56}
        | {"fullatt_block_indexes": [1], "tokens_per_second": 2},
        TEXT | {"rope_parameters": M_ROPE},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        QWEN
        | {"patch_size": 16, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        TEXT | {"head_dim": 8, "rope_parameters": M_ROPE | {"mrope_interleaved": True}},
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        SIGLIP | {"image_size": 28},
        TEXT | {"model_type": "gemma2", "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        SIGLIP | {"image_size": 56},
        TEXT
        | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        {"model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14], "num_hidden_layers": 2}
        | {"attention_bias": True, "layer_scale_init_value": 0.5}
        | BLOCKS,
        TEXT | {"model_type": "qwen2"},
    ),
    "pixtral": (
        "LlavaForConditionalGeneration",
        {"model_type": "pixtral", "image_size": 64, "patch_size": 16, "num_hidden_layers": 2} | BLOCKS,
        TEXT | {"model_type": "mistral", "sliding_window": None},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {"model_type": "pixtral", "image_size": 84, "patch_size": 14, "num_hidden_layers": 2} | BLOCKS,
        TEXT | {"model_type": "mistral", "sliding_window": None},
    ),
    "deepseek_vl": ("DeepseekVLForConditionalGeneration", SIGLIP | {"image_size": 30}, TEXT | {"model_type": "llama"}),
    "idefics2": (
        "Idefics2ForConditionalGeneration",
        {"image_size": 56, "patch_size": 14, "num_hidden_layers": 2} | BLOCKS,
        TEXT | {"model_type": "mistral"},
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        {"image_size": 28, "patch_size": 14, "num_hidden_layers": 2} | BLOCKS,
        TEXT | {"model_type": "llama"},
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        {"image_size": 30, "patch_size": 14, "num_hidden_layers": 2} | BLOCKS,
        TEXT | {"model_type": "llama"},
    ),
}
# A tied head says the same token again and again.
APART = {"tie_word_embeddings": False}
MORE = {"paligemma": {"projection_dim": 32} | APART, "gemma3": APART, "deepseek_vl": APART}
MORE |= {"internvl": APART, "mistral3": APART}
MORE["pixtral"] = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}


@pytest.fixture(autouse=True)
def _any_part(monkeypatch):
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)


def whole(folder, name):
    """A directory with everything, and transformers' model of it."""
    path = directory(folder, name, "five")
    config = json.loads((path / "config.json").read_text())
    cls, vision, text = MODELS[name]
    cls = getattr(transformers, cls)
    ids = {k: v for k, v in config.items() if k.endswith(("_token_id", "_token_index")) or k == "image_grid_pinpoints"}
    ids |= {k: v for k, v in CONFIGS.get(name, {}).items() if k != "model_type"} | MORE.get(name, {})
    if name == "llava_onevision":
        ids["vision_aspect_ratio"] = "anyres_max_2"  # as its processor has it
    if "qwen" in name:
        tokens = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
        found = {t["content"]: t["id"] for t in tokens}
        kinds = ("vision_start", "vision_end", "video_pad")
        ids |= {f"{k.replace('_pad', '')}_token_id": found[f"<|{k}|>"] for k in kinds}
    given = {k: v for k, v in vision.items() if "qwen" not in name or k != "model_type"}
    inner = text | {"vocab_size": config["text_config"]["vocab_size"]}
    model = twin(cls, cls.config_class(vision_config=given, text_config=inner, **ids))
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END]}))
    return path, model


def asked(name):
    """Questions with one picture, two of different sizes, and none: messages, and documents."""
    noise = np.random.default_rng(0)
    sizes = {"one": [(70, 50)], "two": [(40, 90), (66, 31)], "none": []}
    for which, own in sizes.items():
        views = [noise.integers(0, 256, (*size, 3), np.uint8) for size in own]
        shown = [{"type": "image", "image": Pictures.fromarray(view)} for view in views]
        text = f"What about {which}?"
        messages = [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
        spans = (*(Image(*view.shape[:2], view) for view in views), Text(text))
        yield messages, Document(which, spans)


def same(model, inputs, answers, least=STEPS + 1, ends=(END,), alone=False):
    """Whether answers are transformers', up to a tie; at least so many tokens of all are compared.

    alone: they are a stream of their own, behind a first token.
    """
    compared = 0
    how = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": list(ends), "pad_token_id": 0}
    for given, answer in zip(inputs, answers, strict=True):
        out = model.generate(**given, **how, output_logits=True, return_dict_in_generate=True)
        want = out.sequences[0, 1 if alone else given["input_ids"].shape[1] :].tolist()
        lead = np.diff(np.sort(np.stack([x[0].numpy() for x in out.logits]), axis=1)[:, -2:])[:, 0]
        end = want[-1] if want[-1] in ends else END
        got = [*answer.ids, end] if answer.reason == "end" else list(answer.ids)
        equal = [a == b for a, b in zip(got, want, strict=False)]
        n = equal.index(False) if False in equal else len(want)
        assert n == len(want) == len(got) or lead[n] <= MARGIN, (n, lead[n], got, want)
        compared += n
    assert compared >= least, "ties came too early to compare anything"


@pytest.mark.parametrize("name", [n for n in DIRECTORIES if n in MODELS])
def test_greedy_answers(name, tmp_path):
    torch.set_num_threads(1)
    path, model = whole(tmp_path, name)
    theirs, ours = reference(path, name), processor.load(path)
    loaded = processor.with_colours(huggingface.load(path), ours)
    made = list(asked(name))
    # Pictures matter: others in their places, or, where their order is no matter, the colours turned round.
    *shown, text = made[1][1].spans
    others = shown[::-1] if name != "mllama" else [replace(one, source=255 - one.source) for one in shown]
    swapped = Document("swapped", (*others, text))
    *answers, other = Session(loaded, ours).answer([*(document for _, document in made), swapped], max_tokens=STEPS)
    assert other.ids != answers[1].ids
    how = {} if name == "paligemma" else {"return_tensors": "pt"}  # whose labels are made of what is no tensor yet
    inputs = [dict(encoded(theirs, m, **how)) for m, _ in made]
    for given in inputs:
        given.pop("labels", None)
    inputs = [{k: torch.as_tensor(np.asarray(v)) for k, v in given.items()} for given in inputs]
    inputs = [{k: v[None] if v.ndim == 1 else v for k, v in given.items()} for given in inputs]
    same(model, inputs, answers)


def test_an_answer_that_looks_at_pictures(tmp_path):
    """Idefics, whose pictures are beside the sequence: rows of two, one and none, and alone as together."""
    torch.set_num_threads(1)
    path, theirs = idefics(tmp_path, "five")
    config = json.loads((path / "config.json").read_text()) | BLOCKS | {"num_hidden_layers": 4, "pad_token_id": 0}
    config |= {"cross_layer_interval": 2, "qk_layer_norms": True}
    config["vision_config"] |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config["perceiver_config"] |= {"resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 12}
    model = twin(IdeficsForVisionText2Text, IdeficsConfig(**config))
    model.save_pretrained(path)
    write(path, "generation_config.json", {"eos_token_id": [END]})
    ours = processor.load(path)
    session = Session(processor.with_colours(huggingface.load(path), ours), ours)
    made, ends = list(asked("idefics")), [END, ours.stops[-1]]
    answers = session.answer([document for _, document in made], max_tokens=STEPS)
    prompts = []
    for (message,), _ in made:
        *shown, words = message["content"]
        closed = words["text"] + "<end_of_utterance>\nAssistant:"
        prompts.append(["User:", *(item["image"] for item in shown), closed] if shown else [f"User: {closed}"])
    inputs = [dict(theirs(text=[prompt], add_end_of_utterance_token=False)) for prompt in prompts]
    same(model, inputs, answers, ends=ends)
    alone = [session.answer([document], max_tokens=STEPS)[0].ids for _, document in made]
    assert alone == [answer.ids for answer in answers]
    swapped = Document("two", (*made[1][1].spans[:2][::-1], made[1][1].spans[2]))
    assert session.answer([swapped], max_tokens=STEPS)[0].ids != answers[1].ids


def test_greedy_answers_of_kosmos2(tmp_path):
    """It has no chat template: a picture, and text that goes on."""
    torch.set_num_threads(1)
    path, theirs, size = kosmos2(tmp_path, "five", 56)
    vision = BLOCKS | {"image_size": 224, "patch_size": 56, "num_hidden_layers": 2}
    inner = {"embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 48, "vocab_size": size, "pad_token_id": 0}
    cls = transformers.Kosmos2ForConditionalGeneration
    more = {"latent_query_num": 7} | APART
    model = twin(cls, cls.config_class(vision_config=vision, text_config=inner | APART, **more))
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END]}))
    ours = processor.load(path)
    views = [np.random.default_rng(n).integers(0, 256, (60, 90, 3), np.uint8) for n in range(2)]
    texts = ["An image of", "<grounding> What is this? It is"]
    shown = [Document(t, (Image(*v.shape[:2], v), Text(t))) for t, v in zip(texts, views, strict=True)]
    session = Session(processor.with_colours(huggingface.load(path), ours), ours)
    answers = session.answer(shown, max_tokens=STEPS)
    how = {"num_image_tokens": 7, "return_tensors": "pt"}
    same(model, [theirs(Pictures.fromarray(v), t, **how) for t, v in zip(texts, views, strict=True)], answers)


def test_an_answer_after_a_video(tmp_path):
    """A clip whose times run past the text behind it: the answer goes on from the last token, not from the largest."""
    torch.set_num_threads(1)
    name, settings, fps = "qwen2_5_vl", SIZES["qwen2_5_vl"], 1.0
    path, model = whole(tmp_path, name)
    write(path, "video_preprocessor_config.json", settings | {"video_processor_type": "Qwen2VLVideoProcessor"})
    theirs, ours = reference(path, name), processor.load(path)
    video = clip(random.Random("clip"), 24, 60, 60)
    theirs.video_processor = Videos(name, settings, fps)
    content = [{"type": "text", "text": "see"}, {"type": "video", "video": video}, {"type": "text", "text": "what?"}]
    given = theirs.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    given = {k: torch.as_tensor(np.asarray(v)) for k, v in given.items() if k != "video_metadata"}
    rows = ("input_ids", "attention_mask", "mm_token_type_ids")
    given = {k: v.reshape(1, -1) if k in rows else v for k, v in given.items()}
    given["pixel_values_videos"] = given["pixel_values_videos"].float()
    document = Document("d", (Text("see"), Video(*video.shape[:3], fps, video), Text("what?")))
    positions = ours.batch([document]).position[0]
    session = Session(processor.with_colours(huggingface.load(path), ours), ours)
    answers = session.answer([document], max_tokens=STEPS)
    assert positions.max() > positions[answers[0].prompt - 1].max()
    same(model, [given], answers, 20)


@pytest.mark.parametrize("name", ["llava_onevision", "mllama", "qwen2_5_vl"])
def test_a_second_picture_changes_what_the_first_is_made_of_or_not(name, tmp_path):
    """OneVision shows a picture in tiles where it is alone, and whole where it is not: then nothing of it is kept.

    Nor is it where the first token sees all pictures, as in Llama 3.2 Vision.
    """
    path, _ = whole(tmp_path, name)
    ours = processor.load(path)
    loaded = processor.with_colours(huggingface.load(path), ours)
    views = [np.random.default_rng(n).integers(0, 256, (70 - 30 * n, 50 + 40 * n, 3), np.uint8) for n in range(2)]
    first, second = (Image(*view.shape[:2], view) for view in views)
    session = Session(loaded, ours)
    said = session.answer([Document("d", (first, Text("What is this?")))], max_tokens=5)[0]
    turns = (first, Text("What is this?"), Text(said.text, "assistant"), second, Text("and this?"))
    more = session.answer([Document("d", turns)], max_tokens=1)[0]
    fresh = Session(loaded, ours)
    fresh.answer([Document("d", turns)], max_tokens=1)
    np.testing.assert_allclose(session._state.logits, fresh._state.logits, atol=1e-4)
    assert (more.reused > said.prompt // 2) == (name == "qwen2_5_vl")


TEXTS = {
    "Llama": {"num_key_value_heads": 1},
    "Mistral": {"sliding_window": 9},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16},
    "Gemma3": {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
}


@pytest.mark.parametrize("name", TEXTS)
def test_greedy_texts(name, tmp_path):
    """Text alone, of different lengths in one batch, and windows that are shorter than what is said."""
    torch.set_num_threads(1)
    made, tokenizer = vocabularies.pair(tmp_path, "gemma", ("<pad>", "<eos>", "<bos>"), "<bos>", bos_token="<bos>")
    path = tmp_path / name
    sizes = TEXT | TEXTS[name] | {"vocab_size": max(tokenizer.get_vocab().values()) + 1, "pad_token_id": 0}
    ends = {"bos_token_id": 1, "eos_token_id": END}
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model = twin(getattr(transformers, f"{name}ForCausalLM"), config(**sizes, **ends))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    made.replace(path / "tokenizer.json")
    ours = processor.load(path)
    assert ours.stops == (END,)
    texts = ["The quick brown fox jumps over", "a", "who is it? What colour has it?"]
    documents = [Document(text, (Text(text, "document"),)) for text in texts]
    answers = Session(huggingface.load(path), ours).answer(documents, max_tokens=STEPS)
    same(model, [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in texts], answers)
