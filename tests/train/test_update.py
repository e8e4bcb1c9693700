"""What may be chosen about an update: parts of a batch, frozen parameters, updates that are left out."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_run

from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.meshes import Rules, make_mesh
from mmjax.models import vlm
from mmjax.train import loop, report, state, step
from mmjax.train.config import Update
from mmjax.train.step import SETTLED, cast, cut, train_step


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    cfg = tiny_run(tmp_path_factory.mktemp("unused"))
    tx = state.optimizer(cfg.optimizer, cfg.steps)
    batch = jax.tree.map(np.asarray, loop.prepare_data(cfg).training[0])
    return cfg, tx, batch


def stepped(setting, update, batch=None, now=None, times=1):
    cfg, tx, whole = setting
    now = state.create(vlm.spec(cfg.model), tx, jax.random.key(0), update.frozen) if now is None else now
    batch = cut(whole if batch is None else batch, update.accumulate)
    for _ in range(times):
        now, seen = compiled(cfg.model, tx, update)(now, batch)
    return now, seen


@functools.cache
def compiled(model, tx, update):
    return jax.jit(functools.partial(train_step, cfg=model, tx=tx, update=update))


@pytest.fixture(scope="module")
def plain(setting):
    return stepped(setting, Update(), times=2)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up_to_the_whole(setting, plain, parts):
    """Parts of other weights: the mean is over all trained tokens, not over the parts' means."""
    weights = cut(setting[2], parts).weight.sum((1, 2))
    assert len(set(weights.tolist())) > 1
    got, seen = stepped(setting, Update(accumulate=parts), times=2)
    for name in ("loss", "weight", "correct", "tokens", "grad_norm"):
        np.testing.assert_allclose(seen[name], plain[1][name], rtol=2e-5, err_msg=name)
    # After Adam's division, a gradient near its epsilon is all rounding: hence the absolute tolerance.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), got.params, plain[0].params)


def test_parts_take_the_rows_in_turn():
    x = np.arange(12).reshape(6, 2)
    assert cut(x, 3)[:, :, 0].tolist() == [[0, 6], [2, 8], [4, 10]]
    assert cut(x, 1) is x
    assert cut(jax.ShapeDtypeStruct((6, 2), jnp.int8), 3).shape == (3, 2, 2)


def test_frozen_parameters_have_no_state_and_do_not_move(setting, plain):
    frozen = ("vision", "decoder/blocks/*/scale")
    got, _ = stepped(setting, Update(frozen=frozen), times=2)
    before = state.create(vlm.spec(setting[0].model), setting[1], jax.random.key(0))
    fixed, moved = tree.choose(got.params, frozen)
    assert set(tree.flatten(fixed)) == {
        n
        for n in tree.flatten(before.params)
        if n.startswith("vision/") or (n.startswith("decoder/blocks/") and n.endswith("/scale"))
    }
    jax.tree.map(np.testing.assert_array_equal, fixed, tree.choose(before.params, frozen)[0])
    start = tree.choose(before.params, frozen)[1]
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(start), strict=True))
    held = [name for name in tree.flatten(got.optimizer) if "/vision/" in name]
    assert held == []
    assert tree.count(got.optimizer) < tree.count(plain[0].optimizer)
    averaged = state.averaged(got)
    assert set(tree.flatten(averaged)) == set(tree.flatten(got.params))
    assert averaged["vision"] is not got.optimizer  # the frozen part is the parameters' own
    np.testing.assert_array_equal(averaged["vision"]["embed"]["kernel"], got.params["vision"]["embed"]["kernel"])


def test_frozen_parameters_cost_no_backward_pass(setting):
    """The encoder is not differentiated at all: a step costs less than two thirds of the products."""
    cfg, tx, batch = setting

    def products(update):
        now = jax.eval_shape(lambda k: state.create(vlm.spec(cfg.model), tx, k, update.frozen), jax.random.key(0))
        jaxpr = jax.make_jaxpr(functools.partial(train_step, cfg=cfg.model, tx=tx, update=update))(now, batch)
        return str(jaxpr).count("dot_general")

    assert products(Update(frozen=("vision", "connector"))) < 0.67 * products(Update())


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("vison",), "'vison' names no parameter; did you mean 'vision'"),
        (("*",), "leaves no parameter to train"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(setting, frozen, message):
    cfg, tx, _ = setting
    mesh = make_mesh(dataclasses.replace(cfg.mesh), jax.devices()[:1])
    with pytest.raises(InputError, match=message):
        state.abstract(vlm.spec(cfg.model), tx, mesh, Rules(), frozen)


def poisoned(now, value):
    """One parameter that makes every loss what it is."""
    scale = now.params["decoder"]["norm"]["scale"]
    params = now.params | {"decoder": now.params["decoder"] | {"norm": {"scale": jnp.full_like(scale, value)}}}
    return dataclasses.replace(now, params=params)


def test_updates_that_are_not_finite_are_left_out(setting):
    cfg, tx, _ = setting
    now = poisoned(state.create(vlm.spec(cfg.model), tx, jax.random.key(0)), np.nan)
    after, seen = stepped(setting, Update(), now=now, times=3)
    assert (int(seen["skipped"]), int(seen["in_a_row"]), int(after.step)) == (1, 3, 3)
    assert (int(after.guard.skipped), int(after.guard.kept)) == (3, 0)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.optimizer), (now.params, now.optimizer))


def test_spikes_are_left_out_once_the_mean_is_settled(setting):
    cfg, tx, _ = setting
    now = state.create(vlm.spec(cfg.model), tx, jax.random.key(0))
    norm = float(stepped(setting, Update())[1]["grad_norm"])

    def skipped(kept, mean):
        guard = state.Guard(jnp.float32(mean), jnp.int32(kept), jnp.int32(0), jnp.int32(2))
        after, seen = stepped(setting, Update(spike=4.0), now=dataclasses.replace(now, guard=guard))
        assert int(seen["skipped"]) == int(after.guard.skipped)
        assert float(after.guard.norm) == np.float32(mean) or not seen["skipped"]
        return int(seen["skipped"]), int(seen["in_a_row"])

    assert skipped(SETTLED, norm / 3.9) == (0, 0)
    assert skipped(SETTLED, norm / 4.1) == (1, 3)
    assert skipped(SETTLED - 1, norm / 4.1) == (0, 0)


def test_the_mean_of_norms(setting):
    """Against the recurrence written straight down."""
    norms = np.random.default_rng(0).uniform(1, 9, 40)
    guard, mean = state.new_guard(), 0.0
    for n, norm in enumerate(norms):
        usable = n % 7 != 3
        guard = step._counted(jnp.float32(norm), jnp.asarray(usable), guard)
        if usable:
            k = int(guard.kept) - 1
            decay = min(0.99, (1 + k) / (10 + k))
            mean = decay * mean + (1 - decay) * norm
    np.testing.assert_allclose(guard.norm, mean, rtol=1e-5)


def test_only_the_scales_of_norms_stay_float32(setting):
    params = cast(state.create(vlm.spec(setting[0].model), setting[1], jax.random.key(0)).params, "bfloat16")
    wide = {name for name, p in tree.flatten(params).items() if p.dtype == jnp.float32}
    assert wide == {name for name in tree.flatten(params) if name.endswith("/scale")}


@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="jax 0.7 cannot run whole bfloat16 models on CPUs")
def test_bfloat16_products_learn_the_same(setting, plain):
    """To the three digits that bfloat16 has; what is kept is float32."""
    got, seen = stepped(setting, Update(compute="bfloat16"), times=2)
    np.testing.assert_allclose(seen["loss"], plain[1]["loss"], rtol=1e-2)
    np.testing.assert_allclose(seen["grad_norm"], plain[1]["grad_norm"], rtol=5e-2)
    floats = [x for x in jax.tree.leaves(got) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    assert float(seen["loss"]) != float(plain[1]["loss"])  # it is another computation


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"accumulate": 0}, "update.accumulate is 0"),
        ({"patience": 0}, "update.patience is 0"),
        ({"spike": 0.5}, "update.spike is 0.5; give a number above 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        Update(**wrong)


class TestRuns:
    """Whole runs whose batches turn bad."""

    @pytest.fixture(autouse=True)
    def bad_batches(self, monkeypatch):
        make = loop.make_mesh
        monkeypatch.setattr(loop, "make_mesh", lambda cfg: make(cfg, jax.devices()[:1]))
        real = step.loss_fn

        def poisonable(params, batch, *rest, **more):
            """The padding id in the last place says that the batch is bad, in the step's own program."""
            loss, sums = real(params, batch, *rest, **more)
            bad = jnp.where(batch.tokens[..., -1].max() == 7, jnp.nan, 1.0)
            return loss * bad, sums | {"loss": sums["loss"] * bad}

        monkeypatch.setattr(step, "loss_fn", poisonable)

        def poison(steps):
            place = loop.cluster.place
            count = iter(range(1, 10_000))

            def bad(fed, *rest):
                if next(count) in steps:
                    fed[0].tokens[..., -1] = 7
                return place(fed, *rest)

            monkeypatch.setattr(loop.cluster, "place", bad)

        return poison

    def test_one_bad_batch_is_left_out_and_told(self, tmp_path, bad_batches, caplog):
        bad_batches({3})
        cfg = tiny_run(tmp_path, update=Update(patience=2))
        assert loop.run(cfg) == 0
        result = json.loads((tmp_path / loop.RESULT).read_text())
        assert result["skipped"] == 1
        assert np.isnan([loss for _, loss in report.losses(tmp_path)]).tolist() == [False, False, True, *[False] * 3]
        (told,) = [json.loads(line) for line in (tmp_path / report.SKIPPED).read_text().splitlines()]
        plan = loop.prepare_data(cfg).training
        assert told["step"] == 3
        assert told["loss"] is None
        assert told["documents"] == [i for row in range(len(plan.plan.steps[2].rows)) for i in plan.ids(2, row)]
        assert "the update of step 3 was left out" in caplog.text

    def test_bad_batches_one_after_the_other_end_the_run(self, tmp_path, bad_batches):
        bad_batches(set(range(3, 50)))
        cfg = tiny_run(tmp_path, steps=50, save_every=2, update=Update(patience=7))
        with pytest.raises(InputError, match=r"steps 3 to 9 were left out .* parameters are those of step 2"):
            loop.run(cfg)
        checkpoints = loop.Checkpoints(tmp_path / "checkpoints")
        shape = state.abstract(
            vlm.spec(cfg.model), state.optimizer(cfg.optimizer, 50), loop.make_mesh(cfg.mesh), Rules()
        )
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoints.restore(shape).tree))
