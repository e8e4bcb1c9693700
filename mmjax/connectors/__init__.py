"""Connectors: how many media tokens survive, and in which space."""


class Connector:
    """The base of every connector's Config, so that a model's config may hold any of them."""

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """How many media tokens a picture of (frames, rows, columns) patches becomes; for `sequence.layout`."""
        raise TypeError(f"{type(self).__name__} does not say how many media tokens it makes.")
