"""Videos and sound: how much of them enters the model, from their headers."""

import pytest

from mmjax.core.errors import InputError
from mmjax.tokenizers.audio import Frames
from mmjax.tokenizers.numerals import in_words
from mmjax.tokenizers.resolution import Fixed, Native
from mmjax.tokenizers.video import Pooled, Sampled, Stills, Trimmed

NATIVE = Native(4, 1, 16, 40 * 40)


@pytest.mark.parametrize(
    ("frames", "fps", "kept"),
    [(90, 30.0, 6), (1, 30.0, 1), (3, 30.0, 1), (5, 1.0, 5), (3000, 30.0, 64), (7, 2.0, 7)],
)
def test_two_frames_a_second_but_no_more_than_there_are(frames, fps, kept):
    grid, interval = Sampled(NATIVE).clip(frames, 8, 12, fps)
    assert grid == (kept, 2, 3)
    assert interval == 1.0


def test_absolute_time():
    """Qwen2.5-VL: two numbers a second; 12 seconds in 4 frames are 6 numbers apart."""
    grid, interval = Sampled(NATIVE, most=4, tokens_per_second=2.0).clip(300, 8, 8, 25.0)
    assert grid[0] == 4
    assert interval == pytest.approx(6.0)


def test_fewer_frames():
    half = Sampled(NATIVE).lowered(0.5)
    assert (half.fps, half.most) == (1.0, 32)
    assert Sampled(NATIVE, most=2).lowered(0.1).clip(300, 8, 8, 30.0)[0][0] == 1


@pytest.mark.parametrize(
    "policy",
    [Pooled(NATIVE), Pooled(NATIVE, number=8), Stills(NATIVE, fps=2.0), Stills(NATIVE), Trimmed(NATIVE, 2.0, 9)],
    ids=str,
)
def test_fewer_of_the_pictures_that_a_family_chooses(policy):
    """Some of those it shows, in their order and far apart; as often lowered as wanted, one is left."""
    every = policy.chosen(40, 10.0)
    half = policy.lowered(0.5).chosen(40, 10.0)
    assert len(half) == len(every) // 2
    assert set(half) < set(every)
    assert list(half) == sorted(half)
    assert half[-1] - half[0] > 0.6 * (every[-1] - every[0])
    assert policy.lowered(0.5).lowered(0.5).chosen(40, 10.0) == policy.lowered(0.25).chosen(40, 10.0)
    assert policy.lowered(1e-9).clip(40, 8, 12, 10.0) == ((1, 2, 3), 1.0)
    assert len(policy.lowered(0.5).times(40, 10.0)) == len(half)


def test_long_clips_lose_their_first_and_last_second():
    """SmolVLM2: where more than most × fps seconds are left between them; short ones end at their last picture."""
    policy = Trimmed(NATIVE, 1.0, 3)
    assert policy.chosen(40, 10.0) == (0, 19, 39)
    assert policy.chosen(60, 10.0) == (10, 30, 50)
    assert policy.chosen(10, 100.0) == (0,)
    assert policy.chosen(2, 0.5) == (0, 1)
    assert Trimmed(NATIVE).chosen(3, 9.0) == (0, 1, 2)
    assert policy.times(60, 10.0) == (1.0, 3.0, 5.0)
    assert policy.clip(60, 8, 12, 10.0) == ((3, 2, 3), 1.0)


def test_numbers_in_words():
    said = {0: "zero", 13: "thirteen", 20: "twenty", 64: "sixty-four", 100: "one hundred", 105: "one hundred and five"}
    said |= {342: "three hundred and forty-two", 1000: "one thousand", 1001: "one thousand and one"}
    said |= {12_345: "twelve thousand, three hundred and forty-five"}
    assert {number: in_words(number) for number in said} == said
    for number in (-1, 1_000_000):
        with pytest.raises(InputError, match="is not spelled in words"):
            in_words(number)


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (320, 1), (321, 2), (16_000, 50)])
def test_frames_of_sound(samples, frames):
    assert Frames().frames(samples, 16_000) == frames


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (lambda: Frames().frames(10, 8000), "8000 samples a second"),
        (lambda: Frames().frames(0, 16_000), "no samples"),
        (lambda: Sampled(NATIVE).clip(0, 8, 8, 30.0), "0 frames"),
        (lambda: Sampled(NATIVE).clip(9, 8, 8, 0.0), "at 0 a second"),
        (lambda: Sampled(NATIVE, fps=0.0), "samples nothing"),
        (lambda: Frames(hop=0), "no frames"),
        (lambda: Trimmed(NATIVE, fps=1.0), "give both fps and most"),
        (lambda: Trimmed(NATIVE, 1.0, 0), "shows nothing"),
        *((lambda of=of: of(NATIVE, share=0.0), "give a share above 0") for of in (Pooled, Stills, Trimmed)),
        (lambda: Trimmed(NATIVE, 1.0, 4).chosen(0, 1.0), "0 frames"),
    ],
)
def test_refused(policy, says):
    with pytest.raises(InputError, match=says):
        policy()


def test_frames_that_are_pictures_of_their_own():
    """InternVL's: from the middle of each share, or from a given picture on."""
    whole = Fixed(14, 28, 28)
    assert Stills(whole).chosen(4, 2.0) == (0, 1, 2, 3)
    assert Stills(whole, number=5).chosen(23, 9.0) == (2, 6, 11, 16, 20)
    assert Stills(whole, number=4, shift=0.0).chosen(10, 1.0) == (0, 2, 5, 7)
    assert Stills(whole, fps=1.0).clip(12, 50, 60, 4.0) == ((3, 2, 2), 1.0)
    assert Stills(whole, fps=1.0).times(12, 4.0) == (0.5, 1.5, 2.5)
    with pytest.raises(InputError, match="does not give the 5"):
        Stills(whole, number=5).chosen(4, 1.0)
    with pytest.raises(InputError, match="begins before its clip"):
        Stills(whole, number=5, shift=-1.0)
    with pytest.raises(InputError, match="ends before the first"):
        Stills(whole, number=2, shift=6.0).clip(6, 50, 60, 4.0)
