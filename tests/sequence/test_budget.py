import functools

import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.sequence.budget import Blocks, Budget, Costs, Limited, fit, report
from mmjax.sequence.document import Document, Image, Text, Video
from mmjax.sequence.layout import layout
from mmjax.tokenizers.resolution import Fixed, Native
from mmjax.tokenizers.tiles import AnyRes
from mmjax.tokenizers.video import Pooled, Sampled, Stills, Trimmed
from mmjax.tokenizers.vocab import Vocab

VOCAB = Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=35, image_newline=34)
NATIVE = Native(4, 1, 16, 40 * 40)
CLIPS = Sampled(NATIVE, fps=2.0, most=8)


class Letters:
    vocab = VOCAB

    def encode(self, text):
        return [9] * len(text)


LAY = functools.partial(layout, tokenizer=Letters())


def picture(side):
    return Image(side, side, b"")


def film(frames, side=8):
    return Video(frames, side, side, 4.0, lambda: None)


TWO = Document("two", (picture(40), Text("abc"), picture(24), Text("de"), Text("fgh", "assistant", True)))


def test_expanded_counts_by_span_and_modality():
    """begin user [start 100 end] abc [start 36 end] de end assistant fgh end."""
    said = report(LAY(TWO, resolution=NATIVE), headroom=7)
    assert said.spans == ((0, "image", 100), (1, "text", 3), (2, "image", 36), (3, "text", 2), (4, "text", 3))
    assert said.tokens == {"text": 17, "image": 136}  # nine marks
    assert said.total == 153 + 7
    assert (said.flops, said.cache) == (0, 0)


def test_costs_against_a_count_by_hand():
    """A gated decoder of 2 layers (width 8, queries of 8 values, keys of 4) and an encoder, operation by operation."""
    decoder = Blocks(2, 8, 8, 4, 16)
    encoder = Blocks(3, 6, 6, 6, 12, gated=False)
    laid = LAY(Document("d", (film(4, 8), picture(8))), resolution=NATIVE, clips=CLIPS)
    n = laid.tokens
    matrices = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16
    pairs = sum(i + 1 for i in range(n))
    expected = 2 * (2 * n * matrices + 2 * 2 * 8 * pairs) + 2 * 8 * 35
    frames = [4, 4, 4]  # two frames and a picture of 2 × 2 patches, each by itself
    matrices = 4 * 6 * 6 + 2 * 6 * 12
    expected += 3 * sum(2 * f * matrices + 2 * 2 * 6 * f * f for f in frames)
    costs = Costs(decoder, 35, encoder, bytes=2)
    assert costs.prefill(laid) == expected
    assert costs.cache(laid, 3) == (n + 3) * 2 * (2 * 4) * 2  # keys and values of two layers


def test_within_the_budget_nothing_is_done():
    found, said = fit(TWO, LAY, Budget(tokens=160, headroom=7), NATIVE)
    assert found == LAY(TWO, resolution=NATIVE)
    assert said.did == ()
    with pytest.raises(InputError, match=r"'two' takes 160 tokens .17 text, 136 image, 7 for .*budget of 159"):
        fit(TWO, LAY, Budget(tokens=159, headroom=7), NATIVE)


def test_the_resolution_is_lowered_no_further_than_needed():
    budget = Budget(tokens=120, over=("resolution", "refuse"))
    found, said = fit(TWO, LAY, budget, NATIVE)
    assert found.tokens <= 120
    (what,) = said.did
    share = int(what.removeprefix("resolution lowered to ").removesuffix("%")) / 100
    # One step more would be too much; the step is the largest of 64ths that holds.
    steps = [s / 64 for s in range(63, 0, -1)]
    holds = [LAY(TWO, resolution=NATIVE.lowered(s)).tokens <= 120 for s in steps]
    assert abs(steps[holds.index(True)] - share) < 0.005
    assert holds == sorted(holds)


def test_fewer_frames_then_fewer_pictures_then_refused():
    document = Document("film", (picture(8), film(64), Text("a"), picture(8), picture(12)))
    lay = functools.partial(LAY, resolution=NATIVE)
    whole = LAY(document, resolution=NATIVE, clips=CLIPS)
    assert whole.size[2] == 4
    assert whole.pieces[6].grid == (8, 2, 2)
    found, said = fit(document, lay, Budget(whole.tokens - 9, over=("frames",)), NATIVE, CLIPS)
    assert found.pieces[6].grid[0] == 5
    assert said.did == ("frames lowered to 73%",)
    # Frames alone are not enough: the last picture goes as well, and so on.
    least = fit(document, lay, Budget(29, over=("frames", "images")), NATIVE, CLIPS)
    assert least[1].did == ("frames lowered to 2%", "without the spans (4,)")
    assert [p.span for p in least[0].pieces if p.grid] == [0, 1, 3]
    least = fit(document, lay, Budget(20, over=("frames", "images")), NATIVE, CLIPS)
    assert least[1].did[1] == "without the spans (3, 4)"
    assert fit(document, lay, Budget(5, over=("images",)), NATIVE, CLIPS)[0].images == 0
    with pytest.raises(InputError, match=r"'film' takes 4 tokens .*after frames .*without the spans \(0, 1, 3, 4\)"):
        fit(document, lay, Budget(3, over=("frames", "images", "refuse")), NATIVE, CLIPS)


def test_frames_that_are_pictures_of_their_own_become_fewer():
    """InternVL's and SmolVLM's; of 64 pictures all are shown, each of four tokens."""
    document = Document("film", (film(64), Text("a")))
    lay = functools.partial(LAY, resolution=NATIVE)
    for clips in (Stills(NATIVE), Trimmed(NATIVE), Pooled(NATIVE)):
        whole = lay(document, clips=clips)
        found, said = fit(document, lay, Budget(whole.tokens // 2, over=("frames", "refuse")), NATIVE, clips)
        assert said.did[0].startswith("frames lowered to")
        assert 0.4 * whole.tokens < found.tokens <= whole.tokens // 2


def test_what_changes_nothing_is_not_kept():
    """Two pictures have a policy of their own, which is not lowered; what is left without the second is whole."""

    def lay(document, resolution, skip=(), **how):
        alone = sum(isinstance(span, Image) for span in document.spans) - len(skip) == 1
        return LAY(document, resolution=resolution if alone else NATIVE, skip=skip, **how)

    found, said = fit(TWO, lay, Budget(130, over=("resolution", "images")), NATIVE)
    assert said.did == ("without the spans (2,)",)
    assert found == LAY(TWO, resolution=NATIVE, skip=(2,))


def test_a_limit_of_flops_or_cache():
    costs = Costs(Blocks(2, 8, 8, 4, 16), 35)
    whole = report(LAY(TWO, resolution=NATIVE), 5, costs)
    for limit in ({"flops": whole.flops // 2}, {"cache": whole.cache // 2}):
        found, said = fit(TWO, LAY, Budget(headroom=5, over=("resolution",), **limit), NATIVE, costs=costs)
        assert 0.4 < found.tokens / whole.total < 0.65
        assert Budget(**limit).holds(said)


def test_policies_of_one_size_cannot_be_lowered():
    for policy in (Fixed(4, 40, 40), AnyRes(4, 20, newline=False)):
        with pytest.raises(InputError, match="over the budget of 50 tokens"):
            fit(TWO, LAY, Budget(50, over=("resolution", "refuse")), policy)


def test_what_was_changed_is_kept_by_document():
    lay = Limited(LAY, Budget(tokens=120, over=("resolution",)), NATIVE)
    small = Document("small", (Text("a"),))
    assert lay(small).tokens == 4
    assert lay(TWO).tokens <= 120
    assert list(lay.reports) == ["two"]
    assert lay.reports["two"].did[0].startswith("resolution lowered")
    assert np.sum([n for *_, n in lay.reports["two"].spans]) < 120
