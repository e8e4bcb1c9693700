"""The model that a run starts from: its processor and its parameters, read from a directory or a checkpoint."""

import dataclasses
import functools
import itertools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmjax.convert import huggingface, orbax
from mmjax.convert import processor as processors
from mmjax.convert.files import CONFIG
from mmjax.convert.huggingface import Model
from mmjax.convert.processor import Processor
from mmjax.core import spec as specs
from mmjax.core import tree
from mmjax.core.cast import cast
from mmjax.core.checksum import checksums
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike
from mmjax.core.fingerprint import fingerprint
from mmjax.models import decoder, encoder_decoder, vlm
from mmjax.nn import transformer
from mmjax.sequence.document import Document
from mmjax.sequence.layout import TEXT, Layout, Piece
from mmjax.train import parameters, stages, state
from mmjax.train.config import Config
from mmjax.train.state import TrainState


def opened(path: PathLike) -> Model:
    """A model with leaves that are read when they are asked for; a language model alone as a vlm that sees nothing.

    Args:
      path: a Hugging Face directory, or a checkpoint that python -m mmjax.convert has made of one.

    Raises:
      InputError: it is neither, cannot be read, or writes no text.
    """
    path = Path(path)
    if not (path / CONFIG).exists() and not (path / "done").is_dir():
        raise InputError(
            f"{path} is neither a Hugging Face directory (it has no {CONFIG}) nor a checkpoint that python -m "
            f"mmjax.convert has made of one; give the local directory of one."
        )
    model = huggingface.opened(path) if (path / CONFIG).exists() else orbax.opened(path)
    if model.of in (decoder, encoder_decoder):
        cfg = vlm.Config(None, None, model.cfg)
        origin = dataclasses.replace(model.origin, found=model.origin.found.within(vlm, cfg, "decoder"))
        return Model(vlm, cfg, {"decoder": model.params}, origin)
    if model.of is not vlm:
        raise InputError(
            f"{path} holds a {model.origin.raw['model_type']}, which writes no text and cannot be trained here; give "
            f"the directory of a language model or a vision-language model, as of LLaVA."
        )
    return model


def both(path: PathLike) -> tuple[Model, Processor]:
    """The same model and its processor, by which its encoder normalises pictures."""
    model = opened(path)
    if (Path(path) / CONFIG).exists():
        its = processors.load(path, model)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in {CONFIG: model.origin.config, **model.origin.files}.items():
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                (Path(folder) / name).write_bytes(data)
            its = processors.load(folder, model)
    if model.cfg.sees and its.resolution is None:
        raise InputError(f"{path} has no settings of pictures (preprocessor_config.json); add those of the model.")
    return processors.with_colours(model, its), its


def _numbers(cfg: Any) -> Any:
    """A config without what changes no number: what the backward pass keeps of each block, and how loops turn."""
    if isinstance(cfg, transformer.Config):
        cfg = dataclasses.replace(cfg, remat="none", unroll=1)
    if not dataclasses.is_dataclass(cfg):
        return cfg
    return dataclasses.replace(cfg, **{f.name: _numbers(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)})


def processor(cfg: Config) -> Processor:
    """The processor of a run, with what the run has changed of it.

    Raises:
      InputError: the directory's model is not the config's.
    """
    model, its = both(cfg.base)
    if _numbers(model.cfg) != _numbers(cfg.model):
        raise InputError(f"The model in {cfg.base} is not the config's; leave model as it is in the directory.")
    return dataclasses.replace(its.at(cfg.resolution), sequence=cfg.sequence)


def layout_of(its: Processor) -> Callable[..., Layout]:
    """The processor's layout, in which what is learnt last ends as answers do.

    Many templates write no end behind an answer (LLaVA's); who learns from them alone never stops.
    """

    def lay(document: Document, answer: int = 0, **how: Any) -> Layout:
        laid = its.layout(document, answer, **how)
        last = list(itertools.takewhile(lambda piece: piece.train, reversed(laid.pieces)))
        if not last or not its.stops or any(set(piece.ids) & set(its.stops) for piece in last):
            return laid
        end = its.vocab.end if its.vocab.end in its.stops else its.stops[0]
        return Layout.of(laid.id, (*laid.pieces, Piece(TEXT, 1, (end,), train=True)), laid.answers > 0)

    return lay


def beside(its: Processor, document: Document) -> int:
    """How many tokens of a document the connector reads beside each of its pictures; 0 where it reads none."""
    return 0 if its.reader is None else its.reader.beside(document, 1).shape[1]


def start(part: stages.Part, shape: TrainState) -> TrainState:
    """The state before the first step of the first stage, lying as `shape` says."""
    cfg, tx = part.cfg, stages.optimizer(part.cfg)
    if cfg.base is None:
        return state.create_sharded(part.spec, tx, shape, jax.random.key(cfg.seed), cfg.update.frozen)
    wanted = tree.flatten(shape.params)
    new = {name: x for name, x in wanted.items() if re.fullmatch(parameters.OWN, name)}
    params = _read(cfg.base, {name: x for name, x in wanted.items() if name not in new})
    if new:
        spec = tree.flatten(part.spec)
        make = functools.partial(specs.init, tree.unflatten({name: spec[name] for name in new}))
        made = jax.jit(make, out_shardings=state.shardings(tree.unflatten(new)))(jax.random.key(cfg.seed))
        params |= tree.flatten(made)
    return state.of_params(tree.unflatten(params), tx, shape, cfg.update.frozen)


def completed(part: stages.Part, shape: TrainState, now: TrainState) -> TrainState:
    """The state that a checkpoint holds a part of (`stages.own`), with the parameters that are the base's."""
    if not part.borrowed:
        return now
    there = _read(part.cfg.base, tree.flatten(tree.choose(shape.params, part.borrowed)[0]))
    return now.replace(params=tree.merge(now.params, tree.unflatten(there)))


def borrowed(part: stages.Part, params: dict) -> str:
    """A name for what the parameters that are the base's hold: another after any change of the directory."""
    return name_of(checksums(tree.choose(params, part.borrowed)[0]))


def name_of(sums: dict[str, str]) -> str:
    """A name for leaves of these checksums; "" for none."""
    return fingerprint(sorted(sums.items())) if sums else ""


def _read(base: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Parameters of the base by name."""
    there = tree.flatten(opened(base).params)
    return {name: _placed(name, there[name.removesuffix("/base")], like) for name, like in wanted.items()}


def _placed(name: str, leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf on the devices; the host holds it whole meanwhile."""
    whole = cast(np.asarray(leaf), np.dtype(like.dtype), f"The parameter {name}")
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: whole[index])
