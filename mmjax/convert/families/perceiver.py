"""Perceivers: the resamplers of Flamingo, Idefics and Idefics2, and directories of transformers' Perceiver IO."""

from mmjax.connectors import perceiver, perceiver_io, perceiver_layer
from mmjax.convert import raw
from mmjax.convert.families.blocks import dense, norm
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, Shape
from mmjax.core.errors import InputError
from mmjax.nn import mlp


def between(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Theirs is [rows, 1, D], ours [rows, D]."""
    return (shape[0], 1, shape[1]), (0, 1, 2)


def flamingo(cfg: perceiver.Config, prefix: str = "perceiver.", media: str = "media_time_embs") -> list[Rule]:
    """OpenFlamingo's resampler; `media` is what its table by number is called ("media_pos_emb" in flamingo-pytorch)."""
    attention, forward = f"{prefix}layers.{{}}.0", f"{prefix}layers.{{}}.1"
    out = [
        Rule("latents", f"{prefix}latents"),
        *norm("layers/feature_norm", f"{attention}.norm_media"),
        *norm("layers/latent_norm", f"{attention}.norm_latents"),
        *dense("layers/q", f"{attention}.to_q", False),
        *dense("layers/k", f"{attention}.to_kv", False, join=0),
        *dense("layers/v", f"{attention}.to_kv", False, join=0),
        *dense("layers/out", f"{attention}.to_out", False, 2),
        *norm("layers/mlp_norm", f"{forward}.0"),
        *dense("layers/mlp/up", f"{forward}.1", False),
        *dense("layers/mlp/down", f"{forward}.3", False),
        *norm("norm", f"{prefix}norm"),
    ]
    out += [Rule("frames", f"{prefix}frame_embs")] if cfg.frames else []
    return out + ([Rule("media", f"{prefix}{media}", between)] if cfg.media else [])


def idefics(cfg: perceiver.Config, prefix: str = "model.perceiver_resampler.") -> list[Rule]:
    """Idefics' resampler."""
    attention, forward = f"{prefix}blocks.{{}}.0", f"{prefix}blocks.{{}}.1"
    out = [
        Rule("latents", f"{prefix}latents"),
        *norm("layers/feature_norm", f"{attention}.context_layer_norm"),
        *norm("layers/latent_norm", f"{attention}.latents_layer_norm"),
        *_projections(attention),
        *dense("layers/out", f"{attention}.output_proj", False, 2),
        *norm("layers/mlp_norm", f"{forward}.ln"),
        *dense("layers/mlp/up", f"{forward}.fc", False),
        *dense("layers/mlp/down", f"{forward}.c_proj", False),
        *norm("norm", f"{prefix}layer_norm"),
    ]
    if cfg.qk_norm:
        out += norm("layers/q_norm", f"{attention}.q_layer_norm") + norm("layers/k_norm", f"{attention}.k_layer_norm")
    return out


def idefics2(cfg: perceiver.Config, prefix: str = "model.connector.") -> list[Rule]:
    """Idefics2's connector: modality projection and resampler."""
    inner = f"{prefix}perceiver_resampler."
    block = f"{inner}layers.{{}}"
    return [
        *_gated("projection", f"{prefix}modality_projection"),
        Rule("latents", f"{inner}latents"),
        *norm("layers/feature_norm", f"{block}.input_context_norm", "rms"),
        *norm("layers/latent_norm", f"{block}.input_latents_norm", "rms"),
        *_projections(f"{block}.self_attn"),
        *dense("layers/out", f"{block}.self_attn.o_proj", False, 2),
        *norm("layers/mlp_norm", f"{block}.post_attention_layernorm", "rms"),
        *_gated("layers/mlp", f"{block}.mlp"),
        *norm("norm", f"{inner}norm", "rms"),
    ]


def _projections(theirs: str) -> list[Rule]:
    return [rule for name in ("q", "k", "v") for rule in dense(f"layers/{name}", f"{theirs}.{name}_proj", False)]


def _gated(ours: str, theirs: str) -> list[Rule]:
    return [rule for name in ("gate", "up", "down") for rule in dense(f"{ours}/{name}", f"{theirs}.{name}_proj", False)]


def idefics_config(config: dict) -> perceiver.Config:
    """The resampler of an Idefics config.json.

    Raises:
      InputError: it has none.
    """
    vision, own = raw.part(config, "vision_config", {}), raw.part(config, "perceiver_config", {})
    if not raw.flag(config, "use_resampler", False):
        raise InputError("config.json says that this Idefics has no resampler (use_resampler); use one that has.")
    width = raw.size(vision, "embed_dim" if "embed_dim" in vision else "hidden_size", 768)
    return perceiver.Config(
        inputs=width,
        width=width,
        latents=raw.size(own, "resampler_n_latents", 64),
        layers=raw.size(own, "resampler_depth", 6),
        heads=raw.size(own, "resampler_n_heads", 16),
        head=raw.size(own, "resampler_head_dim", 96),
        hidden=4 * width,
        qk_norm=raw.flag(own, "qk_layer_norms_perceiver", False),
        activation="relu",
    )


def idefics2_config(config: dict) -> perceiver.Config:
    """The connector of an Idefics2 config.json.

    Raises:
      InputError: an activation that mmjax has not.
    """
    vision, text, own = (config.get(f"{name}_config", {}) for name in ("vision", "text", "perceiver"))
    inputs, width = raw.size(vision, "hidden_size", 768), raw.size(text, "hidden_size", 4096)
    # transformers takes both from the text where the widths are not the same.
    norms = own if raw.size(own, "hidden_size", 4096) == width else text
    hidden = raw.size(text, "intermediate_size", 14336)
    return perceiver.Config(
        inputs=inputs,
        width=width,
        latents=raw.size(own, "resampler_n_latents", 64),
        layers=raw.size(own, "resampler_depth", 3),
        heads=raw.size(own, "resampler_n_heads", 16),
        head=raw.size(own, "resampler_head_dim", 96),
        hidden=4 * width,
        epsilon=float(raw.get(norms, "rms_norm_eps", 1e-6)),
        kv_heads=raw.size(own, "num_key_value_heads", 4),
        norm_kind="rms",
        activation=raw.activation(own, default="silu"),
        gated=True,
        projection=mlp.Config(inputs, hidden, width, raw.activation(text, default="silu"), True, False),
    )


def rules(cfg: perceiver_io.Config, prefix: str = "") -> list[Rule]:
    """Perceiver IO as PerceiverForMaskedLM and PerceiverForImageClassificationFourier name it."""
    own = f"{prefix}perceiver."
    decoder = f"{own}decoder.decoder." if cfg.outputs else f"{own}decoder."
    out = [
        Rule("latents", f"{own}embeddings.latents"),
        *_layer("encoder", f"{own}encoder.cross_attention", cfg.encoder),
        *_layer("layers", f"{own}encoder.self_attends.{{}}", cfg.layer),
        *_layer("decoder", f"{decoder}decoding_cross_attention", cfg.decoder),
        Rule("queries", f"{decoder}output_position_encodings.position_embeddings"),
    ]
    if cfg.vocab:
        out.append(Rule("embed", f"{own}input_preprocessor.embeddings.weight"))
        out.append(Rule("positions", f"{own}input_preprocessor.position_embeddings.weight"))
    out += dense("out", f"{decoder}final_layer") if cfg.outputs else []
    return out + ([Rule("head_bias", f"{prefix}embedding_decoder.bias")] if cfg.tied else [])


def _layer(ours: str, theirs: str, cfg: perceiver_layer.Config) -> list[Rule]:
    inner = f"{theirs}.attention.self"
    return [
        *norm(f"{ours}/norm", f"{inner}.layernorm1"),
        *(norm(f"{ours}/input_norm", f"{inner}.layernorm2") if cfg.inputs is not None else []),
        *dense(f"{ours}/q", f"{inner}.query"),
        *dense(f"{ours}/k", f"{inner}.key"),
        *dense(f"{ours}/v", f"{inner}.value"),
        *dense(f"{ours}/out", f"{theirs}.attention.output.dense", inputs=2),
        *norm(f"{ours}/mlp_norm", f"{theirs}.layernorm"),
        *dense(f"{ours}/mlp/up", f"{theirs}.mlp.dense1"),
        *dense(f"{ours}/mlp/down", f"{theirs}.mlp.dense2"),
    ]


def read(config: dict, keys: frozenset[str]) -> Found:
    """The Perceiver IO of a config.json.

    Raises:
      InputError: it is neither of the two; sizes that do not fit each other; an activation that mmjax has not.
    """
    known = ("PerceiverForMaskedLM", "PerceiverForImageClassificationFourier")
    kind = next(iter(config.get("architectures") or [None]))
    if kind not in known:
        raise InputError(
            f"config.json is of the architecture {kind!r}; of Perceivers mmjax reads {' and '.join(known)}."
        )
    text = kind == known[0]
    fourier = None if text else perceiver_io.Fourier(64, (224, 224))
    width, model = raw.size(config, "d_latents", 1280), raw.size(config, "d_model", 768)
    inputs = model if fourier is None else 3 + fourier.width
    act = raw.activation(config)
    shape = raw.get(config, "cross_attention_shape_for_attention", "kv")
    if shape not in ("kv", "q"):
        raise InputError(
            f"config.json says 'cross_attention_shape_for_attention' is {shape!r}; it must be 'kv' or 'q'."
        )

    def layer(heads: str, widening: str, of: int | None, residual: bool = True) -> perceiver_layer.Config:
        """The encoder's, or one of self-attention."""
        start = of if of is not None and shape == "kv" else width
        qk = raw.size(config, "qk_channels", start) if config.get("qk_channels") is not None else start
        v = raw.size(config, "v_channels", qk) if config.get("v_channels") is not None else qk
        if of is None and v != width:
            raise InputError(
                f"config.json gives self-attention values of {v}, but latents of {width}; set v_channels to the latter."
            )
        hidden = width * raw.size(config, f"{widening}_widening_factor", 1)
        return perceiver_layer.Config(width, of, raw.size(config, heads, 8), qk, v, hidden, residual, activation=act)

    if text:
        # Eight heads of 32, whatever config.json says of the encoder.
        decoder = perceiver_layer.Config(model, width, 8, 256, model, model, residual=False, activation=act)
        positions = raw.size(config, "max_position_embeddings", 2048)
        ends = {"vocab": raw.size(config, "vocab_size", 262), "positions": positions, "tied": True}
        ends |= {"queries": positions, "by_input": True}
    else:
        decoder = perceiver_layer.Config(width, width, 1, width, width, width, activation=act)
        ends = {"fourier": fourier, "queries": 1, "outputs": raw.labels(config)}
    residual = bool(config.get("use_query_residual", True))
    cfg = perceiver_io.Config(
        latents=raw.size(config, "num_latents", 256),
        encoder=layer("num_cross_attention_heads", "cross_attention", inputs, residual),
        layer=layer("num_self_attention_heads", "self_attention", None),
        layers=raw.size(config, "num_self_attends_per_block", 26),
        blocks=raw.size(config, "num_blocks", 1),
        decoder=decoder,
        **ends,
    )
    return Found(perceiver_io, cfg, tuple(rules(cfg)))
