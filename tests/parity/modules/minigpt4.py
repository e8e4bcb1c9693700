"""MiniGPT-4: BLIP-2's tower and Q-Former, one linear map, and Llama, each from its own, put together by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from parity import documents
from parity.documents import VOCAB, words
from parity.harness import Compare, double, gradient_model, saved, system, twin, weights_for
from parity.modules.blip import LLAMA, OPT, PATCH, SEQUENCE, model, picture, pixels

from mmjax.convert import huggingface
from mmjax.core import config, tree
from mmjax.models import vlm
from mmjax.sequence.batch import Batch

Row = list[documents.Part]


class Parts(torch.nn.Module):
    """What MiniGPT-4 is made of; BLIP-2's own map and language model are there, and not used."""

    def __init__(self):
        super().__init__()
        self.blip = model("Blip2", OPT)
        self.llama = twin(transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA), 1)
        torch.manual_seed(2)
        self.linear = torch.nn.Linear(self.blip.config.qformer_config.hidden_size, LLAMA["hidden_size"])

    def forward(self, rows: list[Row], views: list[np.ndarray]) -> torch.Tensor:
        seen = self.blip.vision_model(pixels(views, self)).last_hidden_state
        queries = self.blip.query_tokens.expand(len(views), -1, -1)
        read = self.blip.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        media = iter(self.linear(read))
        table = self.llama.get_input_embeddings()
        said = [
            torch.cat([next(media) if data is not None else table(torch.tensor(piece.ids)) for piece, data in row])
            for row in rows
        ]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(x)) for x in said], batch_first=True)
        embeds = torch.nn.utils.rnn.pad_sequence(said, batch_first=True)
        return self.llama(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).logits


@system("MiniGPT-4")
def minigpt4(c: Compare) -> None:
    """Rows of different lengths, one with two pictures, and the gradients of the map, which alone is trained."""
    (first, second, third), views = zip(*(picture(i) for i in range(3)), strict=True)
    rows = [[words(4, 0), first, words(6, 1)], [words(2, 2), second, words(1, 5), third, words(5, 3)]]
    given = documents.given(rows, PATCH**2 * 3, SEQUENCE)
    parts = Parts()
    blip, llama = huggingface.load(saved(parts.blip)), huggingface.load(saved(parts.llama))
    run = config.load("minigpt4")
    cfg = dataclasses.replace(
        run.model,
        vision=blip.cfg.vision,
        connector=dataclasses.replace(blip.cfg.connector, outputs=llama.cfg.blocks.width),
        decoder=llama.cfg,
        placeholder=VOCAB.image,
    )

    def linear(of: Parts) -> dict:
        made = {"kernel": of.linear.weight.T, "bias": of.linear.bias}
        return {"connector": {"projection": {name: x.detach().numpy() for name, x in made.items()}}}

    whole = {"vision": blip.params["vision"], "decoder": llama.params}
    whole["connector"] = blip.params["connector"] | linear(parts)["connector"]
    frozen, moved = tree.choose(whole, run.update.frozen)
    there = given.there
    weight = weights_for((*there.shape, VOCAB.size)) * there[..., None]

    def loss(moved: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        out = vlm.logits(tree.merge(frozen, moved), batch, cfg)[:, : there.shape[1]]
        return (out * jnp.asarray(weight, jnp.float32)).sum(), out

    placed = jax.tree.map(jnp.asarray, given.batch)
    with jax.default_matmul_precision("highest"):
        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(moved, placed)
    with torch.no_grad():
        single, exact = (m(rows, list(views)).numpy() for m in (parts, double(parts)))
    c.value("logits", np.asarray(out)[there], single[there], exact[there])
    slopes = gradient_model(parts, lambda m: (m(rows, list(views)) * torch.tensor(weight)).sum())
    c.gradients(gradient, linear(slopes))
