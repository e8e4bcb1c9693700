"""The layer of Perceiver IO (Jaegle et al. 2021, section 3.1): latents or queries look at inputs, or at each other."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import ParamSpec, Spec, fan_in
from mmjax.nn import linear, mlp, norm
from mmjax.nn.attention import attend


@dataclass(frozen=True)
class Config:
    """Widths and variants.

    width: of the queries, and of what comes out. inputs: width of what they look at; None: at themselves.
    qk, v: values in all heads' queries or keys together, and in their values.
    hidden: of the MLP; 0: there is none (perceiver-pytorch's decoder).
    residual: whether attention is added to the queries (not where they are positions: the language model's decoder).
    bias: of q, k and v. gated: the MLP is (perceiver-pytorch: no bias, gated).
    """

    width: int
    inputs: int | None
    heads: int
    qk: int
    v: int
    hidden: int
    residual: bool = True
    bias: bool = True
    gated: bool = False
    activation: mlp.Activation = "gelu"
    epsilon: float = 1e-5

    def __post_init__(self):
        if self.qk % self.heads or self.v % self.heads:
            raise InputError(
                f"Queries of {self.qk} values and values of {self.v} do not divide into {self.heads} heads evenly; "
                f"choose numbers that do."
            )

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.width, self.hidden, None, self.activation, self.gated)

    @property
    def input_norm(self) -> norm.Config:
        return norm.Config(self.inputs, "layer", self.epsilon)

    @property
    def norm(self) -> norm.Config:
        return norm.Config(self.width, "layer", self.epsilon)


def spec(cfg: Config) -> Spec:
    inputs = cfg.width if cfg.inputs is None else cfg.inputs

    def project(width: int, channels: int) -> Spec:
        shape = (cfg.heads, channels // cfg.heads)
        out = {"kernel": ParamSpec((width, *shape), ("embed", "heads", None), fan_in(width))}
        return out | ({"bias": ParamSpec(shape, ("heads", None))} if cfg.bias else {})

    out = {
        "norm": norm.spec(cfg.norm),
        "q": project(cfg.width, cfg.qk),
        "k": project(inputs, cfg.qk),
        "v": project(inputs, cfg.v),
        "out": {
            "kernel": ParamSpec((cfg.heads, cfg.v // cfg.heads, cfg.width), ("heads", None, "embed"), fan_in(cfg.v)),
            "bias": ParamSpec((cfg.width,), (None,)),
        },
    }
    if cfg.inputs is not None:
        out["input_norm"] = norm.spec(cfg.input_norm)
    if cfg.hidden:
        out |= {"mlp_norm": norm.spec(cfg.norm), "mlp": mlp.spec(cfg.mlp)}
    return out


def apply(
    params: dict,
    x: Float[Array, "b l d"],
    cfg: Config,
    *,
    order: Int[Array, "b s"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    inputs: Float[Array, "b s e"] | None = None,
) -> Float[Array, "b l d"]:
    """[B, L, width] → the same.

    Args:
      params: as `spec(cfg)`.
      x: latents, or queries.
      cfg: the layer.
      order: i32[B, S], labels of the inputs; of x where it looks at itself.
      lo, hi: i32[B, L], which of them each of x sees.
      inputs: [B, S, inputs], where cfg.inputs is not None.
    """
    split = ("batch", None, "heads", None)

    def project(name: str, of: Float[Array, "b n c"]) -> Float[Array, "b n h e"]:
        y = sharding.dense(of, params[name]["kernel"], split)
        return linear.plus(y, params[name]["bias"]) if cfg.bias else y

    h = norm.apply(params["norm"], x, cfg.norm)
    seen = h if inputs is None else norm.apply(params["input_norm"], inputs, cfg.input_norm)
    out, _ = attend(project("q", h), project("k", seen), project("v", seen), order, lo, hi)
    y = linear.plus(sharding.dense(out, params["out"]["kernel"], ("batch", None, None)), params["out"]["bias"])
    x = x + y if cfg.residual else y
    if cfg.hidden:
        x = x + mlp.apply(params["mlp"], norm.apply(params["mlp_norm"], x, cfg.norm), cfg.mlp)
    return sharding.constrain(x, ("batch", None, None))
