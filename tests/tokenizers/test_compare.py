import numpy as np
from PIL import Image

from mmjax.tokenizers import compare
from mmjax.tokenizers.published import PUBLISHED
from mmjax.tokenizers.resolution import Native
from mmjax.tokenizers.tiles import AnyRes


def test_tokens_and_distortion_by_hand():
    qwen, next_ = PUBLISHED["qwen2-vl"], PUBLISHED["llava-next"]
    assert isinstance(qwen.policy, Native)
    assert compare.tokens(qwen, 280, 560) == 10 * 20
    assert compare.distortion(qwen, 280, 560) == 0
    assert isinstance(next_.policy, AnyRes)
    assert compare.tokens(next_, 336, 672) == 24 * 24 + 24 * (48 + 1)
    assert compare.tokens(PUBLISHED["llava-uhd"], 672, 1008) == 64 * (1 + 6)
    assert compare.tokens(PUBLISHED["gemma-3"], 300, 300) == 256
    for size in ((100, 250), (250, 100)):
        np.testing.assert_allclose(compare.distortion(PUBLISHED["vit-base-16"], *size), 1.5)


def test_the_command(tmp_path, capsys, rng):
    for name, shape in (("wide", (40, 90)), ("tall", (70, 50))):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / "wide.png"), str(tmp_path / "tall.png")]
    assert compare.main([*files, "--picture", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| policy | wide 40×90 | tall 70×50 |")
    assert len(lines) == 2 + len(PUBLISHED) + 1
    assert {line.count("|") for line in lines} == {6}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == (len(PUBLISHED) + 1) * 160
        assert len(sheet.getcolors(2**20)) > 100
    (tmp_path / "broken.png").write_bytes(b"<html>")
    assert compare.main([str(tmp_path / "broken.png")]) == 2
    assert "broken.png' is not a JPEG" in capsys.readouterr().err
