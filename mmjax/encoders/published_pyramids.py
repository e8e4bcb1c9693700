"""Published hierarchical encoders as configs: Swin, PVT and PVT v2, for pictures of 224 pixels and ImageNet's classes.

cfg = published_pyramids.swin_tiny()
cfg = dataclasses.replace(published_pyramids.pvt_v2("b2"), classes=None)   # no classifier
"""

from mmjax.core.errors import InputError
from mmjax.encoders import pyramid, swin
from mmjax.nn import patch_embed
from mmjax.nn.patch_embed import IMAGENET


def _swin(width: int, depth: int, heads: int, classes: int | None) -> swin.Config:
    embed = patch_embed.Config(4, width, 3, *IMAGENET)
    return swin.Config(embed, (2, 2, depth, 2), tuple(heads * 2**i for i in range(4)), classes=classes)


def swin_tiny(classes: int | None = 1000) -> swin.Config:
    """Swin-T (Liu et al. 2021, section 3.3): 28.3 million parameters."""
    return _swin(96, 6, 3, classes)


def swin_small(classes: int | None = 1000) -> swin.Config:
    """Swin-S: 49.6 million parameters."""
    return _swin(96, 18, 3, classes)


def swin_base(classes: int | None = 1000) -> swin.Config:
    """Swin-B: 87.8 million parameters."""
    return _swin(128, 18, 4, classes)


def swin_large(classes: int | None = 1000) -> swin.Config:
    """Swin-L: 196.5 million parameters."""
    return _swin(192, 18, 6, classes)


PVT_DEPTHS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}


def pvt(size: str, classes: int | None = 1000) -> pyramid.Config:
    """PVT (Wang et al. 2021, table 1): tiny 13.2, small 24.5, medium 44.2, large 61.4 million parameters.

    Raises:
      InputError: an unknown size.
    """
    return pyramid.Config(
        kind="v1",
        widths=(64, 128, 320, 512),
        depths=_one(PVT_DEPTHS, size, "PVT"),
        heads=(1, 2, 5, 8),
        ratios=(8.0, 8.0, 4.0, 4.0),
        patches=(4, 2, 2, 2),
        strides=(4, 2, 2, 2),
        classes=classes,
    )


# Widths of the first stage, depths, hidden ratios of the first two stages.
PVT_V2 = {
    "b0": (32, (2, 2, 2, 2), 8.0),
    "b1": (64, (2, 2, 2, 2), 8.0),
    "b2": (64, (3, 4, 6, 3), 8.0),
    "b2_linear": (64, (3, 4, 6, 3), 8.0),
    "b3": (64, (3, 4, 18, 3), 8.0),
    "b4": (64, (3, 8, 27, 3), 8.0),
    "b5": (64, (3, 6, 40, 3), 4.0),
}


def pvt_v2(size: str, classes: int | None = 1000) -> pyramid.Config:
    """PVT v2 (Wang et al. 2022, table 1).

    Million parameters: b0 3.7, b1 14.0, b2 25.4, b2_linear 22.6, b3 45.2, b4 62.6, b5 82.0 (the authors' code; the
    paper gives 3.4 and 13.1 for the first two).

    Raises:
      InputError: an unknown size.
    """
    width, depths, ratio = _one(PVT_V2, size, "PVT v2")
    return pyramid.Config(
        kind="v2_linear" if size.endswith("linear") else "v2",
        widths=(width, 2 * width, 5 * width, 8 * width),
        depths=depths,
        heads=(1, 2, 5, 8),
        ratios=(ratio, ratio, 4.0, 4.0),
        patches=(7, 3, 3, 3),
        strides=(4, 2, 2, 2),
        classes=classes,
    )


def _one(sizes: dict, name: str, family: str):
    if name not in sizes:
        raise InputError(f"{name!r} is no published {family}; there are {', '.join(sizes)}.")
    return sizes[name]
