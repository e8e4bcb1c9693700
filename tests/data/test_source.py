import dataclasses
import functools
import io
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from mmjax.core.errors import InputError
from mmjax.data import index
from mmjax.data.memory import Memory
from mmjax.data.source import Holes, Source, load, read
from mmjax.sequence import batch as batches
from mmjax.sequence import interleave
from mmjax.sequence.batch import Batch
from mmjax.sequence.document import Audio, Document, Encoded, Image, Text, Video
from mmjax.sequence.interleave import Config
from mmjax.sequence.invariants import violations
from mmjax.sequence.layout import AUDIO, VIDEO, layout
from mmjax.tokenizers import image as images
from mmjax.tokenizers.audio import Frames
from mmjax.tokenizers.patches import patchify
from mmjax.tokenizers.resolution import Fixed, NaFlex, Native, Pixtral
from mmjax.tokenizers.slices import UHD, Slices
from mmjax.tokenizers.tiles import AnyRes, PanAndScan, Splits, Tiles
from mmjax.tokenizers.video import Sampled
from mmjax.tokenizers.view import render
from mmjax.tokenizers.vocab import Vocab

PATCH = 4
VOCAB = Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=35)


class Letters:
    vocab = VOCAB

    def encode(self, text: str) -> list[int]:
        return [9 + ord(letter) - ord("a") for letter in text]


LAYOUT = functools.partial(layout, tokenizer=Letters(), resolution=Native(PATCH, 1, PATCH * PATCH, 24 * 24))


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def document(n):
    """Pictures 0 to 2, of which the size is a whole number of patches, and an answer."""
    pictures = [noise((n, i), 4 * (1 + (n + i) % 3), 8) for i in range(n % 3)]
    spans = [Image(*p.shape[:2], functools.partial(np.copy, p)) for p in pictures]
    return Document(f"made/{n}", (*spans, Text("what"), Text("abc"[: 1 + n % 3], "assistant", True)))


def source(documents):
    return Source(documents, LAYOUT, index.once(documents, LAYOUT, tokens=48, rows=2), VOCAB, PATCH)


@pytest.fixture(scope="module")
def made():
    return source([document(n) for n in range(14)])


def assert_same(a, b):
    assert isinstance(a, Batch)
    assert isinstance(b, Batch)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_batch_is_a_function_of_its_step(made):
    assert len(made) == len(made.plan.steps) > 2
    first = made[1]
    made[0]
    assert_same(first, made[1])
    assert_same(first, source([document(n) for n in range(14)])[1])
    with pytest.raises(IndexError):
        made[len(made)]


def test_every_picture_arrives_whole(made):
    """Each patch of each picture lies where its row and column say, in the document that shows it."""
    seen = 0
    for step, planned in enumerate(made.plan.steps):
        batch = made[step]
        assert not np.any(violations(jax.tree.map(jnp.asarray, batch), VOCAB.size, VOCAB.image))
        for r, row in enumerate(planned.rows):
            assert made.ids(step, r) == [f"made/{n}" for n in row]
            pictures = [picture.source() for n in row for picture in made.documents[n].images]
            shown = [batch.patch_image[r] == i for i in range(len(pictures))]
            assert (batch.patch_image[r] >= 0).sum() == sum(s.sum() for s in shown)
            for picture, places in zip(pictures, shown, strict=True):
                assert places.sum() * PATCH * PATCH == picture.shape[0] * picture.shape[1]
                for patch, (y, x) in zip(batch.patches[r, places], batch.patch_position[r, places], strict=True):
                    cut = picture[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
                    np.testing.assert_array_equal(patch, cut.ravel())
            of = [n for n in row for picture in made.documents[n].images]
            tokens = batch.slot[r] >= 0
            showing = np.array(row)[batch.document[r, tokens]]
            np.testing.assert_array_equal(showing, np.array(of, int)[batch.patch_image[r, batch.slot[r, tokens]]])
            seen += len(row)
    assert seen == 14


def test_pictures_are_resized_to_their_grid():
    picture = noise(0, 30, 61)
    documents = [Document("d", (Image(30, 61, picture), Text("a")))]
    x, (patches,) = source(documents).example(documents[0])
    rows, columns = x.grid[0, 1:].tolist()
    assert (rows, columns) == Native(PATCH, 1, PATCH * PATCH, 24 * 24).grid(30, 61)
    assert rows * columns * PATCH * PATCH <= 24 * 24
    (view,) = patches.views
    np.testing.assert_array_equal(view, images.resize(picture, 4 * rows, 4 * columns))
    assert patches.shape == (rows * columns, 48)


@pytest.mark.parametrize("start", [0, 2])
def test_read_gives_what_the_source_gives_from_a_step_on(made, start):
    batches = list(read(made, start, threads=2, ahead=3))
    assert len(batches) == len(made) - start
    for step, batch in enumerate(batches, start):
        assert_same(batch, made[step])


def png(pixels):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_every_kind_of_source_is_loaded(tmp_path):
    pixels = noise(1, 5, 7)
    path = tmp_path / "picture.png"
    path.write_bytes(png(pixels))
    for given in (pixels, png(pixels), path, lambda: pixels, Encoded(path.read_bytes)):
        np.testing.assert_array_equal(load(Image(5, 7, given)), pixels)


def test_a_file_inside_an_archive_is_read_when_its_batch_is():
    """The same batch as of its pixels, and nothing is read for the plan."""
    pixels, reads = noise(3, 8, 12), []

    def member():
        reads.append(1)
        return png(pixels)

    def of(given):
        return source([Document("d", (Image(8, 12, given), Text("a"), Text("b", "assistant", True)))])

    packed = of(Encoded(member))
    assert reads == []
    assert_same(packed[0], of(pixels)[0])
    assert len(reads) == 1
    assert_same(packed[0], of(png(pixels))[0])


def lost():
    raise OSError("the archive is gone")


def broken():
    raise InputError("the pencil broke.")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (b"not a picture", "image of 13 bytes"),
        (png(noise(2, 8, 8))[:-40], "bytes"),
        (broken, "the pencil broke"),
        (Encoded(broken), "the pencil broke"),
        (Encoded(lost), r"could not be read \(OSError: the archive is gone\)"),
        (Encoded(lambda: b"not a picture"), "image of 13 bytes"),
    ],
)
def test_a_picture_that_cannot_be_decoded_is_named(given, says):
    sound, wrong = Image(8, 8, noise(3, 8, 8)), Image(8, 8, given)
    documents = [document(1), Document("made/bad", (sound, Text("a"), wrong))]
    s = source(documents)
    with pytest.raises(InputError, match=rf"^Document 'made/bad', span 2: .*{says}"):
        s[0]


def test_an_error_in_a_reading_thread_arrives():
    with pytest.raises(InputError, match="'made/bad'"):
        next(read(source([Document("made/bad", (Image(8, 8, b"no"),))]), 0))


def test_a_picture_of_another_size_than_declared_is_refused():
    documents = [Document("made/turned", (Image(8, 16, noise(4, 16, 8)), Text("a")))]
    with pytest.raises(InputError, match="'made/turned'"):
        source(documents)[0]


@pytest.mark.parametrize("see", ["causal", "bidirectional_images"])
def test_who_sees_whom_is_handed_on(see):
    documents = [Document("d", (Image(8, 8, noise(5, 8, 8)), Text("a")))]
    plan = index.once(documents, LAYOUT, tokens=16, rows=1)
    hi = Source(documents, LAYOUT, plan, VOCAB, PATCH, Config(see=see))[0].hi[0, 3:7]
    np.testing.assert_array_equal(hi, [3, 4, 5, 6] if see == "causal" else [6, 6, 6, 6])


def rotten():
    raise ValueError("the pencil broke")


def test_a_picture_that_cannot_be_read_is_a_hole_within_the_budget(caplog):
    """The plan stays, its document weighs nothing, every other document is as it was."""
    bad = Document("made/bad", (Image(8, 8, rotten), Text("what"), Text("ab", "assistant", True)))
    well = Document("made/bad", (Image(8, 8, noise(6, 8, 8)), Text("what"), Text("ab", "assistant", True)))
    others = [document(n) for n in (1, 2, 3)]
    with pytest.raises(InputError, match=r"^Document 'made/bad', span 0: could not be read .ValueError: the pencil"):
        source([bad, *others])[0]
    made = source([bad, *others])
    plan = made.plan
    holes = Holes(1)
    holed = [Source([bad, *others], LAYOUT, plan, VOCAB, PATCH, holes=holes)[s] for s in range(len(plan.steps))]
    whole = [Source([well, *others], LAYOUT, plan, VOCAB, PATCH)[s] for s in range(len(plan.steps))]
    assert list(holes.reasons) == ["made/bad"]
    assert "left out 1 of at most 1: Document 'made/bad'" in caplog.text
    assert "pencil" in holes.reasons["made/bad"]
    for planned, a, b in zip(plan.steps, holed, whole, strict=True):
        for r, row in enumerate(planned.rows):
            here = a.document[r] == (row.index(0) if 0 in row else -2)
            assert not a.weight[r, here].any()
            np.testing.assert_array_equal(a.weight[r, ~here], b.weight[r, ~here])
            patches = np.isin(np.arange(a.patches.shape[1]), a.slot[r, here & (a.slot[r] >= 0)])
            assert not a.patches[r, patches].any()
            np.testing.assert_array_equal(a.patches[r, ~patches], b.patches[r, ~patches])
        assert_same(a.replace(weight=b.weight, patches=b.patches), b)
    assert sum(b.weight.sum() - a.weight.sum() for a, b in zip(holed, whole, strict=True)) == 3


def test_more_holes_than_the_budget_are_refused():
    bad = [Document(f"made/bad{i}", (Image(8, 8, rotten), Text("a"))) for i in range(3)]
    plan = index.once(bad, LAYOUT, tokens=48, rows=2)
    with pytest.raises(InputError, match=r"made/bad\d', span 0: .* With it 3 documents .*packing.holes is 2"):
        Source(bad, LAYOUT, plan, VOCAB, PATCH, holes=Holes(2))[0]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_rows_of_one_batch(hosts):
    documents = [document(n) for n in range(14)]
    plan = index.once(documents, LAYOUT, tokens=24, rows=4)
    assert len(plan.steps) > 1
    for step in range(len(plan.steps)):
        whole = Source(documents, LAYOUT, plan, VOCAB, PATCH)[step]
        parts = [Source(documents, LAYOUT, plan, VOCAB, PATCH, parts=(h,), of=hosts)[step] for h in range(hosts)]
        assert_same(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), whole)
        ends = Source(documents, LAYOUT, plan, VOCAB, PATCH, parts=(0, 3), of=4)[step]
        assert_same(ends, jax.tree.map(lambda x: x[[0, 3]], whole))
    with pytest.raises(InputError, match="4 rows cannot be shared by 3"):
        Source(documents, LAYOUT, plan, VOCAB, PATCH, of=3)[0]


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_change_nothing(made, threads):
    for step, batch in enumerate(read(made, 1, threads=threads, ahead=3), 1):
        assert_same(batch, made[step])


def test_broken_batches_are_caught_before_they_leave(made, monkeypatch):
    real = batches.build

    def broken(*given):
        batch = real(*given)
        batch.slot[0, batch.slot[0] >= 0] = 99
        return batch

    monkeypatch.setattr(batches, "build", broken)
    step = next(s for s in range(len(made)) if any(n % 3 for n in made.plan.steps[s].rows[0]))
    with pytest.raises(InputError, match=r"Row 0 .the documents made/.*places of media tokens that do not exist"):
        made[step]
    unchecked = dataclasses.replace(made, checks=False)[step]
    found = violations(jax.tree.map(jnp.asarray, unchecked), VOCAB.size, VOCAB.image)
    assert int(found[0, 2]) > 0
    assert not np.any(found[1:])


def test_sound_and_video_reach_their_places(rng):
    sounds, clips = Frames(rate=100, hop=4), Sampled(Native(PATCH, 1, PATCH * PATCH, 24 * 24), fps=1.0)
    lay = functools.partial(LAYOUT, sounds=sounds, clips=clips)
    sample = rng.normal(size=10).astype(np.float32)
    film = rng.integers(0, 256, (6, 8, 12, 3), np.uint8)
    documents = [
        Document("talk", (Audio(10, 100, sample), Text("a"), Video(6, 8, 12, 2.0, lambda: film), Text("b"))),
        Document("look", (Image(8, 8, noise(7, 8, 8)), Audio(4, 100, sample[:4]), Text("c", "assistant", True))),
    ]
    plan = index.once(documents, lay, tokens=64, rows=1)
    (batch,) = [Source(documents, lay, plan, VOCAB, PATCH, sound=4)[s] for s in range(len(plan.steps))]
    order = [documents[n].id for n in plan.steps[0].rows[0]]
    assert sorted(order) == ["look", "talk"]
    talk, look = order.index("talk"), order.index("look")
    here = (batch.modality[0] == AUDIO) & (batch.document[0] == talk)
    np.testing.assert_array_equal(batch.frames[0, batch.slot[0, here]].ravel(), [*sample, 0, 0])
    here = (batch.modality[0] == AUDIO) & (batch.document[0] == look)
    np.testing.assert_array_equal(batch.frames[0, batch.slot[0, here]].ravel(), sample[:4])
    here = (batch.modality[0] == VIDEO) & (batch.document[0] == talk)
    shown = batch.patches[0, batch.slot[0, here]]
    expected = np.concatenate([patchify(film[f], PATCH) for f in (0, 2, 5)])  # 3 seconds, one frame each
    np.testing.assert_array_equal(shown, expected)
    assert (batch.frame_lo <= batch.frame_hi).sum() == 4
    assert batch.grid[0].tolist() == ([[1, 2, 2], [3, 2, 3]] if look < talk else [[3, 2, 3], [1, 2, 2]])


def test_a_picture_left_out_by_the_budget_is_not_read():
    """Which medium stands where is known by its span, not by counting."""
    pictures = [noise((8, i), 8, 8) for i in range(3)]
    documents = [Document("d", (*(Image(8, 8, p) for p in pictures), Text("a")))]
    lay = functools.partial(LAYOUT, skip=(1,))
    plan = index.once(documents, lay, tokens=32, rows=1)
    batch = Source(documents, lay, plan, VOCAB, PATCH)[0]
    expected = np.concatenate([patchify(pictures[i], PATCH) for i in (0, 2)])
    np.testing.assert_array_equal(batch.patches[0, :8], expected)


def test_what_would_lose_sound_or_views_is_refused(rng):
    sample = rng.normal(size=10).astype(np.float32)
    lay = functools.partial(LAYOUT, sounds=Frames(rate=100, hop=4))
    documents = [Document("talk", (Audio(10, 100, sample), Text("a")))]
    plan = index.once(documents, lay, tokens=64, rows=1)
    for hop in (0, 3, 5):
        with pytest.raises(InputError, match=r"'talk', span 0: 10 samples were laid out as 3 frames"):
            Source(documents, lay, plan, VOCAB, PATCH, sound=hop)[0]


class Grid:
    """A policy that says how many patches, not how they come about."""

    def grid(self, height, width):
        return 2, 2


@pytest.mark.parametrize(
    ("policy", "reason"),
    [(Grid(), "does not say what is done to pixels"), (Fixed(8, 16, 16), r"made views of \[\(16, 16\)\] pixels")],
    ids=["no views", "other patch"],
)
def test_a_policy_that_does_not_fit_the_source_is_refused(policy, reason):
    lay = functools.partial(LAYOUT, resolution=policy)
    documents = [Document("x", (Image(8, 8, noise(1, 8, 8)), Text("a")))]
    plan = index.once(documents, lay, tokens=64, rows=1)
    with pytest.raises(InputError, match=f"'x', span 0: .*{reason}"):
        Source(documents, lay, plan, VOCAB, PATCH)[0]


POLICIES = {
    "stretch": Fixed(PATCH, 8, 12),
    "crop": Fixed(PATCH, 8, 12, "crop"),
    "pad": Fixed(PATCH, 8, 8, "pad"),
    "native": Native(PATCH, 2, 64, 24 * 24),
    "windows": Native(PATCH, 2, 64, 40 * 24),
    "naflex": NaFlex(PATCH, 9),
    "pixtral": Pixtral(PATCH, 16, 2),
    "any-res": AnyRes(PATCH, 8, ((1, 2), (2, 1))),
    "tiles": Tiles(PATCH, 8, 1, 4),
    "splits": Splits(PATCH, 8, 24),
    "pan and scan": PanAndScan(PATCH, 8, 4, 3),
    "slices": Slices(PATCH, 8, 20, whole=True, restored=True),
    "uhd": UHD(PATCH, 8, 4, 4),
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_reaches_the_batch(name):
    """Patch by patch: what the policy's views show lies where the layout's descriptors say it does."""
    policy = POLICIES[name]
    merge = getattr(policy, "merge", 1)
    cfg = interleave.Config(position="sequential", merge=merge, window=2 if name == "windows" else 0)
    vocab = dataclasses.replace(VOCAB, image_newline=3)
    words = Letters()
    words.vocab = vocab
    squares = merge**2 if name == "pixtral" else 1
    lay = functools.partial(LAYOUT, tokenizer=words, resolution=policy, media_tokens=lambda g: math.prod(g) // squares)
    pictures = [noise((9, i), *shape) for i, shape in enumerate([(7, 23), (30, 17), (16, 16)])]
    documents = [Document(f"{i}", (Image(*p.shape[:2], p), Text("a" * i))) for i, p in enumerate(pictures)]
    plan = index.once(documents, lay, tokens=200, rows=2)
    seen = 0
    for step, planned in enumerate(plan.steps):
        batch = Source(documents, lay, plan, vocab, PATCH, cfg, merge=math.isqrt(squares))[step]
        for r, row in enumerate(planned.rows):
            image = 0
            for number in row:
                for view in render(pictures[number], policy.views(*pictures[number].shape[:2])):
                    of = batch.patch_image[r] == image
                    assert batch.grid[r, image].tolist() == [1, view.shape[0] // PATCH, view.shape[1] // PATCH]
                    for (y, x), patch in zip(batch.patch_position[r, of], batch.patches[r, of], strict=True):
                        expected = view[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
                        np.testing.assert_array_equal(patch, expected.reshape(-1))
                        seen += 1
                    image += 1
    assert seen == sum(lay(d).patches for d in documents)


def test_pictures_wait_for_their_memory():
    """Two threads, room for one picture: never two at a time; one that is larger than the room is refused by name."""
    open_now, most, lock = 0, 0, threading.Lock()

    def draw():
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        time.sleep(0.02)
        with lock:
            open_now -= 1
        return noise(1, 8, 8)

    documents = [Document(f"{i}", (Image(8, 8, draw), Text("a" * 30))) for i in range(6)]
    plan = index.once(documents, LAYOUT, tokens=48, rows=1)
    need = images.ARRAY_BYTES * 64
    for room, expected in ((2 * need - 1, 1), (2 * need, 2)):
        most = 0
        memory = Memory(room)
        made = Source(documents, LAYOUT, plan, VOCAB, PATCH, memory=memory)
        assert len(list(read(made, 0, threads=3, ahead=3))) == 6
        assert (most, memory.taken) == (expected, 0)
    with pytest.raises(InputError, match=r"'.', span 0: it takes 0 MiB to decode, over the budget of 0 MiB"):
        Source(documents, LAYOUT, plan, VOCAB, PATCH, memory=Memory(need - 1))[0]


def test_a_file_that_takes_more_than_the_memory_is_refused_by_name_or_left_out():
    documents = [Document("f", (Image(64, 64, png(noise(1, 64, 64))), Text("a")))]
    plan = index.once(documents, LAYOUT, tokens=48, rows=1)
    made = Source(documents, LAYOUT, plan, VOCAB, PATCH, memory=Memory(64 * 64 * 8))
    with pytest.raises(InputError, match="'f', span 0: it takes 0 MiB to decode"):
        made[0]
    left = dataclasses.replace(made, holes=Holes(1))
    assert not left[0].patches.any()
    assert list(left.holes.reasons) == ["f"]


def test_a_budget_serves_in_the_order_of_asking():
    """A large want is not passed by small ones that came later, and all is given back after an error."""
    memory, order, threads = Memory(10), [], []

    def take(size):
        with memory.hold(size):
            order.append(size)

    def fail():
        with memory.hold(4):
            for size in (9, 1, 2):
                threads.append(threading.Thread(target=take, args=(size,)))
                threads[-1].start()
                until = time.monotonic() + 5
                while len(memory._waiting) < len(threads) and time.monotonic() < until:
                    time.sleep(0.001)
            assert order == []
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for thread in threads:
        thread.join()
    assert (order[0], sorted(order), memory.taken) == (9, [1, 2, 9], 0)


def test_reduced_decoding_keeps_to_the_size_it_is_resized_to():
    """A smooth JPEG, four times as large as needed: nearly the same patches, from a quarter of the pixels a side."""
    y, x = np.mgrid[0:96, 0:96]
    pixels = np.stack([x * 2, y * 2, 255 - x - y], -1).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=95)
    documents = [Document("j", (Image(96, 96, file.getvalue()), Text("a")))]
    plan = index.once(documents, LAYOUT, tokens=48, rows=1)
    full, reduced = (Source(documents, LAYOUT, plan, VOCAB, PATCH, reduced=r)[0] for r in (False, True))
    apart = np.abs(full.patches.astype(int) - reduced.patches)
    assert 0 < apart.max() <= 6
    found = images.find(file.getvalue())
    lying = PIL.Image.Exif()
    lying[0x0112] = 6  # stored lying, seen upright: 96 wide and 192 high
    turned = io.BytesIO()
    PIL.Image.fromarray(np.concatenate([pixels, pixels], 1)).save(turned, "JPEG", exif=lying)
    assert images.find(turned.getvalue()).size == (192, 96)
    assert images.find(turned.getvalue()).load(least=(48, 24)).size == (24, 48)
    assert images.find(turned.getvalue()).load(least=(96, 24)).size == (48, 96)
    assert found.load(least=(24, 24)).size == (24, 24)
    assert found.load(least=(25, 24)).size == (48, 48)
    assert found.load().size == found.size == (96, 96)
