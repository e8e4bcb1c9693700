"""A tiny LLaVA as a Hugging Face directory: weights, tokenizer, chat template and image processor, without PyTorch."""

import json
from pathlib import Path

import tokenizer_files
from tiny import randomised

from mmjax.convert import huggingface

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PICTURES = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
}


BLOCKS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTROLS = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def write(path: Path, seed: int = 0) -> Path:
    """The directory, as files are on the Hub."""
    spec = tokenizer_files.letters()
    image = max(t["id"] for t in spec["added_tokens"]) + 1
    spec["added_tokens"].append({"id": image, "content": "<image>", **tokenizer_files.FLAGS, "special": True})
    config = {
        "model_type": "llava",
        "image_token_index": image,
        "vision_config": {"model_type": "clip_vision_model", "patch_size": 8, "image_size": 16, **BLOCKS},
        "text_config": {"model_type": "llama", "vocab_size": image + 7, "num_key_value_heads": 1, **BLOCKS},
    }
    files = {
        "tokenizer.json": spec,
        "tokenizer_config.json": CONTROLS,
        "chat_template.json": {"chat_template": TEMPLATE},
        "preprocessor_config.json": PICTURES,
        "processor_config.json": {"image_token": "<image>", "patch_size": 8},
    }
    return saved(path, config, files, seed)


def saved(path: Path, config: dict, files: dict, seed: int = 0) -> Path:
    """A directory with a model of this config, of random weights, and these files beside it."""
    origin = huggingface.Origin.of(config)
    found = origin.found
    model = huggingface.Model(found.of, found.cfg, randomised(found.of.spec(found.cfg), seed), origin)
    huggingface.save(path, model)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path
