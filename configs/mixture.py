"""Three real datasets, mixed: the built-in drawings, clip art and its titles, stamps and captions in 12 languages.

    pip install ".[data]" && python -m tests.sources.fetch --out sources
    python -m mmjax.train configs/mixture.py

The first line fetches two Debian packages (about 300 MB), and trains a tokenizer on what the three say. The run leaves
in runs/mixture the loss on 64 documents of each that were never trained on. Made for two CPU cores, as the quick start.
"""

import dataclasses
from pathlib import Path

from mmjax.core import config as configs
from mmjax.data import sets
from mmjax.tokenizers.resolution import Native
from mmjax.train.config import Config, Optimizer, Packing

VOCAB = 4096
FOLDER = Path("sources")


def config() -> Config:
    start = configs.load("quickstart")
    decoder = dataclasses.replace(start.model.decoder, vocab=VOCAB)
    return dataclasses.replace(
        start,
        model=dataclasses.replace(start.model, decoder=decoder),
        data=sets.Mixed(
            (
                sets.Drawings(start.data, weight=0.2),
                sets.Files(FOLDER / "clipart.jsonl", weight=0.3),
                sets.Files(FOLDER / "tuxpaint.jsonl", weight=0.5),
            ),
            FOLDER / "text.model",
        ),
        out=Path("runs/mixture"),
        steps=500,
        resolution=Native(patch=start.resolution.patch, min_pixels=32 * 32, max_pixels=48 * 48),
        packing=Packing(rows=12, tokens=160, buckets=2),
        optimizer=Optimizer(learning_rate=2e-3, average=0.99),
        threads=2,
    )
