"""Pages with pictures between their texts: OBELICS, MMC4, CoMM, and captions. All of it is learnt, outside of turns.

Pictures that these know by an address are looked up in options.images and then by path in options.root; nothing is ever
fetched. With options.missing = "skip_image" those that are not there are left out, and the texts around them joined.
"""

from dataclasses import replace
from typing import Any

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.data.formats import draft
from mmjax.data.formats.draft import Draft, Options, Picture
from mmjax.data.formats.record import Record
from mmjax.sequence.document import Text


def obelics(record: Record, options: Options) -> Draft:
    """{"images": [address, path, {"bytes"} or null, …], "texts": [null or text, …]}, as long as each other.

    Of each pair one is null (Laurençon et al. 2023). Texts that come to stand together are joined by an empty line.
    """
    images = draft.list_of(record.fields.get("images"), "images")
    texts = draft.list_of(record.fields.get("texts"), "texts")
    id = draft.own_id(record.fields, "id", "__key__")
    if len(images) != len(texts):
        raise InputError(f"record {shown(id)} has {len(images)} images for {len(texts)} texts; leave it out")
    spans: list[Picture | Text] = []
    for n, (image, text) in enumerate(zip(images, texts, strict=True)):
        if image is not None and text is not None:
            raise InputError(f"record {shown(id)} has an image and a text at place {n}; one of them must be null")
        if image is not None:
            spans.append(_picture(image, ("images", n), record, options))
        elif text is not None:
            spans.append(_text(text, f"texts.{n}"))
    return Draft(id, tuple(spans), "\n\n")


def mmc4(record: Record, options: Options) -> Draft:
    """{"text_list": sentences, "image_info": [{"image_name", "matched_text_index"}, …]} (Zhu et al. 2023).

    Each image stands before the sentence it is matched with; images of one sentence keep their order. The indices are
    what was chosen from `similarity_matrix`, which is not read. Sentences that follow each other are joined by a space.
    """
    fields = record.fields
    id = draft.own_id(fields, "id", "__key__", "url")
    texts = draft.list_of(fields.get("text_list"), "text_list")
    before: dict[int, list[Picture]] = {}
    for n, info in enumerate(draft.list_of(fields.get("image_info"), "image_info")):
        info = draft.dict_of(info, f"image_info.{n}")
        index, where = info.get("matched_text_index"), f"image_info.{n}.image_name"
        if not isinstance(index, int) or not 0 <= index < len(texts):
            raise InputError(f"image_info.{n}.matched_text_index is {shown(index)}, but there are {len(texts)} texts")
        draft.text_of(info.get("image_name"), where)
        before.setdefault(index, []).append(
            _picture(info["image_name"], ("image_info", n, "image_name"), record, options)
        )
    spans: list[Picture | Text] = []
    for n, text in enumerate(texts):
        spans += [*before.get(n, []), _text(text, f"text_list.{n}")]
    return Draft(id, tuple(spans), " ")


def comm(record: Record, options: Options) -> Draft:
    """{"data_id", "title", "summary_info": parts, "step_info": [parts, …]} (CoMM, Chen et al. 2024), as JSON.

    Parts are {"type": "text", "content"} and {"type": "image", "image_path"}. The order: title, summary, steps. Texts
    that follow each other are joined by a newline. Its own .pth files are pickles, which are not read.
    """
    fields = record.fields
    id = draft.own_id(fields, "data_id", "id", "__key__")
    spans: list[Picture | Text] = []
    if fields.get("title"):
        spans.append(_text(fields["title"], "title"))
    groups: list[tuple[tuple[str | int, ...], Any]] = [(("summary_info",), fields.get("summary_info") or [])]
    steps = draft.list_of(fields.get("step_info"), "step_info")
    groups += [(("step_info", n), step) for n, step in enumerate(steps)]
    for keys, parts in groups:
        for n, part in enumerate(draft.list_of(parts, ".".join(map(str, keys)))):
            where = ".".join(map(str, (*keys, n)))
            part = draft.dict_of(part, where)
            if part.get("type") == "text":
                spans.append(_text(part.get("content"), f"{where}.content"))
            elif part.get("type") == "image":
                spans.append(_picture(part.get("image_path"), (*keys, n, "image_path"), record, options))
            else:
                raise InputError(f"{where} is of type {shown(part.get('type'))}; known are text and image")
    return Draft(id, tuple(spans), "\n")


def captions(record: Record, options: Options) -> Draft:
    """A picture and what it shows. In a tar archive: key.jpg with key.txt, or with a "caption" (or "text") in key.json.

    Elsewhere {"image" (or "image_path", "file_name"), "caption" (or "text")}. The picture comes first.
    """
    fields = record.fields
    id = draft.own_id(fields, "id", "__key__")
    if record.files:
        pictures = [replace(p, role="document") for p in draft.pictures_beside(record)]
        if "txt" in record.files:
            try:
                caption: Any = record.files["txt"].read().decode()
            except UnicodeDecodeError as error:
                raise InputError(f"the caption is not UTF-8 at byte {error.start}; leave it out") from None
        else:
            caption = _first(fields, "caption", "text")
    else:
        key = next((k for k in ("image", "image_path", "file_name") if fields.get(k) is not None), "image")
        pictures = [draft.picture(fields.get(key), (key,), record, options, "document")]
        caption = _first(fields, "caption", "text")
    if not pictures:
        raise InputError(f"record {shown(id)} has no picture; it has {', '.join(record.files) or 'no files'}")
    return Draft(id, (*pictures, _text(caption, "the caption")), None)


def _first(fields: dict[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _text(given: Any, where: str) -> Text:
    return Text(draft.text_of(given, where), "document", True)


def _picture(given: Any, keys: tuple[str | int, ...], record: Record, options: Options) -> Picture:
    """One that may be elsewhere: an address that options.images does not know is a picture without a source."""
    optional = options.missing == "skip_image"
    if isinstance(given, str) and given not in options.images and given[:7].lower() in ("http://", "https:/"):
        return Picture(None, "document", optional=optional, name=given)
    return replace(draft.picture(given, keys, record, options, "document"), optional=optional)
