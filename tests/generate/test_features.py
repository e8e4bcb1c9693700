"""Kept visual tokens are those that would be made anew, and whatever changes them has another name."""

import copy
import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from fused import Letters, behind_an_encoder, systems
from fused import connectors as every
from talker import asked, made, picture
from tiny import randomised

from mmjax.connectors import merger
from mmjax.core.errors import InputError
from mmjax.core.store import Store
from mmjax.data import index
from mmjax.data.device import Canvases
from mmjax.data.source import Source
from mmjax.generate import features
from mmjax.generate.session import Session
from mmjax.models import vlm
from mmjax.sequence import interleave
from mmjax.sequence.document import Document, Encoded, Image, Text, Video
from mmjax.sequence.layout import layout
from mmjax.tokenizers.resolution import Fixed, NaFlex, Native, Pixtral
from mmjax.tokenizers.tiles import AnyRes
from mmjax.tokenizers.video import Sampled


def deepstack():
    cfg, sequence = behind_an_encoder(merger.Config(16, 16))
    return dataclasses.replace(cfg, deepstack=(0, 1), deep=merger.Config(16, 16, norm_after=True)), sequence


PATCH = 4
POLICY = Native(PATCH, 2, 64, 24 * 24)
# A token per patch, windows, squares, so many per picture.
MODELS = {
    "patches": systems()["causal"],
    "windows": systems()["windows"],
    "squares": behind_an_encoder(every()["pixel shuffle"]),
    "latents": systems()["resampled, in the sequence"],
    "DeepStack": deepstack(),
}


def png(seed: int, height: int, width: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


SIZES = [(8, 8), (16, 8), (8, 24), (24, 24)]
PICTURES = [Image(*size, png(n, *size)) for n, size in enumerate(SIZES)]


def document(name: str, *pictures: int) -> Document:
    spans = [part for n in pictures for part in (PICTURES[n], Text("and"))]
    return Document(name, (*spans, Text("what"), Text("abc", "assistant", True)))


DOCUMENTS = [document("a", 0, 1), document("b", 2), document("c", 1, 3, 0), document("d")]


class Setting:
    """A model, and batches of documents for it."""

    def __init__(self, name: str):
        self.cfg, self.sequence = MODELS[name]
        self.params = randomised(vlm.spec(self.cfg))
        self.how = features.How(self.sequence)
        with jax.default_matmul_precision("highest"):  # as in the tests
            self.tower = features.tower(self.params, self.cfg)
        tokens = self.cfg.connector.tokens
        self.layout = functools.partial(layout, tokenizer=Letters(), resolution=POLICY, media_tokens=tokens)

    def batch(self, documents=DOCUMENTS, rows=3):
        plan = index.once(documents, self.layout, tokens=160, rows=rows)
        latents = self.cfg.connector.per_picture
        about = {"cfg": self.sequence, "latents": latents, "merge": 1 if latents else self.cfg.connector.square}
        batch = Source(documents, self.layout, plan, Letters.vocab, PATCH, **about)[0]
        names = [[n for d in row for n in self.named(documents[d])] for row in plan.steps[0].rows]
        return batch, names

    def named(self, document):
        return features.named(document, self.layout(document), self.tower, self.how)

    def media(self, batch, names, store, **how):
        return features.media(self.params, batch, self.cfg, names, store, **how)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("patches", "windows", "latents", "DeepStack")]


@pytest.fixture(scope="module", params=["squares", *SLOW])
def setting(request):
    return Setting(request.param)


@pytest.fixture(scope="module")
def plain():
    return Setting("patches")


@pytest.fixture
def runs(monkeypatch):
    """How many pictures went through the tower."""
    real, seen = features.encode, []
    monkeypatch.setattr(features, "encode", lambda *a: seen.append(len(a[3])) or real(*a))
    return seen


def same(a, b) -> bool:
    return all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_kept_is_fresh_to_the_bit(setting, tmp_path, runs):
    batch, names = setting.batch()
    store = Store(folder=tmp_path, disk=2**24, memory=2**20)
    fresh = setting.media(batch, names, store)
    assert sum(runs) == 4  # two of the six pictures come twice
    again = setting.media(batch, names, store)
    restarted = setting.media(batch, names, Store(folder=tmp_path, disk=2**24))
    assert sum(runs) == 4
    assert same(fresh, again)
    assert same(fresh, restarted)
    assert same(fresh, setting.media(batch, names, Store()))  # which keeps nothing

    own = jax.jit(vlm.media, static_argnums=2)(setting.params, batch, setting.cfg)
    exists = vlm.present(jax.tree.map(jnp.asarray, batch), setting.cfg)
    exists = np.asarray(batch.patch_kind > 0 if exists is None else exists)
    np.testing.assert_allclose(fresh.tokens[exists], own.tokens[exists], atol=2e-5, rtol=1e-5)
    seen = jax.jit(lambda b, m: vlm.hidden(setting.params, b, setting.cfg, media=m))
    hidden = functools.partial(seen, batch)
    there = batch.order >= 0
    np.testing.assert_allclose(hidden(again)[there], hidden(own)[there], atol=5e-5)
    if own.deep is not None:
        np.testing.assert_allclose(fresh.deep[:, exists], own.deep[:, exists], atol=2e-5, rtol=1e-5)
    assert same(hidden(fresh), hidden(again))


def test_a_session_encodes_a_picture_once(tmp_path, runs):
    """In another conversation, in another session and in another place; and says what it would say without."""
    first, second = picture(0), picture(1, 8, 16)
    questions = [asked(first, "the fox"), asked(first, "the fox", Text("so", "assistant"), second, first, "and")]
    plain = Session(*made()).answer
    for n in range(2):
        session = Session(*made(), store=Store(folder=tmp_path, disk=2**24))
        for question in (*questions, asked("x"), questions[0]):
            answer, wanted = session.answer([question], max_tokens=6)[0], plain([question], max_tokens=6)[0]
            assert answer.ids == wanted.ids
        assert sum(runs) == 2, n
    both = session.answer(questions, max_tokens=6)
    assert [answer.ids for answer in both] == [answer.ids for answer in plain(questions, max_tokens=6)]
    assert sum(runs) == 2


def test_a_picture_is_encoded_as_if_it_were_alone(plain, runs):
    """To the bit the same in whichever batch, row, place and company."""
    one, two = [document("x", 3)], [document("y", 0, 1, 2, 0), document("z", 2, 3)]
    tokens = []
    for documents in (one, two, two[::-1]):
        batch, names = plain.batch(documents, rows=2)
        found = dict(zip(*zip(*features.places(batch, names), strict=True), strict=True))
        place = found[plain.named(one[0])[0][0]]
        media = plain.media(batch, names, Store())
        tokens.append(np.asarray(media.tokens[place.row, place.tokens(plain.cfg)]))
    assert same(tokens[0], tokens[1])
    assert same(tokens[0], tokens[2])


def test_several_pictures_at_once(plain):
    batch, names = plain.batch()
    one, four = (plain.media(batch, names, Store(), rows=rows) for rows in (1, 4))
    np.testing.assert_allclose(one.tokens, four.tokens, atol=2e-5, rtol=1e-5)


def test_a_row_without_pictures_and_a_bad_disk(plain, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    batch, names = plain.batch([document("d")])
    assert not np.any(plain.media(batch, names, Store()).tokens)
    assert plain.media(batch.replace(patches=batch.patches[:, :0]), names, Store()) is None
    batch, names = plain.batch()
    fresh = plain.media(batch, names, Store())
    assert same(fresh, plain.media(batch, names, Store(folder=tmp_path / "file", disk=100)))
    assert len(caplog.records) == 1


def test_damage_is_made_again(plain, tmp_path, runs):
    batch, names = plain.batch()
    fresh = plain.media(batch, names, Store(folder=tmp_path, disk=2**24))
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    store = Store(folder=tmp_path, disk=2**24)
    assert same(fresh, plain.media(batch, names, store))
    assert store.counts.damaged == 4
    assert sum(runs) == 8
    # An entry that is whole, but not what this model makes.
    for name, place in features.places(batch, names):
        store.put(name, {"tokens": np.zeros((len(place.patches), 3), np.float32)})
    assert same(fresh, plain.media(batch, names, store))
    assert sum(runs) == 12


def test_names_must_be_those_of_the_batch(plain):
    batch, names = plain.batch()
    for wrong in ([n[1:] for n in names], [[*n, n[0]] for n in names if n]):
        with pytest.raises(InputError, match=r"Row \d holds \d views of pictures, but \d were named"):
            plain.media(batch, wrong, Store())


def test_the_last_names():
    names = [("a", 1), ("b", 3), ("c", 2)]
    assert [features.last(names, n) for n in (0, 2, 5, 6)] == [[], names[2:], names[1:], names]
    for wrong in (1, 3, 7):
        with pytest.raises(InputError, match="name all of them"):
            features.last(names, wrong)


def test_few_sizes_and_little_padding():
    for unit in (1, 4):
        sizes = {n: features._rounded(n, unit) for n in range(unit, 5000 * unit, unit)}
        assert all(n <= size < n * 1.25 + unit and not size % unit for n, size in sizes.items())
        assert len(set(sizes.values())) < 4 * np.log2(5000)
    assert [features._rounded(n, 1) for n in (256, 576, 729, 1024)] == [256, 640, 768, 1024]


# What changes a name.


def variants(value, path=""):
    """Every value that differs from a config in one of its fields, however deep."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            for where, other in variants(getattr(value, field.name), f"{path}.{field.name}"):
                changed = copy.copy(value)
                object.__setattr__(changed, field.name, other)  # whether or not it makes sense
                yield where, changed
    elif isinstance(value, bool):
        yield path, not value
    elif isinstance(value, int | float):
        yield path, value + 1
    elif isinstance(value, tuple):
        yield path, (*value, 1)
        for n, item in enumerate(value):
            yield from ((where, (*value[:n], other, *value[n + 1 :])) for where, other in variants(item, f"{path}.{n}"))
    else:
        yield path, f"{value}x" if isinstance(value, str) else 3


def one_key(**changes) -> str:
    picture = PICTURES[3]
    piece = next(p for p in pieces(picture) if p.views)
    about = {"content": picture.source, "medium": picture, "piece": piece, "tower": "t", "how": features.How()}
    return features.key(**about | changes)


def pieces(picture):
    return layout(Document("x", (picture,)), Letters(), POLICY).pieces


POLICIES = [POLICY, Fixed(4, 8, 8), NaFlex(4, 8), Pixtral(4, 32), AnyRes(4, 8, ((1, 2), (2, 1)), False)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_every_field_of_a_policy_changes_the_key(policy):
    piece = next(p for p in pieces(PICTURES[3]) if p.views)
    keys = {"": one_key(piece=dataclasses.replace(piece, policy=policy))}
    for where, other in variants(policy):
        keys[where] = one_key(piece=dataclasses.replace(piece, policy=other))
    assert len(keys) > len(dataclasses.fields(policy))
    assert len(set(keys.values())) == len(keys)


def test_every_way_of_making_patches_changes_the_key(monkeypatch):
    sequence = interleave.Config()
    others = {
        "": one_key(),
        "merge": one_key(how=features.How(dataclasses.replace(sequence, merge=2))),
        "window": one_key(how=features.How(dataclasses.replace(sequence, window=2))),
        "frames": one_key(how=features.How(dataclasses.replace(sequence, frames="together"))),
        "reduced": one_key(how=features.How(reduced=True)),
        "canvases": one_key(how=features.How(canvases=Canvases())),
        "other canvases": one_key(how=features.How(canvases=Canvases(step=4))),
        "clips": one_key(how=features.How(clips=Sampled(POLICY))),
        "other clips": one_key(how=features.How(clips=Sampled(POLICY, fps=3.0))),
        "frames in a patch": one_key(how=features.How(frames=2)),
        "other": one_key(how=features.How(other="x")),
        "tower": one_key(tower="u"),
        "size": one_key(medium=Image(24, 25, b"")),
        "kind": one_key(medium=Video(1, 24, 24, 1.0, np.zeros(1))),
        "pace": one_key(medium=Video(1, 24, 24, 2.0, np.zeros(1))),
        "content": one_key(content=PICTURES[3].source[:-1]),
        "pixels": one_key(content=np.zeros((24, 24, 3), np.uint8)),
        "fewer pixels": one_key(content=np.zeros((24, 12, 6), np.uint8)),
    }
    piece = next(p for p in pieces(PICTURES[3]) if p.views)
    others["views"] = one_key(piece=dataclasses.replace(piece, grid=(1, 4, 9)))
    others["more views"] = one_key(piece=dataclasses.replace(piece, tiles=((1, 6, 6),)))
    with monkeypatch.context() as patch:
        patch.setattr(PIL, "__version__", "0")
        others["Pillow"] = one_key()
    assert len(set(others.values())) == len(others)
    # What the tower does not see is no reason to encode again.
    for same in ({"see": "prefix"}, {"position": "sequential"}, {"cross": "last_image"}):
        assert one_key(how=features.How(dataclasses.replace(sequence, **same))) == others[""]
    assert one_key(piece=dataclasses.replace(piece, train=True, span=5)) == others[""]


def test_the_content_of_a_medium(tmp_path, rng):
    pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(b"abc")
    sources = [b"abc", Encoded(lambda: b"abc"), tmp_path / "a.png"]
    assert {features.content(Image(8, 8, source)) for source in sources} == {b"abc"}
    assert np.array_equal(features.content(Image(8, 8, lambda: pixels)), pixels)
    assert features.content(Video(1, 8, 8, 1.0, pixels[None])).shape == (1, 8, 8, 3)
    for wrong in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match=r"image '.*' "):
            features.content(Image(8, 8, wrong))
    laid = layout(Document("x", (Image(8, 8, tmp_path / "none.png"),)), Letters(), POLICY)
    with pytest.raises(InputError, match="Document 'x', span 0: image"):
        features.named(Document("x", (Image(8, 8, tmp_path / "none.png"),)), laid, "t", features.How())


def test_every_weight_and_dtype_changes_the_tower(plain):
    names = {"": plain.tower, "after the tower": features.tower(plain.params, plain.cfg, "tower")}
    params = jax.tree.map(np.asarray, plain.params)  # on the host, where nothing is compiled
    parts = {name: params[name] for name in ("vision", "connector")}
    leaves, tree = jax.tree.flatten(parts)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(parts)]
    for n, path in enumerate(paths):
        flat = leaves[n].reshape(-1).copy()
        flat[-1] = np.nextafter(flat[-1], np.float32(np.inf))
        for what, x in (("a bit", flat.reshape(leaves[n].shape)), ("dtype", leaves[n].astype(jnp.bfloat16))):
            changed = params | jax.tree.unflatten(tree, [*leaves[:n], x, *leaves[n + 1 :]])
            names[f"{path} {what}"] = features.tower(changed, plain.cfg)
    assert len(set(names.values())) == len(names)
    # What does not make visual tokens does not matter.
    changed = params | {"decoder": jax.tree.map(lambda x: x + 1, params["decoder"])}
    assert features.tower(changed, plain.cfg) == plain.tower
    connector = params | {"connector": jax.tree.map(lambda x: x + 1, params["connector"])}
    assert features.tower(connector, plain.cfg, "tower") == names["after the tower"]


def test_every_field_of_the_towers_config_changes_it(plain, monkeypatch):
    monkeypatch.setattr(features, "checksums", lambda tree: {})  # of the weights: see above
    names = {"": features.tower(plain.params, plain.cfg)}
    for where, cfg in variants(plain.cfg):
        if where.startswith((".vision", ".connector", ".deep")):
            names[where] = features.tower(plain.params, cfg)
        else:
            assert features.tower(plain.params, cfg) == names[""], where
    assert len(names) > 50
    assert len(set(names.values())) == len(names)
    with jax.default_matmul_precision("bfloat16"):
        assert features.tower(plain.params, plain.cfg) not in names.values()
    for where, value in (("CODE", 2),):
        monkeypatch.setattr(features, where, value)
        assert features.tower(plain.params, plain.cfg) not in names.values()


def test_the_name_does_not_depend_on_the_sharding(plain):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    placed = jax.tree.map(lambda x: jax.device_put(x, split if x.ndim and x.shape[0] % 2 == 0 else whole), plain.params)
    assert features.tower(placed, plain.cfg) == plain.tower
    assert features.tower(jax.tree.map(np.asarray, plain.params), plain.cfg) == plain.tower
