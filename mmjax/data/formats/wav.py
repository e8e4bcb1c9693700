"""Sound inside JSON: base64 of a WAV file with 8-, 16- or 32-bit samples."""

import base64
import binascii
import io
import wave
from typing import Any

import numpy as np
from jaxtyping import Float

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown


def decode_base64(data: Any, kind: Any, most: int) -> tuple[Float[np.ndarray, "samples"], int]:
    """Samples in [-1, 1], channels averaged, and their number per second.

    Raises:
      InputError: it is not base64, not a WAV file, without a sample, or of more than `most` bytes.
    """
    if kind != "wav":
        raise InputError(f"sound of the kind {shown(kind)} is not read; convert it to wav")
    if not isinstance(data, str) or len(data) * 3 // 4 > most:
        raise InputError(f"the sound is {shown(data)}; give a WAV file of at most {most:,} bytes in base64")
    try:
        with wave.open(io.BytesIO(base64.b64decode(data, validate=True))) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (binascii.Error, ValueError, wave.Error, EOFError) as error:
        raise InputError(f"the sound is no sound WAV file ({error}); encode it again") from None
    raw = raw[: len(raw) // (width * channels) * width * channels]
    if width not in (1, 2, 4) or not raw or rate < 1:
        raise InputError(f"the sound has {8 * width} bits and {len(raw)} bytes; give 8, 16 or 32 bits and some samples")
    kind = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}[width]
    samples = np.frombuffer(raw, kind).reshape(-1, channels).astype(np.float64).mean(1)
    samples = samples / 128 - 1 if width == 1 else samples / 2.0 ** (8 * width - 1)
    return samples.astype(np.float32), rate
