"""Datasets of every common shape as documents: `open_dataset` (see formats.dataset)."""

from mmjax.data.formats.dataset import Dataset, open_dataset
from mmjax.data.formats.record import LIMITS, Bad, Limits

__all__ = ["LIMITS", "Bad", "Dataset", "Limits", "open_dataset"]
