"""Every schema: small datasets written here, their documents compared span by span."""

import base64
import io
import json
import tarfile
import wave

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mmjax.core.errors import InputError
from mmjax.data import drawings
from mmjax.data.formats import open_dataset
from mmjax.sequence.document import Audio, Document, Encoded, Image, Text
from mmjax.sequence.layout import layout
from mmjax.tokenizers import conventions, text
from mmjax.tokenizers import image as images
from mmjax.tokenizers.chat import Chat
from mmjax.tokenizers.resolution import Native


def png(height, width, kind="PNG"):
    out = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (height % 256, width % 256, 7)).save(out, kind)
    return out.getvalue()


def bytes_of(image):
    source = image.source.read() if isinstance(image.source, Encoded) else image.source
    return source if isinstance(source, bytes) else source.read_bytes()


def plain(document):
    """What can be compared: pictures as their sizes and bytes."""
    out = []
    for s in document.spans:
        if isinstance(s, Image):
            assert images.read_size(bytes_of(s)) == (s.height, s.width)
            out.append(("image", s.height, s.width, bytes_of(s), s.role, s.turn))
        elif isinstance(s, Text):
            out.append((s.text, s.role, s.train, s.turn))
        else:
            out.append(s)
    return document.id, out


def picture(height, width, role="user", turn=False):
    return ("image", height, width, png(height, width), role, turn)


def asked(text, turn=False):
    return (text, "user", False, turn)


def answered(text, turn=False):
    return (text, "assistant", True, turn)


def told(text):
    return (text, "document", True, False)


@pytest.fixture
def folder(tmp_path):
    for height, width in [(2, 3), (4, 5), (6, 7)]:
        (tmp_path / f"{height}x{width}.png").write_bytes(png(height, width))
    return tmp_path


def opened(path, records, **options):
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1, ensure_ascii=False))
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return open_dataset(path, **options)


def talk(*values):
    return [{"from": ("human", "gpt")[n % 2], "value": v} for n, v in enumerate(values)]


LLAVA = [
    {"id": "a", "image": "2x3.png", "conversations": talk("<image>\nWhat?", 'A [tree], {"green"} \\ é.')},
    {"id": 7, "image": ["4x5.png", "6x7.png"], "conversations": talk("one <image> two<image>", "x", "y", "z")},
    {"conversations": [{"from": "system", "value": "Be brief."}, *talk("Hi.", "Hello.")]},
]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.ndjson"])
def test_llava(folder, name):
    data = opened(folder / name, LLAVA)
    assert data.schema == "llava"
    assert [plain(d) for d in data] == [
        ("d/a", [picture(2, 3), asked("\nWhat?"), answered('A [tree], {"green"} \\ é.')]),
        (
            "d/7",
            [asked("one "), picture(4, 5), asked(" two"), picture(6, 7), answered("x"), asked("y"), answered("z")],
        ),
        ("d/2", [("Be brief.", "system", False, False), asked("Hi."), answered("Hello.")]),
    ]


def test_llava_leaves_the_newline_to_the_convention(folder):
    data = opened(folder / "d.json", LLAVA, place="bare")
    assert plain(data[0])[1][:2] == [picture(2, 3), asked("What?")]
    assert plain(data[1])[1][:3] == [picture(4, 5), picture(6, 7), asked("one  two")]
    chat = Chat(text.load(drawings.tokenizer_model()), conventions.find("llava-v1"))
    laid = layout(data[0], chat, Native(patch=1, min_pixels=1))
    said = chat.decode([i for p in laid.pieces for i in p.ids])
    assert said.endswith("USER: \nWhat? ASSISTANT: " + LLAVA[0]["conversations"][1]["value"])


def test_llava_puts_pictures_in_front_as_llava_itself_does(folder):
    data = opened(
        folder / "d.json", [*LLAVA, {"image": "2x3.png", "conversations": talk(" <image> ", "x\n")}], place="front"
    )
    assert plain(data[0])[1][:2] == [picture(2, 3), asked("\nWhat?")]
    assert plain(data[1])[1][:3] == [picture(4, 5), picture(6, 7), asked("\none  two")]
    assert plain(data[3])[1] == [picture(2, 3), answered("x\n")]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (
            {"id": "q", "image": "2x3.png", "conversations": talk("What?", "x")},
            "record 'q' has 1 images, but places for 0",
        ),
        ({"id": "q", "image": "2x3.png", "conversations": talk("<image><image>", "x")}, "'q' has more places"),
        ({"id": "q", "conversations": talk("<image>", "x")}, "record 'q' has more places"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "conversations.0.from is 'tool'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"from is \['gpt'\]"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "value is None and not text"),
        ({"conversations": {"from": "gpt"}}, "not a list"),
        ({"conversations": ["x"]}, "not an object"),
        ({"conversations": []}, "says nothing"),
        ({"image": 5, "conversations": talk("<image>", "x")}, "image is 5, not a picture"),
        ({"image": "no.png", "conversations": talk("<image>", "x")}, "there is no file"),
        ({"image": "d.jsonl", "conversations": talk("<image>", "x")}, "d.jsonl"),
    ],
)
def test_refusals(folder, record, says):
    good = LLAVA[2]
    with pytest.raises(InputError, match=rf"^d\.jsonl, byte \d+: .*{says}"):
        opened(folder / "d.jsonl", [good, record], schema="llava")
    data = opened(folder / "d.jsonl", [good, record, good], errors=1)
    assert [d.id for d in data] == ["d/0", "d/2"]
    assert len(data.left_out) == 1


def test_consecutive_messages_of_one_role_begin_turns(folder):
    turns = [("human", "a"), ("human", "<image>b"), ("gpt", "c"), ("gpt", "d"), ("human", "e")]
    record = {"image": "2x3.png", "conversations": [{"from": f, "value": v} for f, v in turns]}
    assert plain(opened(folder / "d.jsonl", [record])[0])[1] == [
        asked("a"),
        picture(2, 3, turn=True),
        asked("b"),
        answered("c"),
        answered("d", True),
        asked("e"),
    ]


def sound(rate=8000, values=(0, 16384, -32768)):
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.array(values, "<i2").tobytes())
    return base64.b64encode(out.getvalue()).decode()


def test_messages(folder):
    url = "data:image/png;base64," + base64.b64encode(png(8, 9)).decode()
    parts = [
        {"type": "text", "text": "see <image>"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": "2x3.png"}},
        {"type": "image", "image": "4x5.png"},
        {"type": "input_audio", "input_audio": {"data": sound(), "format": "wav"}},
    ]
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    data = opened(folder / "d.jsonl", [{"messages": [*said, {"role": "assistant", "content": "so <image>"}]}])
    assert data.schema == "messages"
    id, spans = plain(data[0])
    *rest, clip, last = spans
    assert (id, rest, last) == (
        "d/0",
        [("s", "system", False, False), asked("see <image>"), picture(8, 9), picture(2, 3), picture(4, 5)],
        answered("so <image>"),
    )
    assert isinstance(clip, Audio)
    assert (clip.samples, clip.rate, clip.source.tolist()) == (3, 8000, [0, 0.5, -1])


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "tool", "content": "x"}, "role is 'tool'"),
        ({"role": "function", "content": "x"}, "role is 'function'"),
        ({"role": "assistant", "content": None}, "content is None"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "calls tools"),
        ({"role": "user", "content": []}, "is empty"),
        ({"role": "user", "content": [{"type": "video"}]}, "of type 'video'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}, "an address"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,x"}}]}, "base64"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "data:;base64,x!"}]}, "not valid base64"),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "eA==", "format": "wav"}}]},
            "WAV",
        ),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "mp3"}}]}, "'mp3'"),
        ({"role": "user", "content": [{"type": "image"}]}, "more places for images"),
    ],
)
def test_refused_messages(folder, message, says):
    with pytest.raises(InputError, match=says):
        opened(folder / "d.jsonl", [{"messages": [message]}])


def test_what_weighs_nothing_is_not_learnt(folder):
    said = [("user", "a", 0.0), ("assistant", "b", 0.0), ("user", "c", None), ("assistant", "d", 1.0)]
    said.append(("assistant", "e", 0.0))
    kept = [asked("a"), ("b", "assistant", False, False), asked("c"), answered("d"), ("e", "assistant", False, True)]
    messages = [{"role": role, "content": content, "weight": weight} for role, content, weight in said]
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    turns = [{"from": role, "value": content, "weight": weight} for role, content, weight in said]
    assert plain(opened(folder / "d.jsonl", [{"messages": messages}])[0])[1] == kept
    assert plain(opened(folder / "e.parquet", [{"messages": messages}])[0])[1] == kept
    assert plain(opened(folder / "f.jsonl", [{"messages": parts}])[0])[1] == kept
    assert plain(opened(folder / "g.jsonl", [{"conversations": turns}])[0])[1] == kept


TEXT = {"role": "user", "content": "x"}
ANSWER = {"role": "assistant", "content": "y"}
NOT_READ = [
    ({"videos": ["a.mp4"]}, {}, "has videos, which are not read"),
    ({"video": "a.mp4"}, {}, "has video, which"),
    ({"audios": [{"bytes": b"x".hex(), "path": None}]}, {}, "has audios, which"),
    ({"audio": "a.wav"}, {}, "has audio, which"),
    ({}, {"weight": 0.5}, r"1\.weight is 0.5; known are 0 and 1"),
    ({}, {"weight": "0"}, r"1\.weight is '0'; known are 0 and 1"),
    ({}, {"image": "2x3.png"}, r"1 has image, which belong in the record's own fields"),
    ({}, {"videos": ["a.mp4"]}, r"1 has videos, which belong"),
    ({}, {"reasoning_content": "hm"}, r"1 has reasoning_content, which no convention writes"),
    ({}, {"thinking": "hm"}, r"1 has thinking, which"),
    ({"image": "2x3.png", "images": ["4x5.png"]}, {}, "has images? and images?, which differ; keep one"),
]


@pytest.mark.parametrize(("record", "message", "says"), NOT_READ)
def test_what_is_not_read_is_refused(folder, record, message, says):
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"} | message]
    for name, whole in (
        ("d.jsonl", {"messages": [TEXT, ANSWER | message]} | record),
        ("e.jsonl", {"conversations": turns} | record),
    ):
        with pytest.raises(InputError, match=rf"^{name}, byte 0: .*{says}"):
            opened(folder / name, [whole])
        assert len(opened(folder / name, [{k: v for k, v in whole.items() if k not in record}, whole], errors=9)) < 2


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": [TEXT], "tools": [{"type": "function"}]}, "has tools, which cannot be learnt here"),
        ({"messages": [TEXT, ANSWER | {"function_call": {"name": "f"}}]}, "has function_call, so it calls tools"),
        ({"messages": [TEXT | {"weight": 1}]}, r"0\.weight is 1; known are 0, for what the user says is not learnt"),
    ],
)
def test_tools_and_weights_of_questions_are_refused(folder, record, says):
    with pytest.raises(InputError, match=says):
        opened(folder / "d.jsonl", [record])


def test_fields_that_say_nothing_hide_nothing(folder):
    nothing = {"videos": [], "video": None, "audios": None, "audio": {"bytes": None, "path": None}, "tools": []}
    unsaid = {"weight": None, "reasoning_content": "", "tool_calls": [], "images": []}
    named = ({"images": [], "image": "2x3.png"}, {"images": ["2x3.png"], "image": ""})
    for shown in (*named, {"images": ["2x3.png"], "image": "2x3.png"}):
        record = nothing | shown | {"messages": [TEXT | unsaid, ANSWER | unsaid]}
        assert plain(opened(folder / "d.jsonl", [record])[0])[1] == [picture(2, 3), asked("x"), answered("y")]
        record = nothing | shown | {"conversations": talk("<image>x", "y")}
        assert plain(opened(folder / "e.jsonl", [record])[0])[1] == [picture(2, 3), asked("x"), answered("y")]
    # Words that look like markers of other media are words.
    assert plain(opened(folder / "f.jsonl", [{"messages": [TEXT | {"content": "the <video> tag"}]}])[0])[1] == [
        asked("the <video> tag")
    ]


def archive(folder, record, *files):
    with tarfile.open(folder / "d.tar", "w") as tar:
        for name, data in (("s/k.json", json.dumps(record).encode()), *files):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return open_dataset(folder / "d.tar", cache=False)


def test_images_of_a_record_in_an_archive(folder):
    beside = [("s/k.b.png", png(8, 9)), ("s/k.a.png", png(9, 8))]
    record = {"messages": [TEXT, ANSWER]}
    rest = [asked("x"), answered("y")]
    # None beside it: what the JSON names, in the folder that pictures lie in.
    for field in ({"images": ["2x3.png"]}, {"image": "2x3.png"}):
        assert plain(archive(folder, record | field)[0])[1] == [picture(2, 3), *rest]
        talked = {"conversations": talk("<image>x", "y")} | field
        assert plain(archive(folder, talked)[0])[1] == [picture(2, 3), *rest]
    # Beside it, named or not.
    assert plain(archive(folder, record, *beside)[0])[1] == [picture(9, 8), picture(8, 9), *rest]
    for names, order in (
        (["k.b.png", "s/k.a.png"], [(8, 9), (9, 8)]),
        (["k.a.png", "k.b.png"], [(9, 8), (8, 9)]),
        (["photos/x.jpg", "photos/y.jpg"], [(9, 8), (8, 9)]),
    ):
        found = plain(archive(folder, record | {"images": names}, *beside)[0])[1]
        assert found == [*(picture(*size) for size in order), *rest]
    url = "data:image/png;base64," + base64.b64encode(png(8, 9)).decode()
    for field in (["2x3.png"], ["2x3.png"] * 3, [url, url]):
        with pytest.raises(
            InputError, match=rf"^d\.tar, byte 0: .* has {len(field)} images in its JSON and 2 beside it"
        ):
            archive(folder, record | {"images": field}, *beside)


@pytest.mark.parametrize("name", ["mp4", "tiff", "left.tif", "wav", "2.webm", "bmp"])
@pytest.mark.parametrize("record", [{"messages": [TEXT]}, {"conversations": talk("x", "y")}, {"caption": "x"}])
def test_other_media_in_an_archive_are_not_passed_over(folder, name, record):
    with pytest.raises(InputError, match=rf"^d\.tar, byte 0: the file '{name}' of the record is no JPEG"):
        archive(folder, record, (f"s/k.{name}", b"x"), ("s/k.png", png(8, 9)))


def hugging(*messages, images=((2, 3), (4, 5))):
    return {"messages": list(messages), "images": [{"bytes": png(*size), "path": None} for size in images]}


def test_hugging_face_parquet(folder):
    def say(role, *parts):
        return {"role": role, "content": [dict.fromkeys(("type", "text", "index")) | p for p in parts]}

    text, image = {"type": "text", "text": "w"}, {"type": "image"}
    records = [
        hugging(say("user", image, text, image), say("assistant", text)),
        hugging(say("user", image | {"index": 1}, image | {"index": 0}), say("assistant", text)),
        {"messages": [say("user", image)], "images": [{"bytes": None, "path": "6x7.png"}]},
    ]
    data = opened(folder / "d.parquet", records)
    assert [plain(d)[1] for d in data] == [
        [picture(2, 3), asked("w"), picture(4, 5), answered("w")],
        [picture(4, 5), picture(2, 3), answered("w")],
        [picture(6, 7)],
    ]
    assert data[2].id == "d/2"
    assert data.place(2) == "d.parquet, row group 1, row 0"


def test_hugging_face_contents_that_are_text(folder):
    def say(role, content):
        return {"role": role, "content": content}

    records = [
        hugging(say("user", "a<image>b<image>"), say("assistant", "c")),
        hugging(say("system", "s"), say("user", "a"), say("assistant", "c")),
    ]
    data = opened(folder / "d.parquet", records)
    assert plain(data[0])[1] == [asked("a"), picture(2, 3), asked("b"), picture(4, 5), answered("c")]
    assert plain(data[1])[1][1:] == [picture(2, 3), picture(4, 5), asked("a"), answered("c")]
    one = [{"messages": [say("user", "<image>?")], "image": {"bytes": png(8, 9), "path": "x.png"}}]
    assert plain(opened(folder / "e.parquet", one)[0])[1] == [picture(8, 9), asked("?")]
    with pytest.raises(InputError, match="2 images, but places for 1"):
        opened(folder / "f.parquet", [hugging(say("user", "<image>"))])


def page(height, width):
    return picture(height, width, "document")


def test_obelics(folder, caplog):
    records = [
        {"images": ["2x3.png", None, "http://a/b.png", None], "texts": [None, "one", None, "two"]},
        {"images": [None, "http://a/c.png", None], "texts": ["one", None, "two"]},
    ]
    data = opened(folder / "d.jsonl", records, images={"http://a/b.png": "4x5.png"}, missing="skip_image")
    assert data.schema == "obelics"
    assert plain(data[0])[1] == [page(2, 3), told("one"), page(4, 5), told("two")]
    assert plain(data[1])[1] == [told("one\n\ntwo")]
    assert data.sizes(1) == [(0, 0)]
    assert "d: 1 of 3 pictures are not there and are left out" in caplog.text
    with pytest.raises(InputError, match=r"'http://a/b.png' is not here, and nothing is fetched.*missing='skip_image'"):
        opened(folder / "e.jsonl", records)
    with pytest.raises(InputError, match="says nothing"):
        opened(folder / "f.jsonl", [{"images": [], "texts": []}])
    with pytest.raises(InputError, match="no spans"):
        opened(folder / "g.jsonl", [{"images": ["no.png"], "texts": [None]}], missing="skip_image")
    with pytest.raises(InputError, match="leads out"):  # hostile is not missing
        opened(folder / "h.jsonl", [{"images": ["../x.png"], "texts": [None]}], missing="skip_image")
    held = [{"images": [None, {"bytes": png(8, 9)}], "texts": ["one", None]}]
    assert plain(opened(folder / "i.parquet", held)[0])[1] == [told("one"), page(8, 9)]


def test_mmc4(folder):
    record = {
        "url": "http://a",
        "text_list": ["One.", "Two.", "Three."],
        "image_info": [
            {"image_name": "2x3.png", "matched_text_index": 2, "raw_url": "http://a/1"},
            {"image_name": "4x5.png", "matched_text_index": 0},
            {"image_name": "6x7.png", "matched_text_index": 2},
        ],
        "similarity_matrix": [[0.1, 0.2, 0.3]],
    }
    data = opened(folder / "d.jsonl", [record])
    assert plain(data[0]) == ("d/http://a", [page(4, 5), told("One. Two."), page(2, 3), page(6, 7), told("Three.")])
    record["image_info"][0]["matched_text_index"] = 3
    with pytest.raises(InputError, match="matched_text_index is 3, but there are 3 texts"):
        opened(folder / "e.jsonl", [record])


def test_comm(folder):
    text, image = {"type": "text", "content": "t"}, {"type": "image", "url": "http://a", "image_path": "2x3.png"}
    record = {"data_id": "k", "title": "T", "summary_info": [text], "step_info": [[text, image], [image, text]]}
    assert plain(opened(folder / "d.json", [record])[0]) == (
        "d/k",
        [told("T\nt\nt"), page(2, 3), page(2, 3), told("t")],
    )


def test_captions(folder):
    data = opened(folder / "d.jsonl", [{"file_name": "2x3.png", "text": "a"}, {"image": "4x5.png", "caption": "b"}])
    assert data.schema == "captions"
    assert [plain(d)[1] for d in data] == [[page(2, 3), told("a")], [page(4, 5), told("b")]]
    data = opened(folder / "e.parquet", [{"image": {"bytes": png(8, 9)}, "caption": "c"}])
    assert plain(data[0])[1] == [page(8, 9), told("c")]


def test_ids_are_unique(folder):
    turn = {"conversations": talk("a", "b")}
    data = opened(
        folder / "d.jsonl", [{"id": "x"} | turn, {"id": "x"} | turn, {"id": "x#1"} | turn, turn, {"id": "3"} | turn]
    )
    assert [d.id for d in data] == ["d/x", "d/x#1", "d/x#1#2", "d/3", "d/3#4"]


def test_an_unknown_schema_is_named(folder):
    with pytest.raises(InputError, match="speaks for no schema; give one of llava"):
        opened(folder / "d.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match="no schema 'x'"):
        opened(folder / "d.jsonl", [], schema="x")
    assert isinstance(opened(folder / "e.jsonl", LLAVA)[-1], Document)
