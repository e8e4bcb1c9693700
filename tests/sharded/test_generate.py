"""The same tokens on eight devices: parameters, heads and rows split over all axes, in Auto and Explicit mode."""

import fused
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import VOCAB, document
from tiny import randomised, tiny_model

from mmjax.core import spec as specs
from mmjax.core.meshes import MeshConfig, Rules, make_mesh
from mmjax.generate import engine, sample
from mmjax.generate.sample import GREEDY, Sampling
from mmjax.models import vlm
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Bucket
from mmjax.sequence.document import Document, Image, Text

pytestmark = pytest.mark.slow
CFG = tiny_model(vocab=30, patch=2)
HOW = [GREEDY, Sampling(temperature=1.5, seed=3, top_k=9), Sampling(temperature=0.7, top_p=0.9), GREEDY]
ROWS = [[document("a", (2, 2))], [document("b", (1, 3), (2, 1), words=5)], [document("c", words=3)], [document("d")]]


def generated(params: dict, stacked: bool) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of two prefills and 12 steps, and the last logits."""
    batch = batches.build(ROWS, Bucket(4, 16, 8, 2), 12, VOCAB)
    switches, values = sample.prepare(HOW)
    state = engine.run_empty(CFG, rows=4, places=32, dtype=jnp.float32, stacked=stacked)
    state = engine.run_prefill(params, batch, cfg=CFG, state=state)
    for n in (5, 7):
        ends = np.array([29], np.int32)
        state = engine.run_decode(params, state, np.int32(n), ends, values, cfg=CFG, switches=switches)
    return np.asarray(state.tokens), np.asarray(state.logits)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(2, 2, 2),
        MeshConfig(1, 2, 2, 2),
        MeshConfig(2, 2, 2, explicit=True),
        MeshConfig(1, 2, 2, 2, explicit=True),
    ],
)
def test_tokens_are_those_of_one_device(mesh, stacked):
    params = randomised(vlm.spec(CFG))
    wanted = generated(params, True)
    made = make_mesh(mesh)
    placed = jax.device_put(params, specs.shardings(vlm.spec(CFG), made, Rules()))
    assert len(placed["decoder"]["blocks"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
    with jax.set_mesh(made):
        placed = placed if stacked else engine.unstacked(placed, CFG)
        found = generated(placed, stacked)
    assert (found[0] == wanted[0]).all()
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "apart"),
    [(MeshConfig(2, 2, 2), True), (MeshConfig(1, 2, 2, 2), False), (MeshConfig(2, 2, 2, explicit=True), False)],
)
def test_media_beside_the_sequence(mesh, apart):
    """Their keys and values are split over devices as those of the tokens are."""
    (model, cfg), how = fused.systems()["resampled, last image"], sample.prepare(HOW)
    picture = lambda h, w: Image(4 * h, 4 * w, b"")  # noqa: E731
    spans = (
        (picture(2, 2), Text("or"), picture(2, 3)),
        (Text("so"), picture(1, 3)),
        (Text("hello"),),
        (picture(1, 1),),
    )
    rows = [[Document(str(n), of)] for n, of in enumerate(spans)]

    def generated(params):
        batch = fused.make(rows, Bucket(4, 24, 12, 2), model, cfg)
        stacked = isinstance(params["decoder"]["blocks"], dict)
        state = engine.run_empty(model, rows=4, places=32, dtype=jnp.float32, stacked=stacked, media=8)
        state = engine.run_prefill(params, batch, cfg=model, state=state)
        ends = np.array([39], np.int32)
        state = engine.run_decode(params, state, np.int32(7), ends, how[1], cfg=model, switches=how[0])
        return np.asarray(state.tokens), np.asarray(state.logits)

    params = randomised(vlm.spec(model))
    wanted = generated(params)
    made = make_mesh(mesh)
    placed = jax.device_put(params, specs.shardings(vlm.spec(model), made, Rules()))
    with jax.set_mesh(made):
        found = generated(engine.unstacked(placed, model) if apart else placed)
    assert (found[0] == wanted[0]).all()
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4, atol=1e-4)
