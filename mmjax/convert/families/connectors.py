"""Tables of connectors: ours and the tensors of published ones, under the prefix that their model gives them."""

from mmjax.connectors import abstractor, linear, merger, mlp, pixel_shuffle, pool, wico
from mmjax.convert import rules as layouts
from mmjax.convert.families.blocks import dense, norm
from mmjax.convert.rules import Rule, Shape


def depthwise(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Theirs is [channels, 1, height, width] (a grouped torch.nn.Conv2d), ours [height, width, channels]."""
    height, width, channels = shape
    return (channels, 1, height, width), (2, 3, 1, 0)


def pointwise(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Theirs is [out, in, 1, 1] (torch.nn.Conv2d), ours [in, out]."""
    return (shape[1], shape[0], 1, 1), (2, 3, 1, 0)


def llava(cfg: mlp.Config, prefix: str = "multi_modal_projector.") -> list[Rule]:
    """LLaVA, -NeXT, -OneVision, Video-LLaVA, VipLLaVA's MLP, Pixtral: linear_1, linear_2."""
    return dense("up", f"{prefix}linear_1", cfg.bias) + dense("down", f"{prefix}linear_2", cfg.bias)


def sequential(cfg: mlp.Config, prefix: str = "mm_projector.") -> list[Rule]:
    """A torch.nn.Sequential of linear maps and activations (liuhaotian's LLaVA; Honeybee's MLP, `abstractor.net.`)."""
    out = dense("up", f"{prefix}0", cfg.bias) + dense("down", f"{prefix}{2 * cfg.depth - 2}", cfg.bias)
    if cfg.depth > 2:
        numbers = range(2, 2 * cfg.depth - 2, 2)
        out.append(Rule("middle/kernel", f"{prefix}{{}}.weight", layouts.linear(), layers=numbers))
        out += [Rule("middle/bias", f"{prefix}{{}}.bias", layers=numbers)] if cfg.bias else []
    return out


def paligemma(cfg: linear.Config, prefix: str = "multi_modal_projector.linear.") -> list[Rule]:
    """One linear map: PaliGemma's; in LLaVA-1 "model.mm_projector."."""
    out = [Rule("kernel", f"{prefix}weight", layouts.linear())]
    return out + ([Rule("bias", f"{prefix}bias")] if cfg.bias else [])


def internvl(cfg: pixel_shuffle.Config, prefix: str = "multi_modal_projector.") -> list[Rule]:
    """InternVL: layer_norm, linear_1, linear_2 (in OpenGVLab's own files mlp1.0, mlp1.1, mlp1.3: `internvl_hub`)."""
    return (
        norm("norm", f"{prefix}layer_norm", "layer")
        + dense("projection/up", f"{prefix}linear_1")
        + dense("projection/down", f"{prefix}linear_2")
    )


def internvl_hub(cfg: pixel_shuffle.Config, prefix: str = "mlp1.") -> list[Rule]:
    """OpenGVLab's own files."""
    return (
        norm("norm", f"{prefix}0", "layer")
        + dense("projection/up", f"{prefix}1")
        + dense("projection/down", f"{prefix}3")
    )


def idefics3(cfg: pixel_shuffle.Config, prefix: str = "model.connector.") -> list[Rule]:
    """Idefics3 and SmolVLM."""
    return dense("projection", f"{prefix}modality_projection.proj", cfg.bias)


def qwen2_vl(cfg: merger.Config, prefix: str = "visual.merger.") -> list[Rule]:
    """Qwen2-VL and Qwen2.5-VL: ln_q, mlp.0, mlp.2."""
    return (
        norm("norm", f"{prefix}ln_q", cfg.norm)
        + dense("mlp/up", f"{prefix}mlp.0")
        + dense("mlp/down", f"{prefix}mlp.2")
    )


def qwen3_vl(cfg: merger.Config, prefix: str = "model.visual.merger.") -> list[Rule]:
    """Qwen3-VL: norm, linear_fc1, linear_fc2; its DeepStack mergers are "model.visual.deepstack_merger_list.0." …"""
    return (
        norm("norm", f"{prefix}norm", cfg.norm)
        + dense("mlp/up", f"{prefix}linear_fc1")
        + dense("mlp/down", f"{prefix}linear_fc2")
    )


def mistral3(cfg: merger.Config, prefix: str = "multi_modal_projector.") -> list[Rule]:
    """Mistral 3: norm, patch_merger.merging_layer, linear_1, linear_2."""
    return (
        norm("norm", f"{prefix}norm", cfg.norm)
        + dense("reduction", f"{prefix}patch_merger.merging_layer", False)
        + dense("mlp/up", f"{prefix}linear_1", cfg.bias)
        + dense("mlp/down", f"{prefix}linear_2", cfg.bias)
    )


def gemma3(cfg: pool.Config, prefix: str = "multi_modal_projector.") -> list[Rule]:
    """Gemma 3: a norm and a matrix that is not transposed."""
    return [
        Rule("norm/scale", f"{prefix}mm_soft_emb_norm.weight"),
        Rule("linear/kernel", f"{prefix}mm_input_projection_weight"),
    ]


def window(cfg: wico.Config, prefix: str = "model.mm_projector.") -> list[Rule]:
    """WiCo: window_proj. Beside it lie `self_att`, the encoder's last layer, and `patch_proj`, which nothing reads."""
    return dense("projection", f"{prefix}window_proj")


def honeybee(cfg: abstractor.Config, prefix: str = "abstractor.") -> list[Rule]:
    """Honeybee's C-Abstractor: net.0 and net.2 (timm's RegStage, blocks b1, b2 …), readout, pos_emb, eos_tokens."""

    def conv(ours: str, theirs: str, layout: layouts.Layout, layers: range | None) -> list[Rule]:
        return [
            Rule(f"{ours}/kernel", f"{theirs}.conv.weight", layout, layers=layers),
            Rule(f"{ours}/norm/scale", f"{theirs}.bn.weight", layers=layers),
            Rule(f"{ours}/norm/bias", f"{theirs}.bn.bias", layers=layers),
        ]

    def block(ours: str, theirs: str, shortcut: bool, layers: range | None) -> list[Rule]:
        out = conv(f"{ours}/narrow", f"{theirs}.conv1", pointwise, layers)
        out += conv(f"{ours}/local", f"{theirs}.conv2", depthwise, layers)
        for name, fc in (("squeeze", "fc1"), ("excite", "fc2")):
            out.append(Rule(f"{ours}/{name}/kernel", f"{theirs}.se.{fc}.weight", pointwise, layers=layers))
            out.append(Rule(f"{ours}/{name}/bias", f"{theirs}.se.{fc}.bias", layers=layers))
        out += conv(f"{ours}/widen", f"{theirs}.conv3", pointwise, layers)
        return out + (conv(f"{ours}/shortcut", f"{theirs}.downsample", pointwise, layers) if shortcut else [])

    out = []
    if cfg.depth:
        out += block("before/first", f"{prefix}net.0.b1", cfg.inputs != cfg.width, None)
        out += block("after", f"{prefix}net.2.b{{}}", False, range(1, cfg.depth + 1))
    if cfg.depth > 1:
        out += block("before/rest", f"{prefix}net.0.b{{}}", False, range(2, cfg.depth + 1))
    for i in range(cfg.readout):
        out += dense(f"readout/{i}", f"{prefix}readout.{2 * i}")
    if cfg.prenorm:
        out += norm("prenorm", f"{prefix}prenorm", "layer")
    if cfg.positions:
        out.append(Rule("positions", f"{prefix}pos_emb", _table))
    if cfg.eos:
        out.append(Rule("eos", f"{prefix}eos_tokens", layouts.ones(1)))
    return out


def _table(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Theirs is [1, rows · columns, width], ours [rows, columns, width]."""
    return (1, shape[0] * shape[1], shape[2]), (0, 1, 2)
