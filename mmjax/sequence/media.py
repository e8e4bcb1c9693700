"""The pixels of a document's pictures and videos, as its layout says: what goes into a row's patches."""

from collections.abc import Sequence

import numpy as np
import PIL.Image

from mmjax.core.errors import InputError
from mmjax.sequence.document import Document, Encoded, Image, Video
from mmjax.sequence.layout import AUDIO, Layout, Piece
from mmjax.tokenizers import image as images
from mmjax.tokenizers.patches import Pixels
from mmjax.tokenizers.view import View, render


def load(medium: Image | Video, limits: images.Limits = images.LIMITS) -> np.ndarray:
    """A picture's pixels u8[height, width, 3] (a video's u8[frames, …]), from whatever its source is."""
    if isinstance(medium, Video):
        return medium.source if isinstance(medium.source, np.ndarray) else medium.source()
    source = medium.source.read() if isinstance(medium.source, Encoded) else medium.source
    return source() if callable(source) else images.decode(source, limits)


def read(
    document: Document, layout: Layout, patch: int, frames: int = 1, limits: images.Limits = images.LIMITS
) -> list[Pixels]:
    """The document's pictures and videos in reading order, to be cut where they belong (tokenizers.patches.Pixels).

    Args:
      document: what the layout was made of.
      layout: its layout.
      patch: pixels a side.
      frames: in a patch; a picture has so many equal ones.
      limits: of what is decoded.

    Raises:
      InputError: a medium that cannot be read, or is not what was laid out; it names the document and the span.
    """
    out = []
    for piece in layout.pieces:
        if piece.grid is None or piece.modality == AUDIO:
            continue
        medium = document.spans[piece.span]
        try:
            pixels = load(medium, limits)
            if isinstance(medium, Video):
                out.append(film(pixels, medium, piece, patch, frames))
                continue
            refuse_shape(pixels.shape, (medium.height, medium.width))
            out.append(still(pixels, medium, piece, patch, frames))
        except InputError as error:
            raise InputError(f"Document {document.id!r}, span {piece.span}: {error}") from error
    return out


def still(pixels: PIL.Image.Image | np.ndarray, medium: Image, piece: Piece, patch: int, frames: int = 1) -> Pixels:
    """A picture, decoded, in the views of its piece; InputError where they are not as they were laid out."""
    rendered = render(pixels, views_of(piece, medium))
    refuse_sizes([view.shape[:2] for view in rendered], piece, patch)
    return Pixels([view for view in rendered for _ in range(frames)], patch, frames)


def film(pixels: np.ndarray, medium: Video, piece: Piece, patch: int, frames: int = 1) -> Pixels:
    """The same of a video u8[frames, height, width, 3]."""
    refuse_shape(pixels.shape, (medium.frames, medium.height, medium.width))
    group, wanted = len(piece.frames) // sum(view[0] for view in piece.views), views_of(piece, medium)
    if frames % group:
        raise InputError(f"{group} pictures make a frame of this video, but patches have {frames}; give it as many.")
    drawn = {n: render(pixels[n], wanted) for n in dict.fromkeys(piece.frames)}
    cut = [view for n in piece.frames for view in drawn[n] for _ in range(frames // group)]
    return Pixels(cut, patch, frames)


def views_of(piece: Piece, medium: Image | Video) -> tuple[View, ...]:
    """What is done to a medium's pixels; InputError for a policy that does not say it."""
    if not hasattr(piece.policy, "views"):
        raise InputError(f"{piece.policy} does not say what is done to pixels; give a policy that has `views`.")
    return piece.policy.views(medium.height, medium.width)


def refuse_sizes(made: Sequence[tuple[int, ...]], piece: Piece, patch: int) -> None:
    """Raises InputError where views are not of the size that they were laid out with."""
    sizes = [(view[1] * patch, view[2] * patch) for view in piece.views]
    if list(made) != sizes:
        raise InputError(
            f"{piece.policy} made views of {made} pixels, but with patches of {patch} they were laid out as {sizes}; "
            f"give the source the policy's own `patch`."
        )


def refuse_shape(found: tuple[int, ...], declared: tuple[int, ...]) -> None:
    """Raises InputError where they differ; `declared`: all sizes but the three channels."""
    if found != (*declared, 3):
        shown = found[:-1] if found[-1:] == (3,) else found
        raise InputError(
            f"declared as {'x'.join(map(str, declared))} but is {'x'.join(map(str, shown))} pixels; make the index "
            f"again."
        )
