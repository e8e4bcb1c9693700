"""Image files to arrays: what is not a sound picture is refused, never guessed at."""

import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from mmjax.core.errors import InputError
from mmjax.tokenizers.image_header import Header, Unfit, pixels_only, scan
from mmjax.tokenizers.view import Color

Source = str | os.PathLike | bytes | np.ndarray

# The classes and not Image.open, which warns of large pictures in its own way and opens some JPEG as other formats.
READERS = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}
MOST = 4  # times the bytes of the largest picture allowed as an array: what decoding may take
ARRAY_BYTES = 8  # per pixel that a picture given as an array takes at most
START = 4096  # bytes of a file by which another one of its size is told apart; its header needs them anyway
STRIP = 2**16  # pixels that are flattened or handed over at a time, so that no second picture is ever in memory
# How to set a picture of each EXIF orientation upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(InputError):
    """A picture that cannot be used: one sentence with its name, the reason, and what to do."""


@dataclass(frozen=True)
class Limits:
    """What is decoded at most: bytes of the file, pixels, and the ratio of the longer side to the shorter.

    The defaults admit a 50-megapixel photograph, which takes 150 MB as an array. Decoding takes no more than four times
    that: kinds of files that would, as WebP of over 34 megapixels, are refused.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000
    max_aspect: float = 200.0

    def __post_init__(self):
        if self.max_bytes < 1 or self.max_pixels < 1 or not self.max_aspect >= 1:
            raise InputError(f"{self} admits no picture; give limits of at least 1")


LIMITS = Limits()


@dataclass(frozen=True)
class Found:
    """A picture whose header is within the limits and whose pixels are not decoded yet.

    size: height and width in pixels, upright.
    memory: bytes that decoding it takes at most, the file and the pixels included.
    mark: CRC-32 of the file's first START bytes, begun with its length; 0 for an array.
    """

    source: Source
    size: tuple[int, int]
    memory: int
    limits: Limits
    header: Header | None
    mark: int = 0

    def load(self, background: Color = (255, 255, 255), *, least: tuple[int, int] | None = None) -> Image.Image:
        """The picture in RGB, upright, on `background` where it is transparent; errors as for `decode`.

        least: height and width that are enough: of a JPEG, only the lowest frequencies that leave no less than that are
          decoded (libjpeg's 1/2, 1/4 or 1/8 scale), so the picture may come back smaller. None: all of it. Resized,
          photographs are then 1.6 grey levels from the whole in the mean at CLIP's size (36 dB), 0.8 at Qwen2-VL's (43
          dB), measured by tests.benchmarks.images; single pixels at sharp edges may differ by a hundred.
        """
        with _errors(self.source):
            if isinstance(self.source, np.ndarray):
                return _flatten(Image.fromarray(np.ascontiguousarray(self.source)), background)
            with _opened(self.source, self.limits) as file:
                data = file.read(self.limits.max_bytes)
            turned = self.header.orientation > 4
            least = least[::-1] if least and turned else least
            picture = _flatten(_load(self.header, pixels_only(data, self.header), least), background)
            if self.header.orientation in TURNS:
                picture = picture.transpose(TURNS[self.header.orientation])
            return picture

    def decode(
        self, out: UInt8[np.ndarray, "_ _ 3"], background: Color = (255, 255, 255)
    ) -> UInt8[np.ndarray, "_ _ 3"]:
        """The same, written into the upper left corner of `out`, which is returned. InputError if it is too small."""
        height, width = self.size
        if out.shape[0] < height or out.shape[1] < width:
            raise InputError(f"a picture of {height}x{width} does not fit an array of {out.shape}; give a larger one")
        for top, part in _strips(self.load(background)):
            out[top : top + part.height, :width] = np.asarray(part)
        return out


def find(source: Source, limits: Limits = LIMITS) -> Found:
    """Reads a picture's header and checks it against the limits; errors as for `decode`, as far as a header shows."""
    with _errors(source):
        if isinstance(source, np.ndarray):
            size = _check_size(_check_array(source).shape[0], source.shape[1], limits)
            return Found(source, size, ARRAY_BYTES * size[0] * size[1], limits, None)
        with _opened(source, limits) as file:
            start = file.read(START)
            file.seek(0)
            header = scan(file)
            size = _check_size(*header.size, limits)
            length = file.seek(0, io.SEEK_END)
        memory = int(header.weight * size[0] * size[1]) + 2 * length
        if memory > MOST * 3 * limits.max_pixels + 2 * 2**20:
            raise Unfit(
                f"is {size[0]}x{size[1]} pixels of a kind of {header.kind} that takes {memory / 2**20:,.0f} MiB to "
                f"decode, over {MOST} times what the limit of {limits.max_pixels:,} pixels is as an array; save it as "
                f"a plain JPEG or PNG, shrink it, or raise Limits.max_pixels"
            )
        return Found(source, size, memory, limits, header, zlib.crc32(start, length))


def read_size(source: Source, limits: Limits = LIMITS) -> tuple[int, int]:
    """Height and width that `decode` would give, after EXIF orientation, from the header alone: no pixel is decoded.

    `source` is a path, the bytes of a file, or a uint8 array. ImageError as for `decode`, as far as a header shows it.
    """
    return find(source, limits).size


def read_bytes(path: str | os.PathLike, limits: Limits = LIMITS) -> bytes:
    """An image file's bytes, whatever they are. ImageError if it cannot be read, is no file, or is too long."""
    with _errors(path), _opened(path, limits) as file:
        return file.read(limits.max_bytes)


def decode(
    source: Source, limits: Limits = LIMITS, *, background: Color = (255, 255, 255)
) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an image as RGB bytes, upright, on `background` where it is transparent.

    `source` is a path or the bytes of a JPEG, PNG, WebP or GIF file (told by content; of an animation the first frame),
    or a uint8 array [height, width], [height, width, 3] or [height, width, 4]. 16-bit grey is scaled, colour profiles
    are ignored. All limits are checked before any pixel is decoded. ImageError, and no other error or warning, for
    whatever is not a whole picture within the limits; InputError for a background that is not a colour.
    """
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise InputError(f"background {background} is not a colour; give three numbers from 0 to 255")
    found = find(source, limits)
    return found.decode(np.empty((*found.size, 3), np.uint8), background)


def resize(image: UInt8[np.ndarray, "_ _ 3"], height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """The image at another size in pixels, by Pillow's bicubic filter (which averages when it shrinks)."""
    if height < 1 or width < 1:
        raise InputError(f"cannot resize an image to {height}x{width}; both sides must be at least 1 pixel")
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


@contextmanager
def _errors(source: Source) -> Iterator[None]:
    """Whatever goes wrong inside becomes an ImageError with the name of the source."""
    try:
        yield
    # Any exception: the decoders raise a dozen kinds on damaged input, from IndexError to SyntaxError.
    except Exception as error:
        if isinstance(source, np.ndarray):
            name = f"image array of shape {source.shape}"
        else:
            name = f"image of {len(source):,} bytes" if isinstance(source, bytes) else f"image {str(source)!r}"
        if isinstance(error, Unfit):
            reason = str(error)
        elif isinstance(error, OSError) and error.errno:
            reason = f"cannot be read ({error.strerror}); check the path"
        else:
            told = " ".join(str(error).split()) or type(error).__name__
            reason = f"cannot be decoded ({told}); fetch the file again or leave it out"
        raise ImageError(f"{name} {reason}") from error


@contextmanager
def _opened(source: str | os.PathLike | bytes, limits: Limits) -> Iterator[io.BufferedIOBase]:
    """The file, if it is one and not too long."""
    with io.BytesIO(source) if isinstance(source, bytes) else _open_file(os.fspath(source)) as file:
        length = file.seek(0, io.SEEK_END)
        if length > limits.max_bytes:
            raise Unfit(
                f"is {length:,} bytes long, over the limit of {limits.max_bytes:,}; shrink it or raise Limits.max_bytes"
            )
        file.seek(0)
        yield file


def _open_file(path: str) -> io.BufferedIOBase:
    # Before opening: a pipe or a device would block or never end.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Unfit("is not a file; give the path of an image file")
    return open(path, "rb")


def _check_size(height: int, width: int, limits: Limits) -> tuple[int, int]:
    size = f"is {height}x{width} pixels"
    if not height or not width:
        raise Unfit(f"{size}, so there is nothing to see; leave it out")
    if height * width > limits.max_pixels:
        raise Unfit(f"{size}, over the limit of {limits.max_pixels:,}; shrink it or raise Limits.max_pixels")
    if max(height, width) > limits.max_aspect * min(height, width):
        raise Unfit(f"{size}, one side over {limits.max_aspect:g} times the other; crop it or raise Limits.max_aspect")
    return height, width


def _check_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise Unfit(
            f"of type {array.dtype} is not an image; give uint8 of shape [height, width], [height, width, 3] or "
            "[height, width, 4]"
        )
    return array


def _load(header: Header, data: bytes, least: tuple[int, int] | None = None) -> Image.Image:
    """Decode, as stored: neither turned nor flattened; no smaller than `least`, as stored."""
    picture = READERS[header.kind](io.BytesIO(data))
    if picture.size != (header.width, header.height):
        raise Unfit(f"tells two sizes, {header.height}x{header.width} and another; fetch the file again")
    if least and header.kind == "JPEG":
        picture.draft(None, (max(least[1], 1), max(least[0], 1)))
    # Pillow scales samples to 8 bits, but not the one that is transparent; levels of 16-bit grey stay as they are.
    if header.clear and picture.mode != "I;16":
        scaled = [value >> 8 if header.depth == 16 else value * 255 // (2**header.depth - 1) for value in header.clear]
        picture.info["transparency"] = tuple(scaled) if len(scaled) > 1 else scaled[0]
    picture.load()
    return picture


def _flatten(picture: Image.Image, background: Color) -> Image.Image:
    """As RGB, transparent parts over the background."""
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    if picture.mode != "I;16" and not picture.has_transparency_data:
        return picture.convert("RGB")
    out = Image.new("RGB", picture.size)
    for top, part in _strips(picture):
        if part.mode == "I;16":
            part = _bytes(part)
        if part.has_transparency_data:
            part = part.convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", part.size, (*background, 255)), part)
        out.paste(part.convert("RGB"), (0, top))
    return out


def _strips(picture: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture from top to bottom, a few rows at a time, with the first of them."""
    rows = max(1, STRIP // picture.width)
    for top in range(0, picture.height, rows):
        yield top, picture.crop((0, top, picture.width, min(top + rows, picture.height)))


def _bytes(picture: Image.Image) -> Image.Image:
    """16-bit grey in 8 bits. Pillow's own conversion would clip: all but the darkest 256 levels would be white."""
    levels = np.asarray(picture)
    clear = picture.info.get("transparency")
    picture = Image.fromarray(((levels.astype(np.uint32) * 255 + 32895) >> 16).astype(np.uint8))
    if clear is not None:
        picture.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return picture
