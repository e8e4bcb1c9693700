"""Visual tokens that are kept: between the turns of a chat, and in training where the tower is frozen.

    store = Store(folder=Path("features"), disk=2**32, memory=2**28, age=7 * 86400)
    tower = features.tower(params, cfg)                              # once: it reads all of the tower's weights
    names = [features.named(document, layout, tower, how)]           # of each row's pictures
    media = features.media(params, batch, cfg, names, store)         # encodes those that are not kept
    hidden = vlm.hidden(params, batch, cfg, media=media)

An entry is what the tower makes of one picture or clip (all of its views), under a key of the bytes of the picture, of
everything that is done to them before the tower sees them, and of the tower: its config, the checksums and dtypes of
its weights, and what computes it. Each picture is encoded by itself in a shape that depends on its size alone, so that
what is kept is to the bit what would be made anew, whatever it comes together with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import PIL

from mmjax.core.checksum import checksums
from mmjax.core.errors import InputError
from mmjax.core.fingerprint import fingerprint
from mmjax.core.packed import Arrays
from mmjax.core.store import Store
from mmjax.encoders import vit
from mmjax.models import vlm
from mmjax.models.tower import Media
from mmjax.sequence import interleave
from mmjax.sequence.batch import Batch
from mmjax.sequence.document import Document, Encoded, Image, Video
from mmjax.sequence.layout import Layout, Piece
from mmjax.tokenizers import image as images

CODE = 1  # to be raised with every change after which the same config and weights make other features
After = Literal["connector", "tower"]  # what is kept: media tokens, or what the connector makes them of
Name = tuple[str, int]  # a picture's key, and how many views it has


@dataclass(frozen=True)
class How:
    """What is done to a medium before the tower sees it, besides its resolution policy.

    sequence: in which order patches lie, and which see each other: its `merge`, `window` and `frames`.
    reduced, canvases: as of data.source.Source.
    clips: the policy of videos, which chooses their pictures.
    frames: pictures in a patch.
    other: whatever else is done, as a fingerprint (convert.processor.Processor.preprocessing).
    """

    sequence: interleave.Config = interleave.PLAIN
    reduced: bool = False
    canvases: Any = None
    clips: Any = None
    frames: int = 1
    other: str = ""

    @property
    def name(self) -> str:
        s, host = self.sequence, (self.reduced, self.canvases, self.clips, self.frames, self.other)
        return fingerprint(s.merge, s.window, s.frames, host, PIL.__version__)


def tower(params: dict, cfg: vlm.Config, after: After = "connector") -> str:
    """A name for what makes features of patches: another one after any change of config, weights or dtype.

    It does not depend on how the weights are sharded. The version of JAX, the kind of device and the precision of
    products count as well, for they change the last bits.
    """
    parts = {name: params[name] for name in weights(after) if name in params}
    configs = [cfg.vision, cfg.deepstack] + ([cfg.connector, cfg.deep] if after == "connector" else [])
    one = jax.tree.leaves(parts)[0]
    device = next(iter(one.devices())) if isinstance(one, jax.Array) else jax.devices()[0]
    precision = str(jax.config.jax_default_matmul_precision)
    return fingerprint(CODE, after, configs, checksums(parts), jax.__version__, device.device_kind, precision)


def weights(after: After) -> tuple[str, ...]:
    """The parameters of a vlm that make what is kept."""
    return ("vision", "connector", "deep") if after == "connector" else ("vision",)


def key(content: bytes | np.ndarray, medium: Image | Video, piece: Piece, tower: str, how: How) -> str:
    """Under which the features of a medium are kept.

    Args:
      content: the picture's file, byte by byte, or its pixels.
      medium: what the content is.
      piece: of its layout: by which policy it becomes patches, and how many.
      tower: as `tower` says.
      how: what else is done to it.
    """
    size = (type(medium).__name__, medium.height, medium.width, getattr(medium, "fps", None))
    return fingerprint(tower, how.name, piece.policy, piece.views, size, content)


def content(medium: Image | Video, limits: images.Limits = images.LIMITS) -> bytes | np.ndarray:
    """What a medium's key is made of: the bytes of its file where it has one, else its pixels.

    Raises:
      InputError: a file that cannot be read, or is longer than `limits` allow.
    """
    source = medium.source.read() if isinstance(medium.source, Encoded) else medium.source
    if isinstance(source, bytes | np.ndarray):
        return source
    return source() if callable(source) else images.read_bytes(source, limits)


def named(
    document: Document, layout: Layout, tower: str, how: How, limits: images.Limits = images.LIMITS
) -> list[Name]:
    """The keys of a document's pictures and clips in reading order, each with how many views it has.

    Raises:
      InputError: as of `content`; the message names document and span.
    """
    names = []
    for piece in layout.pieces:
        if piece.views:
            medium = document.spans[piece.span]
            try:
                names.append((key(content(medium, limits), medium, piece, tower, how), len(piece.views)))
            except InputError as error:
                raise InputError(f"Document {document.id!r}, span {piece.span}: {error}") from error
    return names


def last(names: Sequence[Name], views: int) -> list[Name]:
    """Those of the last pictures that have so many views together: of a conversation of which more was read before."""
    at = len(names)
    while views > 0 and at:
        at -= 1
        views -= names[at][1]
    if views:
        raise InputError(f"The last pictures of {len(names)} do not have the views that a row holds; name all of them.")
    return list(names[at:])


@dataclass(frozen=True)
class Place:
    """Where a picture lies in a batch: its row, its views among the row's, and their patches."""

    row: int
    images: range
    patches: range

    def tokens(self, cfg: vlm.Config, after: After = "connector") -> slice:
        """Where its features are among those of the row."""
        many = cfg.connector.per_picture if after == "connector" else cfg.vision.per_picture
        if many:
            return slice(self.images.start * many, self.images.stop * many)
        square = cfg.connector.square**2 if after == "connector" else 1
        return slice(self.patches.start // square, self.patches.stop // square)


def places(batch: Batch, names: Sequence[Sequence[Name]]) -> Iterator[tuple[str, Place]]:
    """Every picture's key, and where it lies.

    Args:
      batch: on the host.
      names: of the pictures of every row, as they follow each other.

    Raises:
      InputError: a row holds other pictures than were named.
    """
    sizes = np.asarray(batch.grid).prod(-1)
    stops = np.cumsum(sizes, axis=1)
    for row, of in enumerate(names):
        count, views = int((sizes[row] > 0).sum()), sum(n for _, n in of)
        if count != views:
            raise InputError(f"Row {row} holds {count} views of pictures, but {views} were named; name all of them.")
        at = 0
        for name, n in of:
            start = int(stops[row, at - 1]) if at else 0
            yield name, Place(row, range(at, at + n), range(start, int(stops[row, at + n - 1])))
            at += n


def media(
    params: dict, batch: Batch, cfg: vlm.Config, names: Sequence[Sequence[Name]], store: Store, *, rows: int = 1
) -> Media | None:
    """The batch's media tokens [B, M, E] (and deep [T, B, M, E]), of which only those are made that are not kept.

    None where the batch has no room for pictures.

    Args:
      params, batch, cfg: the model's; the batch on the host.
      names: keys of the pictures of every row, as `named` makes them.
      store: where they are kept.
      rows: pictures of about one size that are encoded at once.

    Raises:
      InputError: a row holds other pictures than were named.
    """
    if not batch.patches.shape[1]:
        return None
    where = list(places(batch, names))
    shapes = _media.eval_shape(_parts(params), seen(batch), cfg)
    first = dict(reversed(where))
    found = {name: entry for name in first if (entry := kept(store, name, first[name], shapes, cfg)) is not None}
    missing = [name for name in first if name not in found]
    for name, entry in zip(missing, encode(params, batch, cfg, [first[n] for n in missing], rows), strict=True):
        store.put(name, entry)
        found[name] = entry
    whole = assemble(shapes, [(place, found[name]) for name, place in where], cfg)
    return jax.tree.map(jnp.asarray, whole)


def kept(
    store: Store, name: str, place: Place, shapes: Media, cfg: vlm.Config, after: After = "connector"
) -> Arrays | None:
    """A picture's features, if they are kept and are such as the model makes them."""
    entry, at = store.get(name), place.tokens(cfg, after)
    return entry if entry is not None and fits(entry, at.stop - at.start, shapes) else None


def fits(entry: Arrays, count: int, shapes: Media) -> bool:
    """Whether these are features of so many tokens, of the dtype and width that the model makes."""
    wanted = {"tokens": ((count, shapes.tokens.shape[-1]), shapes.tokens.dtype)}
    if shapes.deep is not None:
        wanted["deep"] = ((len(shapes.deep), count, shapes.deep.shape[-1]), shapes.deep.dtype)
    return {name: (x.shape, x.dtype) for name, x in entry.items()} == wanted


def encode(params: dict, batch: Batch, cfg: vlm.Config, where: Sequence[Place], rows: int = 1) -> list[Arrays]:
    """The features of some of a batch's pictures, each made as if it were alone.

    `rows` of them with the same static sizes go through the tower at once. There are at most four sizes for every
    doubling of the patches, so that few programs are compiled and at most a fifth is padding.
    """
    out: dict[int, Arrays] = {}
    sizes: dict[tuple[int, int], list[int]] = {}
    for n, place in enumerate(where):
        size = _rounded(len(place.patches), cfg.connector.square**2), _rounded(len(place.images), 1)
        sizes.setdefault(size, []).append(n)
    for size, numbers in sizes.items():
        for start in range(0, len(numbers), rows):
            some = numbers[start : start + rows]
            alone, inside = _alone(batch, [where[n] for n in some], size, rows)
            found = jax.device_get(_media(_parts(params), alone, cfg))
            out |= {n: cut(found, place, cfg) for n, place in zip(some, inside, strict=True)}
    return [out[n] for n in range(len(where))]


def cut(whole: Media, place: Place, cfg: vlm.Config, after: After = "connector") -> Arrays:
    """One picture's features out of those of a batch, on the host."""
    at = place.tokens(cfg, after)
    entry = {"tokens": whole.tokens[place.row, at]}
    return entry if whole.deep is None else entry | {"deep": whole.deep[:, place.row, at]}


def assemble(
    shapes: Media, entries: Sequence[tuple[Place, Arrays]], cfg: vlm.Config, after: After = "connector"
) -> Media:
    """The features of a batch of these shapes from those of its pictures, on the host; zeros where there is none."""
    out = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    for place, entry in entries:
        at = place.tokens(cfg, after)
        out.tokens[place.row, at] = entry["tokens"]
        if out.deep is not None:
            out.deep[:, place.row, at] = entry["deep"]
    return out


def made(params: dict, batch: Batch, cfg: vlm.Config, after: After = "connector") -> Media:
    """What is kept of a batch: its media tokens, or (as `tokens`) the encoder's features and (as `deep`) its taps."""
    if after == "connector":
        return vlm.media(params, batch, cfg)
    found = vlm.see(params, batch, cfg)
    return Media(found.patches, found.taps if cfg.deepstack else None)


def media_of(params: dict, batch: Batch, cfg: vlm.Config, known: Media, after: After) -> Media:
    """The media tokens of what `made` made."""
    if after == "connector":
        return known
    return vlm.media(params, batch, cfg, seen=vit.Features(known.tokens, None, None, known.deep, None))


def seen(batch: Batch) -> Batch:
    """The batch, abstract or not, without what encoder and connector do not read."""
    return Batch(**{name: getattr(batch, name) if name in _SEEN else None for name in Batch.__dataclass_fields__})


_media = jax.jit(vlm.media, static_argnums=2)


def _parts(params: dict) -> dict:
    return {name: params[name] for name in weights("connector") if name in params}


# The fields of a batch that encoder and connector read; of those that count from the start of the row, the first.
_LABELS = ("patch_order", "patch_lo", "patch_hi", "window_lo", "window_hi")
_SEEN = (*_LABELS, "patches", "patch_position", "patch_image", "patch_kind", "grid")
_EMPTY = dict.fromkeys(("patch_order", "patch_hi", "window_hi", "patch_image"), -1)  # else 0


def _rounded(n: int, unit: int) -> int:
    """The next of four sizes in every doubling, a multiple of `unit`."""
    step = unit * max(1, 2 ** ((n // unit).bit_length() - 3))
    return -(-n // step) * step


def _alone(batch: Batch, where: Sequence[Place], size: tuple[int, int], rows: int) -> tuple[Batch, list[Place]]:
    """A batch of pictures, one in each row, and where they lie in it; its last rows may be empty."""
    patches, views = size

    def rowed(name: str, whole: np.ndarray) -> np.ndarray:
        length = views if name == "grid" else patches
        out = np.full((rows, length, *whole.shape[2:]), _EMPTY.get(name, 0), whole.dtype)
        for row, place in enumerate(where):
            at = place.images if name == "grid" else place.patches
            first = at.start if name in _LABELS else place.images.start if name == "patch_image" else 0
            out[row, : len(at)] = whole[place.row, at.start : at.stop] - whole.dtype.type(first)
        return out

    alone = {name: x if x is None else rowed(name, np.asarray(x)) for name, x in vars(seen(batch)).items()}
    inside = [Place(row, range(len(p.images)), range(len(p.patches))) for row, p in enumerate(where)]
    return Batch(**alone), inside
