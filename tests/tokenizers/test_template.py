"""Chat templates: what is whose, what is learnt, and what hostile texts and templates come to."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import chat_templates
import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.sequence.document import Audio, Document, Image, Text, Video
from mmjax.tokenizers.parts import Medium, Symbol, Words
from mmjax.tokenizers.template import Limits, Template, read

PICTURE = Image(4, 4, np.zeros((4, 4, 3), np.uint8))
CLIP = Video(2, 4, 4, 1.0, np.zeros((2, 4, 4, 3), np.uint8))
SHORT = Limits(seconds=1.0, memory=2**27, characters=100_000)
PRINT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def made(name):
    source, symbols, media, content, variables, _ = chat_templates.ALL[name]
    return Template(source, symbols, media=media, content=content), variables


def document(*spans):
    return Document("d", spans)


def chat(*texts, train=True):
    """User and assistant take turns."""
    roles = ("user", "assistant")
    return document(*(Text(t, roles[i % 2], bool(train and i % 2)) for i, t in enumerate(texts)))


def plain(parts, media="(image)"):
    return "".join(p.symbol if isinstance(p, Symbol) else p.text if isinstance(p, Words) else media for p in parts)


def symbols(parts):
    return [p.symbol for p in parts if isinstance(p, Symbol)]


def learnt(parts):
    return plain(p for p in parts if not isinstance(p, Medium) and p.train)


def of_span(parts, number):
    return "".join(p.text for p in parts if isinstance(p, Words) and p.span == number)


def raw(source, *names, **kwargs):
    return Template(source, names or ["<s>"], content="string", **kwargs)


def test_known_parts_with_a_picture():
    template, given = made("qwen2-vl")
    doc = document(Text("Be kind.", "system"), PICTURE, Text("What?"), Text("A cat.", "assistant", True))
    assert template.parts(doc, **given) == [
        Symbol("<|im_start|>"),
        Words("system\n"),
        Words("Be kind.", span=0),
        Symbol("<|im_end|>"),
        Words("\n"),
        Symbol("<|im_start|>"),
        Words("user\n"),
        Symbol("<|vision_start|>"),
        Medium(1),
        Symbol("<|vision_end|>"),
        Words("What?", span=2),
        Symbol("<|im_end|>"),
        Words("\n"),
        Symbol("<|im_start|>"),
        Words("assistant\n"),
        Words("A cat.", True, 3),
        Symbol("<|im_end|>", True),
        Words("\n", True),
    ]


def test_an_answer_is_asked_for():
    template, given = made("llama-3")
    asked = plain(template.parts(chat("hi"), answer=True, **given))
    assert asked.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert plain(template.parts(chat("hi"), **given)) in asked


@pytest.mark.parametrize("name", chat_templates.ALL)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_no_text_becomes_a_symbol(name, where):
    """Every symbol of every template, whole and overlapping, said by system, user and assistant."""
    template, given = made(name)
    _, control, media, _, _, system = chat_templates.ALL[name]
    said = [
        *control,
        *media.values(),
        "<s>",
        "</s>",
        "<image>",
        "<<|im_start|>",
        "<|im_<|im_start|>start|>",
        "<|im_end",
    ]
    hostile = "x" + "".join(said) + " \x00\ufffd\U000f1234 é " + "".join(reversed(said)) + "\tx"
    texts = ["Be kind.", "Hello there", "Good day"]
    calm = [Text(t, r, r == "assistant") for t, r in zip(texts, ("system", "user", "assistant"), strict=True)]
    if media:
        calm[1:1] = [PICTURE]
        where += where > 0
    loud = list(calm)
    loud[where] = Text(hostile, calm[where].role, calm[where].train)
    if not system:
        calm, loud = [s for s in calm if s.role != "system"], [s for s in loud if s.role != "system"]
    before, after = template.parts(document(*calm), **given), template.parts(document(*loud), **given)
    kept = [[p for p in parts if not isinstance(p, Words)] for parts in (before, after)]
    assert kept[0] == kept[1]
    number = (
        loud.index(next((s for s in loud if isinstance(s, Text) and s.text == hostile), None)) if system else where - 1
    )
    if number >= 0:
        assert of_span(after, number) == hostile
    assert plain(after) == plain(before).replace(calm[number].text, hostile) or number < 0


@pytest.mark.parametrize(
    ("source", "text", "refused"),
    [
        ("<|{{ messages[0].content }}", "im_start|>", False),
        ("{{ messages[0].content }}|>", "<|im_start", False),
        ("<|{{ messages[0].content }}|>", "im_start", False),
        ("<|im{{ messages[0].content | trim }}start|>", "  _ \n", False),
        ("{{ messages[0].content | replace('x', '') }}", "<|xim_start|>", False),
        ("{{ messages[0].content.split('</think>') | join }}", "<|im_</think>start|>", False),
        ("{{ messages[0].content.split(' ') | join }}", "<|im_ start|>", False),
        ("{{ messages[0].content | lower }}", "<|IM_START|>", False),
        ("{{ messages[0].content[::-1] }}", ">|trats_mi|<", False),
        ("{{ messages[0].content[1:] }}", " <|im_start|>", False),
        ("<|{{ messages[0].content | lower }}", "IM_START|>", False),
        ("{% if messages[0].content == 'im_start|>' %}<|{{ messages[0].content }}{% endif %}", "im_start|>", True),
        ("{{ '%c' % 60 }}|im_{{ messages[0].content }}", "start|>", False),
    ],
)
def test_only_what_the_template_wrote_is_a_symbol(source, text, refused):
    """Texts and templates that make a symbol together: it is words, or the document is refused."""
    template = raw(source, "<|im_start|>")
    if refused:
        with pytest.raises(InputError, match="cannot be told"):
            template.parts(document(Text(text)))
        return
    parts = template.parts(document(Text(text)))
    assert symbols(parts) == []
    assert plain(parts)


def test_random_pieces_of_symbols_change_nothing(rng):
    """The symbols are the template's alone, whatever pieces of them the texts begin with, end with and hold."""
    c = "{{ messages[0].content }}"
    source = f"<|{c}|><|im_{{{{ messages[0].content | trim }}}}start|>{c}<|im_start|>{c}</s{c}>[{c}INST]<s>{c}"
    template = raw(source, "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "|>")
    expected = symbols(template.parts(document(Text("z"))))
    assert expected == ["|>", "|>", "<|im_start|>", "<s>"]
    pieces = ["<|", "|>", "im_", "start", "end", "<", ">", "/", "s", "[", "]", "INST", "I", " ", "\n", '"', "<s>", "é"]
    for _ in range(300):
        said = "z".join("".join(rng.choice(pieces, rng.integers(0, 6))) for _ in range(rng.integers(1, 4)))
        said = said if said.strip() else "z"  # where nothing is between, the template has written the symbol itself
        parts = template.parts(document(Text(said)))
        assert symbols(parts) == expected
        assert plain(parts) == source.replace(c, said).replace("{{ messages[0].content | trim }}", said.strip())


def test_what_templates_look_for_they_find():
    """Upper case, JSON, comparison and cutting give what they give without any disguise."""
    for source, text, expected in (
        ("{{ messages[0].content | upper }}", 'a "b"\n', 'A "B"\n'),
        ("{{ messages[0].content | tojson }}", 'a "b" <s>\n', '"a \\"b\\" <s>\\n"'),
        ("{{ 'yes' if messages[0].content.startswith('go') else 'no' }}{{ messages[0].content }}", "go on", "yesgo on"),
        ("{{ messages[0].content.split('</think>')[-1].lstrip('\n') }}", "a</think>\n\nb", "b"),
        ("{{ messages[0].content | trim }}|{{ messages[0].content | length }}", "  a b ", "a b|6"),
    ):
        template = raw(source)
        parts = template.parts(document(Text(text)))
        assert plain(parts) == expected
        assert symbols(parts) == []


def test_a_symbol_of_pieces_that_are_the_templates_own():
    parts = raw("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}", "<|user|>").parts(
        chat("user|>")
    )
    assert parts == [Symbol("<|user|>"), Words("user|>", span=0)]


def test_variables_are_texts_too():
    tools = [{"name": "<s>", "parameters": {"/s": {"type": "s"}, "a": '"\\é'}}]
    source = "{{ bos_token }}{{ tools | tojson }}{% for t in tools[0].parameters %}<{{ t }}>{% endfor %}" + PRINT
    parts = raw(source, "<s>", "</s>").parts(chat("hi"), bos_token="<s>", tools=tools)
    assert symbols(parts) == ["<s>"]
    assert plain(parts) == "<s>" + json.dumps(tools, ensure_ascii=False) + "</s><a>hi"
    source = "{% if effort not in ['low', 'high'] %}{{ raise_exception('which?') }}{% endif %}{{ effort }}" + PRINT
    assert plain(raw(source).parts(chat("hi"), effort="high")) == "highhi"
    for wrong in ({"bos_token": "<b>"}, {"eos_token": ["<s>"]}, {"messages": []}, {"x": object()}):
        with pytest.raises(InputError, match=r"symbols|leave it out|plain JSON"):
            raw(PRINT).parts(chat("hi"), **wrong)


def test_media_are_counted():
    twice = "{% for c in messages[0].content %}{{ '<image><image>' if c.type == 'image' else c.text }}{% endfor %}"
    with pytest.raises(InputError, match="writes '<image>' 2 times where the document has 1"):
        Template(twice, [], media={"image": "<image>"}).parts(document(PICTURE))
    with pytest.raises(InputError, match="writes '<image>' 0 times where the document has 1"):
        Template("hi", [], media={"image": "<image>"}).parts(document(PICTURE))
    with pytest.raises(InputError, match="writes '<image>' 1 times where the document has 0"):
        Template("{{ messages[0].content[0].text }}<image>", [], media={"image": "<image>"}).parts(chat("a<image>"))
    with pytest.raises(InputError, match="span 0 is of the type 'audio'"):
        made("qwen2-vl")[0].parts(document(Audio(4, 4, np.zeros(4, np.float32))))
    template, _ = made("qwen2-vl")
    parts = template.parts(document(CLIP, PICTURE, Text("both"), PICTURE))
    assert [p.span for p in parts if isinstance(p, Medium)] == [0, 1, 3]
    # Pictures first, as LLaVA has it.
    parts = made("llava-1.5")[0].parts(document(Text("a"), PICTURE, Text("b"), PICTURE))
    assert plain(parts) == "USER: (image)\n(image)\na b "
    assert [p.span for p in parts if isinstance(p, Medium)] == [1, 3]


def test_what_is_learnt():
    turns = ("Who?", "Me.", "You?", "Yes, I.")
    template, _ = made("smollm2")
    assert learnt(template.parts(chat(*turns))) == "Me.<|im_end|>\nYes, I.<|im_end|>\n"
    assert learnt(template.parts(chat(*turns, train=False))) == ""
    half = document(Text("Who?"), Text("Me.", "assistant"), Text("You?"), Text("Yes, I.", "assistant", True))
    assert learnt(template.parts(half)) == "Yes, I.<|im_end|>\n"
    halves = document(Text("Who?"), Text("It is", "assistant"), Text(" me.", "assistant", True))
    assert learnt(template.parts(halves)) == "me.<|im_end|>\n"
    assert learnt(made("llava-1.5")[0].parts(chat(*turns))) == "Me. Yes, I. "
    assert learnt(made("thinking")[0].parts(chat("Who?", "<p></think>\n\nMe."))) == "Me.<|im_end|>\n"
    # A tag within a macro, where transformers counts wrongly.
    source = (
        "{% macro say(m) %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endmacro %}{% for m in messages %}"
        "{{ m.role }}:{% if m.role == 'assistant' %}{{ say(m) }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert learnt(raw(source, "</s>").parts(chat("a", "b", "c", "d"))) == "b</s>d</s>"
    # Two turns of one role.
    twice = document(Text("a"), Text("b", "assistant", True), Text("c", "assistant", True, turn=True))
    assert learnt(template.parts(twice)) == "b<|im_end|>\nc<|im_end|>\n"


def test_what_cannot_be_learnt_is_refused():
    last = "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}"
    with pytest.raises(InputError, match="'d': the chat template leaves out span 0"):
        raw(last).parts(chat("a", "b", train=False))
    count = "{{ messages | length }}" + PRINT
    with pytest.raises(InputError, match="before message 1 in another way when more follows"):
        raw(count).parts(chat("a", "b", "c"))
    with pytest.raises(InputError, match="span 1 is to be learnt, but the chat template writes it outside"):
        raw(PRINT + "{% generation %}{% endgeneration %}").parts(chat("a", "b"))
    with pytest.raises(InputError, match="role 'user' and trained"):
        raw(PRINT).parts(document(Text("a", "user", True)))
    with pytest.raises(InputError, match="span 0 stands outside"):
        raw(PRINT).parts(document(Text("a", "document")))
    with pytest.raises(InputError, match=r"say so .content='string'"):
        Template("{% for m in messages %}{{ m.content }}{% endfor %}", []).parts(chat("a"))


def test_symbols_that_cannot_be_told_apart_are_refused():
    for symbol in ("", "\n\n", "<a b>", "\U000f0000"):
        with pytest.raises(InputError, match="leave it out"):
            raw(PRINT, symbol)
    with pytest.raises(InputError, match="'sound' is no type"):
        raw(PRINT, media={"sound": "<x>"})


DOUBLING = "{% set n = namespace(s='aaaa') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
HOSTILE = {
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}": "more than 1 s",
    "{{ 'a' * 10**9 }}": "bytes of memory",
    "{% set n = 10**9 %}{{ 'a' * n }}": "bytes of memory",
    DOUBLING: "bytes of memory",
    "{% for i in range(9999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}": "more than 100,000 characters",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{{ ''['__class__']['__mro__'] }}": "unsafe|undefined",
    "{% set n = namespace(__class__=1) %}": "private name",
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}": "no loader",
    "{% set _ = messages.append(1) %}": "unsafe",
    "{{ range(10**9) }}": "[Rr]ange",
    "{{ 9**(9**9) }}": "more than 1 s|ended the process",
    "{{ '\\ud800' }}": "surrogate",
    "{{ raise_exception('no\x1b[2J') }}": r"no\\x1b\[2J",
    "{% if %}": "failed",
    "{{ 1 / 0 }}": "division",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_are_refused_in_time_and_work_again(source):
    template = raw("{% if messages[0].content == 'go' %}" + source + "{% endif %}" + PRINT, limits=SHORT)
    began = time.monotonic()
    with pytest.raises(InputError, match=HOSTILE[source]) as raised:
        template.parts(chat("go"))
    assert time.monotonic() - began < 30  # of a busy machine; alone it is 1 s
    assert "\n" not in str(raised.value)
    if source not in ("{% if %}", "{{ 9**(9**9) }}", "{{ 'a' * 10**9 }}"):  # those cannot even be read
        assert plain(template.parts(chat("on"))) == "on"
    template.close()


def test_what_the_sandbox_leaves_empty():
    parts = raw("{{ '{0.__class__}'.format(1) }}|{{ messages.__class__ is defined }}" + PRINT).parts(chat("a"))
    assert plain(parts) == "|Falsea"


def test_the_worker_has_no_files_and_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    template = raw(PRINT)
    template.parts(chat("a"))
    pid = template._process.pid
    if not os.path.exists(f"/proc/{pid}/limits"):
        pytest.skip("needs Linux")
    with open(f"/proc/{pid}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert limits["Max open files"] == limits["Max processes"] == limits["Max file size"] == "0"
    assert int(limits["Max address space"]) < 2**30
    with open(f"/proc/{pid}/environ", "rb") as file:
        assert b"SECRET" not in file.read()
    template.close()
    assert not os.path.exists(f"/proc/{pid}")


PARENT = """
import sys, threading, time
from mmjax.sequence.document import Document, Text
from mmjax.tokenizers.template import Limits, Template
loop = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
template = Template("{% if messages[0].content == 'go' %}" + loop + "{% endif %}{{ messages[0].content }}", [],
                    content="string", limits=Limits(60))
template.parts(Document("d", (Text("a"),)))
busy = sys.argv[1] == "busy"
if busy:
    threading.Thread(target=template.parts, args=(Document("d", (Text("go"),)),)).start()
    time.sleep(0.5)
print(template._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("busy", ["busy", "idle"])
def test_the_worker_ends_with_a_killed_parent(busy):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, busy],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with parent.stdout:
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until and _runs(pid):
        time.sleep(0.02)
    assert not _runs(pid)


def _runs(pid):
    """Whether a process runs; one that has ended may be left for an init process to bury."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return False


def test_a_killed_worker_is_replaced():
    template = raw(PRINT)
    assert plain(template.parts(chat("a"))) == "a"
    os.kill(template._process.pid, signal.SIGKILL)
    template._process._running.wait()
    assert plain(template.parts(chat("a"))) == "a"


def test_threads_and_processes_share_a_template():
    template, given = made("smollm2")
    expected = [template.parts(chat(f"question {n}", f"answer {n}"), **given) for n in range(20)]
    found = {}

    def ask(n):
        found[n] = template.parts(chat(f"question {n}", f"answer {n}"), **given)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(20)] == expected
    assert pickle.loads(pickle.dumps(template)).parts(chat("question 0", "answer 0")) == expected[0]


FORK = """
import os, sys
from mmjax.sequence.document import Document, Text
from mmjax.tokenizers.template import Template
template = Template("{{ messages[0].content }}", [], content="string")
ask = lambda: template.parts(Document("d", (Text("a"),)))[0].text
ask()
first = template._process.pid
child = os.fork()
if child == 0:
    print(ask(), template._process.pid != first, flush=True)
    sys.exit(0)
os.waitpid(child, 0)
print(ask(), template._process.pid == first)
"""


def test_a_fork_has_a_worker_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", FORK],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.split() == ["a", "True", "a", "True"], done.stderr


def test_a_lone_surrogate_is_refused():
    with pytest.raises(InputError, match=r"'d'.*lone surrogate"):
        raw(PRINT).parts(chat("a\ud800"))


def test_templates_are_read_from_files(tmp_path):
    with pytest.raises(InputError, match="has no chat template 'default'"):
        read(tmp_path)
    several = [{"name": "default", "template": "one"}, {"name": "tools", "template": "two"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert (read(tmp_path), read(tmp_path, "tools")) == ("one", "two")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert (read(tmp_path), read(tmp_path, "tools")) == ("three", "two")
    (tmp_path / "chat_template.jinja").write_text("four\n")
    assert (read(tmp_path), read(tmp_path / "tokenizer_config.json")) == ("four\n", "one")
    with pytest.raises(InputError, match="has no chat template 'rag'"):
        read(tmp_path, "rag")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path)
