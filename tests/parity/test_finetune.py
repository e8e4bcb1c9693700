"""Fine-tuning a tiny LLaVA: our train step's losses are those of transformers with torch's AdamW, of all parameters and
of peft's adapters; and the way back."""

import dataclasses
import functools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax
import numpy as np
import optax
from parity import documents
from parity.documents import VOCAB, words
from parity.harness import saved, twin

from mmjax.convert import adapter, huggingface
from mmjax.core import tree
from mmjax.models import vlm
from mmjax.nn import lora
from mmjax.nn.patch_embed import OPENAI
from mmjax.sequence import interleave
from mmjax.sequence.layout import TEXT, Piece
from mmjax.train import state
from mmjax.train.config import Optimizer, Update
from mmjax.train.step import train_step

pytestmark = pytest.mark.slow

PATCH, SIDE, STEPS, BATCHES = 8, 24, 50, 5
VISION = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"intermediate_size": 48, "image_size": SIDE, "patch_size": PATCH}
WORDS = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS |= {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": VOCAB.size, "pad_token_id": VOCAB.pad}
# Warm-up, clipping and decay all take part.
OPTIMIZER = Optimizer(learning_rate=2e-3, warmup=0.1, clip=1.0, weight_decay=0.1)


def answer(n: int, seed: int) -> documents.Part:
    ids = np.random.default_rng([seed, 1]).integers(3, 50, n)
    return Piece(TEXT, n, tuple(int(i) for i in ids), train=True), None


def batch(seed: int) -> tuple[documents.Given, list[np.ndarray]]:
    """Two rows of different length, one with two pictures; and the pictures."""
    views = [documents.random_view(SIDE, SIDE, 10 * seed + i) for i in range(3)]
    first, second, third = (documents.picture([v], PATCH) for v in views)
    rows = [
        [words(3, seed), first, words(4, seed + 1), answer(4, seed)],
        [second, words(2, seed + 2), third, words(1, seed + 3), answer(3, seed + 1)],
    ]
    return documents.given(rows, PATCH**2 * 3, interleave.Config(position="sequential")), views


def inputs(given: documents.Given, views: list[np.ndarray]) -> dict[str, torch.Tensor]:
    labels = np.full_like(given.ids, -100)
    places = given.batch.weight[:, : labels.shape[1] - 1] > 0
    labels[:, 1:][places] = given.batch.target[:, : labels.shape[1] - 1][places]
    assert (labels >= 0).sum() == given.batch.weight.sum() == 7
    return {
        "input_ids": torch.tensor(given.ids),
        "attention_mask": torch.tensor(given.there.astype(np.int64)),
        "pixel_values": torch.tensor(documents.pixels(views, OPENAI), dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def torch_losses(model: torch.nn.Module, fed: list[dict[str, torch.Tensor]]) -> list[float]:
    """As fine-tuning scripts do it: AdamW that leaves scales and biases out of the decay, clipping, a schedule."""
    still = [p for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name]
    matrices = [p for name, p in model.named_parameters() if not (name.endswith("bias") or "norm" in name)]
    groups = [{"params": matrices}, {"params": still, "weight_decay": 0.0}]
    o = OPTIMIZER
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(o.b1, o.b2), eps=1e-8, weight_decay=o.weight_decay)
    warmup = round(o.warmup * STEPS)
    rate = optax.warmup_cosine_decay_schedule(0.0, o.learning_rate, warmup, STEPS, o.learning_rate * o.final)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        loss = model(**fed[step % BATCHES], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh() -> torch.nn.Module:
    cls = transformers.LlavaForConditionalGeneration
    return twin(cls, cls.config_class(vision_config=VISION, text_config=WORDS, image_token_index=VOCAB.image))


def our_losses(model, params, made, frozen=()) -> tuple[list[float], list[dict]]:
    """Those of all steps, and the parameters after each of the first two, and the last."""
    tx = state.optimizer(OPTIMIZER, STEPS)
    step = jax.jit(functools.partial(train_step, cfg=model.cfg, tx=tx, update=Update(frozen=frozen)))
    moments = tx.init(state.trained(params, frozen))
    now, losses, kept = state.TrainState(np.zeros((), np.int32), params, moments, state.new_guard()), [], []
    for n in range(STEPS):
        now, seen = step(now, made[n % BATCHES][0].batch)
        assert not seen["violations"].any()
        losses.append(float(seen["loss"] / seen["weight"]))
        kept += [now.params] if n in (0, 1, STEPS - 1) else []
    return losses, kept


def our_logits(model, params, given) -> np.ndarray:
    mine = jax.jit(vlm.logits, static_argnums=2)(params, given.batch, model.cfg)[:, : given.there.shape[1]]
    return np.asarray(mine)[given.there]


def torch_logits(model, given, views) -> np.ndarray:
    fed = {name: x for name, x in inputs(given, views).items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**fed, use_cache=False).logits.numpy()[given.there]


def test_losses_follow_torch_and_the_way_back(tmp_path):
    made, reference = [batch(100 * n) for n in range(BATCHES)], fresh()
    model = huggingface.load(saved(reference))
    ours, (_, after_two, _) = our_losses(model, model.params, made)  # the first step's rate is 0

    # HF → mmjax → fine-tuned → HF: transformers gives our logits.
    huggingface.save(tmp_path / "tuned", dataclasses.replace(model, params=after_two))
    tuned = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "tuned", attn_implementation="eager")
    theirs, before = (torch_logits(m, *made[0]) for m in (tuned, reference))
    mine = our_logits(model, after_two, made[0][0])
    np.testing.assert_allclose(mine, theirs, atol=1e-4 * np.abs(theirs).max())
    assert np.abs(theirs - before).max() > 1e-2  # it was trained

    theirs = torch_losses(reference, [inputs(*one) for one in made])
    assert theirs[-1] < 0.7 * theirs[0], "nothing was learnt"
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)


TARGETS = r".*language_model.*\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's, of transformers and of itself
def test_adapters_follow_peft_and_the_way_there_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    made, reference = [batch(100 * n) for n in range(BATCHES)], fresh()
    source = saved(reference)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(reference, config)
    theirs.save_pretrained(tmp_path / "start")

    # Ours begins with peft's A (B is zero), and goes the same way.
    model = adapter.load(tmp_path / "start", huggingface.load(source))
    nodes = lora.parted(model.params)[1]
    assert len(nodes) == 7
    assert all(float(node["scale"][0]) == 3.0 for node in nodes.values())
    names = {name for name in tree.flatten(model.params) if name.split("/")[-1] not in ("a", "b")}
    ours, (*_, after) = our_losses(model, model.params, made, tree.cover(model.params, names))
    losses = torch_losses(theirs, [inputs(*one) for one in made])
    assert losses[-1] < 0.8 * losses[0], "nothing was learnt"
    np.testing.assert_allclose(ours, losses, atol=1e-3, rtol=0)
    print("largest difference of losses:", np.abs(np.subtract(ours, losses)).max())

    # Ours in peft, and a connector that was trained as well.
    given, views = made[0]
    connector = tree.flatten({"connector": after["connector"]})
    after |= tree.unflatten({name: x + 0.05 for name, x in connector.items()})
    mine = our_logits(model, after, given)
    adapter.save(tmp_path / "ours", dataclasses.replace(model, params=after), base=str(source), changed=connector)
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(source, attn_implementation="eager")
    before = torch_logits(plain, given, views)
    loaded = torch_logits(peft.PeftModel.from_pretrained(plain, tmp_path / "ours"), given, views)
    np.testing.assert_allclose(loaded, mine, atol=1e-4 * np.abs(mine).max())
    assert np.abs(loaded - before).max() > 1e-2

    # Theirs in ours; and merged into a directory.
    theirs.save_pretrained(tmp_path / "theirs")
    back = adapter.load(tmp_path / "theirs", huggingface.load(source))
    mine = our_logits(back, back.params, given)
    np.testing.assert_allclose(mine, torch_logits(theirs, given, views), atol=1e-4 * np.abs(mine).max())
    huggingface.save(tmp_path / "merged", dataclasses.replace(back, params=lora.merged(back.params)))
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    np.testing.assert_allclose(torch_logits(merged, given, views), mine, atol=1e-4 * np.abs(mine).max())
