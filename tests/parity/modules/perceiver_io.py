"""Perceiver IO: transformers' masked language model and picture classifier, perceiver-pytorch, Fourier features."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity.harness import Compare, double, gradient_model, randomise, run, saved, state, system, twin, weights_for
from torch import nn
from transformers import PerceiverConfig, PerceiverForImageClassificationFourier, PerceiverForMaskedLM
from transformers.models.perceiver import modeling_perceiver as theirs

from mmjax.connectors import perceiver_io, perceiver_layer
from mmjax.convert import huggingface, rules
from mmjax.convert.families.blocks import dense, norm
from mmjax.nn import position_embed
from mmjax.sequence import behind


def pack(examples: list[np.ndarray], grids: list[tuple[int, int, int]], room: int, number: int) -> dict[str, jax.Array]:
    """One row of them, [tokens, …] each, always of one shape: noise in empty places, examples that are not there."""
    count = [len(x) for x in examples]
    spare = room - sum(count)
    noise = np.random.default_rng(4).integers(1, 9, (spare, *examples[0].shape[1:])).astype(examples[0].dtype)
    image = [*np.repeat(np.arange(len(examples)), count), *[-1] * spare]
    return {
        "x": jnp.asarray(np.concatenate([*examples, noise])[None]),
        "image": jnp.asarray([image], jnp.int32),
        "order": jnp.asarray([[*range(sum(count)), *[-1] * spare]], jnp.int32),
        "grid": jnp.asarray([[*grids, *[(0, 0, 0)] * (number - len(grids))]], jnp.int32),
    }


def intermediates(params: dict, batch: dict, cfg: perceiver_io.Config) -> dict[str, jax.Array]:
    """What `apply` passes on the way, by the same functions."""
    queries = batch.get("queries")
    places = {name: batch[name] for name in ("image", "order", "grid")}
    prepared = perceiver_io.prepare(params, batch["x"], cfg, **places)
    keys, lo, hi = behind.labels(*places.values(), cfg.latents)
    of_inputs, own = keys[:, : prepared.shape[1]], keys[:, prepared.shape[1] :]
    z = behind.start(params["latents"], prepared, batch["grid"].shape[1])
    z = perceiver_layer.apply(params["encoder"], z, cfg.encoder, order=of_inputs, lo=lo, hi=hi, inputs=prepared)
    out = {"prepared": prepared, "encoder": z}
    for i in range(cfg.blocks * cfg.layers):
        layer = jax.tree.map(lambda a, i=i: a[i % cfg.layers], params["layers"])
        z = perceiver_layer.apply(layer, z, cfg.layer, order=own, lo=lo, hi=hi)
        out[f"layer {i}"] = z
    plain = replace(cfg, outputs=0, tied=False)
    out["decoder"] = perceiver_io.apply(params, batch["x"], plain, **places, queries=queries)
    out["out"] = perceiver_io.apply(params, batch["x"], cfg, **places, queries=queries)
    return out


@dataclass(frozen=True)
class Case:
    """load: our parameters from a model. call: (model, which example) → its tensors by name, with "out". rows: (name,
    example) → where ours is packed. queries: of all examples, and the example of each."""

    model: nn.Module
    cfg: perceiver_io.Config
    load: Callable[[nn.Module], dict]
    call: Callable[[nn.Module, int], dict[str, torch.Tensor]]
    examples: list[np.ndarray]
    grids: list[tuple[int, int, int]]
    rows: Callable[[str, int], Any]
    queries: tuple[np.ndarray, np.ndarray] | None = None

    def pack(self, some: list[int]) -> dict[str, Any]:
        room, number = sum(map(len, self.examples)) + 4, len(self.examples) + 1
        out = pack([self.examples[i] for i in some], [self.grids[i] for i in some], room, number)
        return out if self.queries is None else out | {"queries": tuple(jnp.asarray(q[None]) for q in self.queries)}


def compare_values(compare: Compare, case: Case) -> None:
    """Every tensor of every example, packed with the others, and alone (but for queries of all)."""
    params, wide, every = case.load(case.model), double(case.model), range(len(case.examples))
    ours = jax.jit(lambda params, batch: intermediates(params, batch, case.cfg))
    together = ours(params, case.pack([*every]))
    for i in every:
        with torch.no_grad():
            single, exact = case.call(case.model, i), case.call(wide, i)
        alone = ours(params, case.pack([i])) if case.queries is None else None
        for name, there in exact.items():
            at = case.rows(name, i)
            compare.value(f"{name} of {i}, packed", together[name][0, at], single[name], there)
            if alone is not None:
                compare.value(f"{name} of {i}, alone", alone[name][0, : at.stop - at.start], single[name], there)


def compare_gradients(compare: Compare, case: Case) -> None:
    """Of a weighted sum of all answers."""
    with torch.no_grad():
        shapes = [case.call(case.model, i)["out"].shape for i in range(len(case.examples))]
    weights = [weights_for(shape, i) for i, shape in enumerate(shapes)]
    batch = case.pack([*range(len(shapes))])

    def loss(m: nn.Module) -> torch.Tensor:
        return sum((case.call(m, i)["out"] * torch.from_numpy(w)).sum() for i, w in enumerate(weights))

    def ours(params: dict) -> jax.Array:
        places = {name: batch.get(name) for name in ("image", "order", "grid", "queries")}
        out = perceiver_io.apply(params, batch["x"], case.cfg, **places)[0]
        return sum((out[case.rows("out", i)] * jnp.asarray(w, jnp.float32)).sum() for i, w in enumerate(weights))

    theirs = case.load(gradient_model(case.model, loss))
    compare.gradients(jax.jit(jax.grad(ours))(case.load(case.model)), theirs)


def of_transformers(model: nn.Module, decoder: str, inputs: torch.Tensor, keep: slice) -> dict[str, torch.Tensor]:
    """The intermediates of one of its models, of one example."""
    caught: dict[str, Any] = {}
    body = model.perceiver
    watched = {"prepared": body.input_preprocessor, "encoder": body.encoder.cross_attention}
    watched |= {"decoder": body.decoder.get_submodule(decoder)}

    def keeping(name: str) -> Callable:
        return lambda _m, _i, out: caught.__setitem__(name, out[0][0])

    hooks = [module.register_forward_hook(keeping(name)) for name, module in watched.items()]
    try:
        out = model(inputs, output_hidden_states=True)
    finally:
        for h in hooks:
            h.remove()
    # It lists the state before each layer, and once more the one after each block.
    config, states = model.config, list(out.hidden_states)
    layers = config.num_self_attends_per_block
    for block in range(config.num_blocks):
        for i in range(layers):
            caught[f"layer {block * layers + i}"] = states[block * (layers + 1) + i + 1][0]
    caught["decoder"] = caught["decoder"][keep]
    caught["out"] = out.logits[0, keep] if out.logits.ndim == 3 else out.logits
    return caught


SIZES = {"num_latents": 6, "d_latents": 32, "d_model": 24, "num_blocks": 2, "num_self_attends_per_block": 2}
VARIANTS = {
    "published": {"num_self_attention_heads": 4, "num_cross_attention_heads": 2, "qk_channels": 16, "v_channels": 32},
    "kv": {"num_self_attention_heads": 2, "num_cross_attention_heads": 4, "cross_attention_widening_factor": 2},
    "q": {
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
        "cross_attention_shape_for_attention": "q",
        "use_query_residual": False,
        "self_attention_widening_factor": 3,
        "hidden_act": "relu",
    },
}


def slices(cfg: perceiver_io.Config, count: list[int], answers: list[int]) -> Callable[[str, int], slice]:
    """Where the tensors of an example are in a packed row."""

    def rows(name: str, i: int) -> slice:
        many = {"prepared": count, "decoder": answers, "out": answers}.get(name, [cfg.latents] * len(count))
        return slice(sum(many[:i]), sum(many[: i + 1]))

    return rows


@system("Perceiver IO: masked language model")
def masked(compare: Compare) -> None:
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, 30, n).astype(np.int32) for n in (7, 12, 3)]
    for name, variant in VARIANTS.items():
        model = twin(
            PerceiverForMaskedLM, PerceiverConfig(**SIZES, **variant, vocab_size=30, max_position_embeddings=12)
        )
        loaded = huggingface.load(saved(model))
        grids, count = [(1, 1, len(t)) for t in texts], [len(t) for t in texts]

        def call(m: nn.Module, i: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(texts[i]).long()[None]
            return of_transformers(m, "decoding_cross_attention", ids, slice(len(texts[i])))

        def load(m: nn.Module) -> dict:
            return huggingface.load(saved(m)).params

        case = Case(model, loaded.cfg, load, call, texts, grids, slices(loaded.cfg, count, count))
        compare_values(compare, case)
        if name != "kv":
            compare_gradients(compare, case)


@system("Perceiver IO: masked language model, queries anywhere")
def anywhere(compare: Compare) -> None:
    """Its answers at all places of the table, also where there is no input: by queries that the caller gives."""
    config = PerceiverConfig(**SIZES, **VARIANTS["published"], vocab_size=30, max_position_embeddings=12)
    model = twin(PerceiverForMaskedLM, config)
    loaded, ids = huggingface.load(saved(model)), np.random.default_rng(6).integers(0, 30, 5).astype(np.int32)
    batch = pack([ids], [(1, 1, 5)], 6, 1)
    places = {name: batch[name] for name in ("image", "order", "grid")}

    @jax.jit
    def ours(params: dict) -> jax.Array:
        z = perceiver_io.encode(params, batch["x"], loaded.cfg, **places)
        asks = {"image": jnp.zeros((1, 12), jnp.int32), "grid": batch["grid"]}
        return perceiver_io.decode(params, z, params["queries"][None], loaded.cfg, **asks)

    single, exact = (
        run(m, {}, lambda m: m(torch.from_numpy(ids).long()[None]).logits)["out"] for m in (model, double(model))
    )
    compare.value("logits", ours(loaded.params), single, exact)


def exactly(encoding: nn.Module) -> nn.Module:
    """Makes its features exact where the model is float64: it computes them in float32 in any case."""
    usual = encoding.forward

    def forward(index_dims: Any, batch_size: int, device: Any, dtype: torch.dtype, pos: Any = None) -> torch.Tensor:
        if dtype != torch.float64:
            return usual(index_dims, batch_size, device, dtype, pos)
        torch.set_default_dtype(torch.float64)
        try:
            axes = [torch.linspace(-1, 1, n) for n in index_dims]
            grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, len(axes))
            options = (encoding.num_bands, encoding.max_resolution, encoding.concat_pos, encoding.sine_only)
            return theirs.generate_fourier_features(grid.expand(batch_size, -1, -1), *options)
        finally:
            torch.set_default_dtype(torch.float32)

    encoding.forward = forward
    return encoding


@system("Perceiver IO: Fourier picture classifier")
def fourier_classifier(compare: Compare) -> None:
    config = PerceiverConfig(
        **SIZES | {"d_model": 261}, **VARIANTS["kv"] | {"num_cross_attention_heads": 1}, num_labels=5
    )
    model = twin(PerceiverForImageClassificationFourier, config)
    exactly(model.perceiver.input_preprocessor.position_embeddings)
    loaded, rng = huggingface.load(saved(model)), np.random.default_rng(5)
    pictures = [rng.normal(size=(*grid, 3)).astype(np.float32) for grid in ((5, 7), (1, 6), (9, 4))]

    def call(m: nn.Module, i: int) -> dict[str, torch.Tensor]:
        x = torch.from_numpy(pictures[i]).permute(2, 0, 1)[None]
        return of_transformers(m, "decoder.decoding_cross_attention", x.to(m.dtype), slice(1))

    def load(m: nn.Module) -> dict:
        return huggingface.load(saved(m)).params

    flat, grids = [x.reshape(-1, 3) for x in pictures], [(1, *x.shape[:2]) for x in pictures]
    rows = slices(loaded.cfg, [len(x) for x in flat], [1] * 3)
    case = Case(model, loaded.cfg, load, call, flat, grids, rows)
    compare_values(compare, case)
    # Phases of 112 half turns have errors of 1e-5 in float32, and gradients several times that: they are compared at
    # lower frequencies.
    model.perceiver.input_preprocessor.position_embeddings.max_resolution = (10, 12)
    slow = replace(loaded.cfg, fourier=replace(loaded.cfg.fourier, resolution=(10, 12)))
    compare_gradients(compare, replace(case, cfg=slow))


@system("Perceiver IO: Fourier features")
def fourier_features(compare: Compare) -> None:
    """Of grids with one to three axes, up to the 224 places whose frequencies are highest."""
    for resolution, grid, bands in (((224, 224), (224, 3), 64), ((50,), (37,), 6), ((16, 224, 31), (2, 5, 1), 5)):
        for concat_pos in (True, False):
            for sine_only in (True, False):
                encoding = theirs.PerceiverFourierPositionEncoding(bands, resolution, concat_pos, sine_only)
                encoding = exactly(encoding)
                index = np.indices(grid).reshape(len(grid), -1).T.astype(np.int32)
                both = (encoding(grid, 1, None, kind).numpy() for kind in (torch.float32, torch.float64))
                single, exact = (x.reshape(len(index), -1) for x in both)
                at = position_embed.centred(
                    jnp.asarray(index), jnp.asarray(np.broadcast_to(grid, index.shape), jnp.int32)
                )
                ours = position_embed.fourier(at, bands, resolution, concat_pos=concat_pos, sine_only=sine_only)
                compare.value(f"{grid} of {resolution}, {concat_pos}, {sine_only}", ours, single, exact)


def lucid(cfg: perceiver_io.Config) -> list[rules.Rule]:
    """perceiver_pytorch's names."""

    def layer(ours: str, attention: str, forward: str, of: perceiver_layer.Config) -> list[rules.Rule]:
        out = [
            *norm(f"{ours}/norm", f"{attention}.norm"),
            *dense(f"{ours}/q", f"{attention}.fn.to_q", False),
            *dense(f"{ours}/k", f"{attention}.fn.to_kv", False, join=0),
            *dense(f"{ours}/v", f"{attention}.fn.to_kv", False, join=0),
            *dense(f"{ours}/out", f"{attention}.fn.to_out", inputs=2),
        ]
        out += norm(f"{ours}/input_norm", f"{attention}.norm_context") if of.inputs is not None else []
        if of.hidden:
            out += norm(f"{ours}/mlp_norm", f"{forward}.norm")
            out += dense(f"{ours}/mlp/up", f"{forward}.fn.net.0", join=0)
            out += dense(f"{ours}/mlp/gate", f"{forward}.fn.net.0", join=0)
            out += dense(f"{ours}/mlp/down", f"{forward}.fn.net.2")
        return out

    cross, own = "cross_attend_block.cross_", "layers.{}.self_attns.0."
    out = [rules.Rule("latents", "latents"), *layer("encoder", f"{cross}attn", f"{cross}ff", cfg.encoder)]
    out += layer("layers", f"{own}0", f"{own}1", cfg.layer)
    return out + layer("decoder", "decoder_cross_attn", "decoder_ff", cfg.decoder) + dense("out", "to_logits")


@system("perceiver-pytorch: Perceiver IO")
def perceiver_pytorch(compare: Compare) -> None:
    from perceiver_pytorch import PerceiverIO

    rng = np.random.default_rng(8)
    examples = [rng.normal(size=(n, 10)).astype(np.float32) for n in (7, 1, 12)]
    asked = np.array([1, 0, 2, 1, 1, -1, 2], np.int32)
    queries = rng.normal(size=(len(asked), 14)).astype(np.float32)
    for tied in (False, True):
        sizes = {"cross_heads": 1, "latent_heads": 2, "cross_dim_head": 8, "latent_dim_head": 6}
        ends = {"queries_dim": 14, "logits_dim": 9, "num_latents": 5, "latent_dim": 16}
        model = PerceiverIO(depth=2, dim=10, **sizes, **ends, weight_tie_layers=tied, decoder_ff=tied)
        model = randomise(model.float().eval())
        usual = {"bias": False, "gated": True}
        cfg = perceiver_io.Config(
            latents=5,
            encoder=perceiver_layer.Config(16, 10, 1, 8, 8, 64, **usual),
            layer=perceiver_layer.Config(16, None, 2, 12, 12, 64, **usual),
            layers=1 if tied else 2,
            blocks=2 if tied else 1,
            decoder=perceiver_layer.Config(14, 16, 1, 8, 8, 56 if tied else 0, residual=False, **usual),
            outputs=9,
        )

        def load(m: nn.Module, cfg: perceiver_io.Config = cfg, tied: bool = tied) -> dict:
            drop = {r"layers\.1\..*": "the first layer once more"} if tied else {}
            return rules.load(perceiver_io.spec(cfg), lucid(cfg), rules.Arrays(state(m)), drop=drop)

        def call(m: nn.Module, i: int) -> dict[str, torch.Tensor]:
            kind = m.latents.dtype
            q = torch.from_numpy(queries[asked == i]).to(kind)
            out, hidden = m(torch.from_numpy(examples[i]).to(kind)[None], queries=q, return_hiddens=True)
            states = {f"layer {n}": h[0] for n, h in enumerate(hidden[1:])}
            return {"out": out[0], "encoder": hidden[0][0], **states}

        def rows(name: str, i: int) -> Any:
            return np.flatnonzero(asked == i) if name == "out" else slice(i * 5, i * 5 + 5)

        grids = [(1, 1, len(x)) for x in examples]
        case = Case(model, cfg, load, call, examples, grids, rows, (queries, asked))
        compare_values(compare, case)
        compare_gradients(compare, case)
