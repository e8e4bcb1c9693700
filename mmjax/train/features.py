"""What a frozen vision tower makes of the pictures of a run, made once and kept (see train.config.Features)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmjax.core import meshes, tree
from mmjax.core.errors import InputError
from mmjax.core.meshes import Rules
from mmjax.core.packed import Arrays
from mmjax.core.store import Store
from mmjax.data.source import Named, Source
from mmjax.generate import features
from mmjax.models import vlm
from mmjax.models.tower import Media
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Batch
from mmjax.sequence.document import Image, Video
from mmjax.sequence.layout import Piece, patches_of
from mmjax.train import parameters
from mmjax.train.config import Config
from mmjax.train.step import batch_shardings, by_rows, cast

MIB, DAY = 2**20, 86400.0


def after(cfg: Config) -> features.After | None:
    """What of the frozen model is kept: that after the connector, or after the tower; None where nothing shall be.

    Raises:
      InputError: the tower is not frozen, or several processes train.
    """
    if not cfg.features.on:
        return None
    trained = tree.flatten(tree.choose(parameters.spec(cfg), cfg.update.frozen)[1])
    moving = {name.partition("/")[0] for name in trained}
    if "vision" in moving:
        raise InputError(
            f"features.folder and features.memory keep what a frozen vision tower makes, but update.frozen is "
            f"{cfg.update.frozen}; add 'vision' to it, or keep no features."
        )
    if jax.process_count() > 1:
        raise InputError(f"features are kept for one process, and this run has {jax.process_count()}; keep none.")
    if cfg.model.asks:
        raise InputError("features are kept of pictures, and this connector reads a text beside each; keep none.")
    if not moving & {"connector", "deep"}:
        return "connector"
    if cfg.model.connector.prefix:
        raise InputError(
            f"features are kept of patches, and this connector reads class tokens too; add 'connector' to "
            f"update.frozen ({cfg.update.frozen}), or keep no features."
        )
    return "tower"


@dataclass(frozen=True)
class Lookup:
    """Finds the features of a picture while batches are made; data.source.Features."""

    store: Store
    tower: str
    how: features.How
    cfg: vlm.Config
    after: features.After
    shapes: Media  # of the features of any batch

    def look(self, content: bytes | np.ndarray, medium: Image | Video, piece: Piece) -> tuple[str, Arrays | None]:
        """A medium's key and, where they are kept, its features."""
        key = features.key(content, medium, piece, self.tower, self.how)
        alone = features.Place(0, range(len(piece.views)), range(sum(map(patches_of, piece.views))))
        return key, features.kept(self.store, key, alone, self.shapes, self.cfg, self.after)


@dataclass(frozen=True)
class Feed(Sequence):
    """The steps of a source with what is known of their pictures, for data.source.read."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, step: int) -> tuple[Batch, list[list[Named]]]:
        return self.source.named(step)


@dataclass
class Towers:
    """The frozen tower, compiled for every bucket, and what it has made.

    Where the pictures of a step are all known, it is not run.
    """

    cfg: Config
    after: features.After
    steps: list[jax.stages.Compiled]  # by bucket, of one part of its rows
    shapes: list[Media]  # of the features of each bucket's batches
    placed: list[Batch]  # shardings of what the tower reads
    store: Store = field(default_factory=Store)
    runs: int = 0

    def start(self, params: dict, source: Source) -> Feed:
        """The source's steps from now on, once the parameters are there."""
        c = self.cfg.features
        disk, memory = c.disk * MIB if c.folder else 0, c.memory * MIB
        self.store = Store(folder=c.folder, disk=disk, memory=memory, age=c.age * DAY)
        name = features.tower(self._cast(params), self.cfg.model, self.after)
        how = features.How(source.cfg, source.reduced, source.canvases, frames=source.stack)
        known = Lookup(self.store, name, how, self.cfg.model, self.after, self.shapes[0])
        return Feed(dataclasses.replace(source, features=known))

    def __call__(
        self, bucket: int, params: dict, batch: Batch, named: Sequence[Sequence[Named]]
    ) -> tuple[Batch, Media]:
        """The batch without its patches, and the features of all of its pictures (see step.by_rows)."""
        media = [medium for row in named for medium in row]
        where = [place for _, place in features.places(batch, [[(m.key, m.views) for m in row] for row in named])]
        shapes, model = self.shapes[bucket], self.cfg.model
        entries, missing = [], []
        for medium, place in zip(media, where, strict=True):
            # Batches are read ahead: what was not known then may have been made by a step since.
            found = medium.features or (self.store.get(medium.key) if medium.key else None)
            if found is not None:
                entries.append((place, found))
            elif medium.key:  # what could not be read stays zeros, and nothing is learnt from it
                missing.append((place, medium.key))
        made = self._run(bucket, params, batch) if missing else None
        first: dict[str, Arrays] = {}  # where one comes twice, both get what is kept
        for place, key in missing:
            if key not in first:
                first[key] = features.cut(made, place, model, self.after)
                self.store.put(key, first[key])
            entries.append((place, first[key]))
        whole = features.assemble(shapes, entries, model, self.after)
        return without_patches(batch), by_rows(whole)

    def _run(self, bucket: int, params: dict, batch: Batch) -> Media:
        self.runs += 1
        parts = self.cfg.update.accumulate
        seen, out = features.seen(batch), jax.tree.map(lambda s: np.empty(s.shape, s.dtype), self.shapes[bucket])
        for part in range(parts):
            some = jax.device_put(jax.tree.map(lambda x, a=part: x[a::parts], seen), self.placed[bucket])
            found = jax.device_get(self.steps[bucket](_tower(params, self.after), some))
            out.tokens[part::parts] = found.tokens
            if out.deep is not None:
                out.deep[:, part::parts] = found.deep
        return out

    def _cast(self, params: dict) -> dict:
        return cast(_tower(params, self.after), self.cfg.update.compute)


def compile_towers(cfg: Config, source: Source, params: dict, mesh: Mesh) -> Towers | None:
    """The towers of a run; None where nothing is kept. `params` are abstract."""
    kind = after(cfg)
    if kind is None:
        return None
    rules = Rules()

    def run(params: dict, batch: Batch) -> Media:
        return features.made(cast(params, cfg.update.compute), batch, cfg.model, kind)

    steps, shapes, placed = [], [], []
    for bucket in source.plan.buckets:
        whole = features.seen(batches.abstract(bucket, source.values, source.vocab, source.cfg))
        part = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] // cfg.update.accumulate, *x.shape[1:]), x.dtype), whole
        )
        placed.append(batch_shardings(part, mesh, rules))
        at = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), part, placed[-1])
        with jax.set_mesh(mesh), meshes.use_rules(rules):
            steps.append(jax.jit(run).lower(_tower(params, kind), at).compile())
            shapes.append(jax.eval_shape(run, _tower(params, kind), whole))
    return Towers(cfg, kind, steps, shapes, placed)


def without_patches(batch: Any) -> Any:
    """The batch, abstract or not, without the bytes that the tower would have read."""
    patches = batch.patches
    empty = (*patches.shape[:-1], 0)
    abstract = isinstance(patches, jax.ShapeDtypeStruct)
    return batch.replace(
        patches=jax.ShapeDtypeStruct(empty, patches.dtype) if abstract else np.zeros(empty, patches.dtype)
    )


def _tower(params: dict, after: features.After) -> dict:
    return {name: params[name] for name in features.weights(after) if name in params}
