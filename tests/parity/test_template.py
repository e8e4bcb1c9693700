"""Chat templates against `apply_chat_template` of transformers 5.23: the same text, and the same parts of it learnt."""

import chat_templates
import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs the `parity` extra")
pytest.importorskip("transformers", reason="needs the `parity` extra")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmjax.sequence.document import Document, Image, Text
from mmjax.tokenizers.parts import Medium, Symbol, Words
from mmjax.tokenizers.template import Template

PICTURE = Image(4, 4, np.zeros((4, 4, 3), np.uint8))
SAID = (
    "Hello!",
    "  What is\n\nthis?  ",
    'a "b" \\ é 漢 \U0001f600\t',
    "<b>no symbol</b> {{ x }}",
    "x",
    "so</think>\n\nthen",
)


def tokenizer(name):
    """Characters' bytes as tokens, and the symbols."""
    source, symbols, media, _, given, _ = chat_templates.ALL[name]
    letters = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([*symbols, *media.values()])
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=source, **given)


def conversations(name):
    """Documents, and the same as messages."""
    _, _, media, content, _, system = chat_templates.ALL[name]
    rng = np.random.default_rng(0)
    for turns in (1, 2, 3, 4, 5):
        roles = ["system"] * (system and turns > 2) + ["user", "assistant"] * 3
        spans, messages = [], []
        for role in roles[:turns]:
            texts = [str(rng.choice(SAID)) for _ in range(1 + (content == "list" and role == "user" and turns > 3))]
            items = [{"type": "text", "text": text} for text in texts]
            here = [Text(text, role, role == "assistant") for text in texts]
            if media and role == "user" and turns > 1:
                at = int(rng.integers(len(items) + 1))
                items.insert(at, {"type": "image"})
                here.insert(at, PICTURE)
            spans += here
            messages.append({"role": role, "content": texts[0] if content == "string" else items})
        yield Document(f"{name}/{turns}", tuple(spans)), messages


def written(parts, media):
    words = {Symbol: lambda p: p.symbol, Words: lambda p: p.text, Medium: lambda p: media["image"]}
    return "".join(words[type(p)](p) for p in parts)


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("name", chat_templates.ALL)
def test_the_text_is_equal(name, answer):
    source, symbols, media, content, given, _ = chat_templates.ALL[name]
    template, theirs = Template(source, symbols, media=media, content=content), tokenizer(name)
    for document, messages in conversations(name):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        parts = template.parts(document, answer=answer, **given)
        assert written(parts, media) == expected
        # And its tokens: symbols and words apart give what the whole text gives.
        ids = theirs.apply_chat_template(messages, add_generation_prompt=answer, return_dict=False)
        mine = []
        for part in parts:
            if isinstance(part, Words):
                mine += theirs.encode(part.text, add_special_tokens=False)
            else:
                mine.append(theirs.convert_tokens_to_ids(written([part], media)))
        assert mine == ids


@pytest.mark.parametrize("name", [n for n, given in chat_templates.ALL.items() if "{% generation %}" in given[0]])
def test_what_is_learnt_is_equal(name):
    source, symbols, media, content, given, _ = chat_templates.ALL[name]
    template, theirs = Template(source, symbols, media=media, content=content), tokenizer(name)
    learnt = 0
    for document, messages in conversations(name):
        both = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        mine = []
        for part in template.parts(document, **given):
            n = len(theirs.encode(part.text, add_special_tokens=False)) if isinstance(part, Words) else 1
            mine += [int(not isinstance(part, Medium) and part.train)] * n
        assert mine == both["assistant_masks"]
        learnt += sum(mine)
    assert learnt > 20
