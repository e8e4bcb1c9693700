"""How many frames of sound enter the model: a function of its length alone."""

from dataclasses import dataclass

from mmjax.core.errors import InputError


@dataclass(frozen=True)
class Frames:
    """Raw samples in frames of `hop` each, one after the other; the last is filled up with silence."""

    rate: int = 16_000  # samples a second
    hop: int = 320

    def __post_init__(self):
        if self.rate < 1 or self.hop < 1:
            raise InputError(f"{self} has no frames; give rate and hop of at least 1.")

    def frames(self, samples: int, rate: int) -> int:
        """How many frames; InputError if the clip is empty or sampled at another rate."""
        if rate != self.rate:
            raise InputError(f"sound of {rate} samples a second was given to a policy for {self.rate}; resample it.")
        if samples < 1:
            raise InputError("a clip of no samples has no sound; leave it out.")
        return -(-samples // self.hop)
