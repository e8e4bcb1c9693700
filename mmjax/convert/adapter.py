"""Adapters in the layout of peft: a directory of adapter_config.json and adapter_model.safetensors, in and out.

    adapter.save("my-adapter", model, base="path/to/llava")      # of a model with adapted kernels (nn.lora)
    model = adapter.load("my-adapter", huggingface.load("path/to/llava"))

There a torch.nn.Linear multiplies with W [out, in], so that lora_A [rank, in] is our A turned, and lora_B [out, rank]
our B. Tensors go by the names that modules have in transformers 5, behind "base_model.model.", as peft writes them; the
names in files on the Hub are read as well. What was trained besides adapters is saved whole (modules_to_save).
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.convert import header
from mmjax.convert import rules as tables
from mmjax.convert.files import One, new_directory, read_small
from mmjax.convert.model import Model, origin_of
from mmjax.convert.rules import Piece, Plan
from mmjax.core import strict_json, tree
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike
from mmjax.core.strict_json import shown
from mmjax.models import vlm
from mmjax.nn import lora

Renamed = tuple[tuple[str, str], ...]  # patterns and what is written instead, one after the other
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 4 << 20
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
# Names of tensors in files, and what their modules are called in the memory of transformers 5, of whole models.
RENAMED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector|visual)\.", r"model.\1."),
    (r"^image_newline$", "model.image_newline"),
    (r"^model\.layers\.", "model.language_model.layers."),
    (r"^model\.(embed_tokens|norm)\.", r"model.language_model.\1."),
    (r"^(model\.vision_tower)\.vision_model\.", r"\1."),
)
# What goes on top of these, or in their place, by model_type.
RENAMED_MORE = {
    "mllama": ((r"^vision_model\.", "model.vision_model."),),
    "deepseek_vl": ((r"^(model\.vision_model)\.vision_model\.", r"\1."),),
}
AS_IN_FILES = ("blip-2", "instructblip", "idefics")
# What a config may say that is not computed here.
REFUSED = ("use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "target_parameters")
REFUSED += ("trainable_token_indices", "layer_replication", "use_qalora", "arrow_config", "alora_invocation_tokens")


def save(
    path: PathLike, model: Model, *, base: str, changed: Collection[str] = (), config: lora.Config | None = None
) -> None:
    """Writes what is adapted of a model, and nothing of what is not.

    Args:
      path: a directory that is not there yet, or is empty.
      model: one with adapted kernels, and an origin.
      base: where the model without adapters is, a directory or a name on the Hub.
      changed: other leaves that were trained, by path.
      config: of the adapters; left out, alpha is what their scale makes of it.

    Raises:
      InputError: there is something at `path`; nothing is adapted; or peft cannot have it so: a kernel trained beside
        its adapter, or sharing a tensor with others, a parameter of no layer of its own, a table that is the head.
    """
    made, names = _plan(model), renamed(model)
    plain, nodes = lora.parted(model.params)
    refuse(model, nodes, changed)
    first = next(iter(nodes.values()))
    rank = first["a"].shape[-1]
    config = config or lora.Config(rank, float(np.max(first["scale"])) * rank)
    tensors: dict[str, np.ndarray] = {}
    for name, node in nodes.items():
        a, b = (np.asarray(node[k], np.float32) for k in "ab")
        for piece in made.pieces[name]:
            module, at = PREFIX + _module(name, piece, names), piece.at
            tensors[module + A] = np.ascontiguousarray(a[at].reshape(-1, rank).T)
            tensors[module + B] = np.ascontiguousarray(b[at].reshape(rank, -1).T)
    targets = sorted(key[len(PREFIX) : -len(A)] for key in tensors if key.endswith(A))
    saved = _saved(model, made, plain, changed)
    tensors |= {f"{PREFIX}{in_memory(key, names)}": x for key, x in saved.items()}
    kept = sorted({in_memory(key, names).rpartition(".")[0] for key in saved})
    said = _config(base, config, targets, kept)
    with new_directory(path) as folder:
        _write(folder / WEIGHTS, tensors)
        (folder / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


def refuse(model: Model, adapted: Collection[str], changed: Collection[str] = ()) -> None:
    """Raises InputError where an adapter cannot hold these kernels' adapters and these other leaves, by path."""
    made, names = _plan(model), renamed(model)
    if not adapted:
        raise InputError("No kernel of this model is adapted; save it whole (convert.huggingface.save).")
    both = sorted(set(adapted) & set(changed))
    if both:
        raise InputError(
            f"The kernel {both[0]} is trained beside its adapter, which peft has no layout for; export the model "
            f"merged."
        )
    for name in adapted:
        for piece in made.pieces[name]:
            _module(name, piece, names)
    odd = sorted(key for key in _keys(made, changed) if key.rpartition(".")[2] not in ("weight", "bias"))
    if odd:
        raise InputError(
            f"{odd[0]} is trained, a parameter of no layer of its own, which peft does not save; export the model "
            f"merged."
        )
    shared = sorted({"decoder/embed", "embed"} & set(changed))
    if shared and getattr(getattr(model.cfg, "decoder", model.cfg), "tied", False):
        raise InputError(
            f"{shared[0]} is trained, which the head is tied to, and peft would leave the head as it was; export the "
            f"model merged."
        )


def load(path: PathLike, model: Model) -> Model:
    """A model with the adapters of a directory that `save` or peft has written, and what was saved whole with them.

    Args:
      path: the directory.
      model: what it was made of, with parameters at hand (convert.huggingface.load).

    Raises:
      InputError: a file is missing, damaged or unsafe; it is no LoRA, or one of a kind that is not computed here; or it
        is of another model.
    """
    path, said = Path(path), config(path)
    source, made = One(path, WEIGHTS), _plan(model)
    there = {_plain(key): key for key in source.shapes()}
    names, flat = renamed(model), tree.flatten(model.params)
    used: set[str] = set()
    for name, pieces in made.pieces.items():
        if name.endswith("/kernel"):
            found = [_pair(source, there, piece, names, said.rank) for piece in pieces]
            if any(found):
                used |= {key for pair in found if pair for key in pair[:2]}
                flat[name] = _node(name, made, found, flat[name], said)
    flat |= _replaced(source, there, made, flat, names, used)
    surplus = sorted(there.keys() - used)
    if surplus:
        raise InputError(
            f"{path / WEIGHTS} has {len(surplus)} tensors that are not this model's, as {shown(surplus[0])}; give the "
            f"adapter of this model."
        )
    return dataclasses.replace(model, params=tree.unflatten(flat))


def config(path: PathLike) -> lora.Config:
    """What a directory says of its adapters; `targets` are not its own: which kernels are adapted its tensors say.

    Raises:
      InputError: there is no such file, it is damaged or unsafe; or it is of no LoRA, or one that is not computed here.
    """
    place = Path(path) / CONFIG
    return _understood(strict_json.loads(read_small(place, MAX_CONFIG), str(place), max_bytes=MAX_CONFIG), place)


def renamed(model: Model) -> Renamed:
    """The table for `in_memory`; models of text are called as in their files."""
    kind = origin_of(model).raw["model_type"]
    if model.of is not vlm or not model.cfg.sees or kind in AS_IN_FILES:
        return ()
    return RENAMED + RENAMED_MORE.get(kind, ())


def in_memory(key: str, names: Renamed) -> str:
    """What transformers calls a tensor of a file."""
    for pattern, new in names:
        key = re.sub(pattern, new, key)
    return key


def _plan(model: Model) -> Plan:
    return tables.plan(model.of.spec(model.cfg), origin_of(model).found.rules)


def _alone(piece: Piece) -> bool:
    """Whether a kernel is a linear layer of its own, not parts of some."""
    return piece.axis is None and piece.axes == (1, 0) and not isinstance(piece.at, slice)


def _module(name: str, piece: Piece, names: Renamed) -> str:
    """The layer that a kernel is in transformers.

    Raises:
      InputError: it is no layer of its own.
    """
    if not _alone(piece) or not piece.key.endswith(".weight"):
        raise InputError(
            f"The kernel {name} is in {piece.key}, which is no linear layer of its own; export the model merged, or "
            f"leave it out of lora.targets."
        )
    return in_memory(piece.key, names).removesuffix(".weight")


def _saved(model: Model, made: Plan, plain: Mapping[str, Any], changed: Collection[str]) -> dict[str, np.ndarray]:
    """The tensors that changed leaves become."""
    keys = _keys(made, changed)
    rules = origin_of(model).found.rules
    return tables.save(model.of.spec(model.cfg), rules, tree.unflatten(plain), keys) if keys else {}


def _keys(made: Plan, changed: Collection[str]) -> set[str]:
    """The tensors that leaves are in."""
    return {piece.key for name in changed for piece in made.pieces[name]}


def _config(base: str, config: lora.Config, targets: list[str], kept: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "use_rslora": config.rslora,
        "target_modules": targets,
        "modules_to_save": kept or None,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    head = header.build({key: (x.dtype, x.shape) for key, x in tensors.items()}, {"format": "pt"}, str(path))
    with open(path, "xb") as file:
        file.write(head.raw)
        for key, entry in head.tensors.items():
            file.seek(entry.start)
            file.write(np.ascontiguousarray(tensors[key]).reshape(-1).view(np.uint8))


def _understood(said: Any, path: Path) -> lora.Config:
    """The adapters that a config speaks of.

    Raises:
      InputError: it is none of LoRA, or says something that is not computed here.
    """
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        kind = shown(said.get("peft_type") if isinstance(said, dict) else None)
        raise InputError(f"{path} is of the peft_type {kind}, and only LORA is known here; give another adapter.")
    odd = [name for name in REFUSED if said.get(name)]
    if said.get("bias", "none") != "none":
        odd.append("bias")
    if odd:
        raise InputError(
            f"{path} says {odd[0]} is {shown(said[odd[0]])}, which is not computed here; merge it in peft."
        )
    rank, alpha = said.get("r", 8), said.get("lora_alpha", 8)
    for value in (rank, alpha):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
            raise InputError(f"{path} says r is {shown(rank)} and lora_alpha {shown(alpha)}; both are numbers above 0.")
    if rank != int(rank):
        raise InputError(f"{path} says r is {shown(rank)}, which is no whole number; repair the file.")
    dropout = said.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{path} says lora_dropout is {shown(dropout)}, which is no share below 1; repair the file.")
    return lora.Config(int(rank), float(alpha), rslora=bool(said.get("use_rslora", False)), dropout=float(dropout))


def _plain(key: str) -> str:
    """A tensor's name without what peft, and its wrappers, put in it."""
    key = key.removeprefix(PREFIX)
    return re.sub(r"\.(modules_to_save|original_module)(\.default)?\.|\.default\.", ".", key)


def _names(key: str, names: Renamed) -> tuple[str, ...]:
    return tuple(dict.fromkeys((in_memory(key, names), key)))


def _pair(
    source: One, there: Mapping[str, str], piece: Piece, names: Renamed, rank: int
) -> tuple[str, str, np.ndarray, np.ndarray] | None:
    """The names and the values of A and B of one layer's kernel; None where it is not adapted."""
    for name in _names(piece.key, names):
        a, b = (name.removesuffix(".weight") + end for end in (A, B))
        if a in there and b in there:
            values = tuple(source.read(there[key]) for key in (a, b))
            shapes = (rank, piece.shape[1]), (piece.shape[0], rank)
            if not _alone(piece):
                raise InputError(
                    f"{source.where} adapts {name}, whose parts are several kernels here; merge it in peft."
                )
            if tuple(x.shape for x in values) != shapes:
                raise InputError(
                    f"{a} in {source.where} is {list(values[0].shape)}, and {b} {list(values[1].shape)}, where this "
                    f"model has {list(shapes[0])} and {list(shapes[1])}; give the adapter of this model."
                )
            return a, b, *values
    return None


def _node(name: str, made: Plan, found: list[Any], base: Any, config: lora.Config) -> dict[str, Any]:
    """An adapted kernel; layers that are not adapted add zeros."""
    of = lora.spec({"kernel": made.leaves[name]}, dataclasses.replace(config, targets=("kernel",)))["kernel"]
    a, b = (np.zeros(of[k].shape, np.float32) for k in "ab")
    for piece, pair in zip(made.pieces[name], found, strict=True):
        if pair is not None:
            at = piece.at
            a[at] = np.asarray(pair[2], np.float32).T.reshape(a[at].shape)
            b[at] = np.asarray(pair[3], np.float32).T.reshape(b[at].shape)
    scale = jnp.full(of["scale"].shape, config.scale, jnp.float32)
    return {"base": base, "a": jnp.asarray(a), "b": jnp.asarray(b), "scale": scale}


def _replaced(
    source: One, there: Mapping[str, str], made: Plan, flat: Mapping[str, Any], names: Renamed, used: set[str]
) -> dict[str, Any]:
    """The leaves that are saved whole beside adapters; what was read of them is added to `used`."""
    out = {}
    for name, pieces in made.pieces.items():
        found = [next((n for n in _names(piece.key, names) if n in there), None) for piece in pieces]
        if not any(found):
            continue
        if not all(found) or isinstance(flat[name], dict):
            raise InputError(
                f"{source.where} has {next(filter(None, found))} whole, but not all of what is {name} here; merge it "
                f"in peft."
            )
        leaf = np.array(flat[name])
        for piece, key in zip(pieces, found, strict=True):
            tensor = source.read(there[key])
            if tensor.shape != made.tensors[piece.key]:
                raise InputError(f"{key} in {source.where} has another shape than this model's; give its own adapter.")
            leaf[piece.at] = piece.load(tensor)
        out[name] = jnp.asarray(leaf)
        used |= set(found)
    return out
