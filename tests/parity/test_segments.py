"""The vector of each modality against VisualBERT's token types (transformers 5.23)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised, tiny_model

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
pytest.importorskip("transformers", reason="needs the `parity` extra")

from transformers.models.visual_bert.configuration_visual_bert import VisualBertConfig
from transformers.models.visual_bert.modeling_visual_bert import VisualBertEmbeddings

from mmjax.models import decoder, vlm
from mmjax.models.tower import Media
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Bucket
from mmjax.sequence.layout import IMAGE, TEXT
from mmjax.tokenizers.vocab import Vocab


def test_sums_equal_visual_berts(monkeypatch):
    cfg = dataclasses.replace(tiny_model(vocab=99), segments=True)
    params = randomised(vlm.spec(cfg))
    width = cfg.decoder.blocks.width
    theirs = VisualBertEmbeddings(
        VisualBertConfig(vocab_size=99, hidden_size=width, visual_embedding_dim=width, type_vocab_size=2)
    ).eval()
    words, media = 5, 7
    ids = np.array([[11, 12, 13, 14, 15]])
    boxes = np.random.default_rng(0).standard_normal((1, media, width)).astype(np.float32)
    table = torch.tensor(np.asarray(params["segments"])[[TEXT, IMAGE]])
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
        theirs.word_embeddings.weight.copy_(torch.tensor(np.asarray(params["decoder"]["embed"])))
        theirs.token_type_embeddings.weight.copy_(table)
        theirs.visual_token_type_embeddings.weight.copy_(table)
        theirs.visual_projection.weight.copy_(torch.eye(width))
        theirs.LayerNorm = torch.nn.Identity()
        wants = theirs(
            torch.tensor(ids),
            token_type_ids=torch.zeros(1, words, dtype=torch.long),
            visual_embeds=torch.tensor(boxes),
            visual_token_type_ids=torch.ones(1, media, dtype=torch.long),
        ).numpy()

    batch = batches.empty(Bucket(1, words + media, 8, 1), 48, Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=99))
    batch.tokens[0, :words], batch.tokens[0, words:] = ids, 6
    batch.modality[0, :words], batch.modality[0, words:] = TEXT, IMAGE
    batch.slot[0, words:] = np.arange(media)
    seen = []
    monkeypatch.setattr(decoder, "apply", lambda params, x, cfg, **see: seen.append(x) or x)
    vlm.hidden(params, jax.tree.map(jnp.asarray, batch), cfg, media=Media(jnp.asarray(boxes)))
    np.testing.assert_allclose(seen[0], wants, atol=1e-6)
