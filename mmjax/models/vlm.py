"""A vision-language model: encoder → connector → media tokens in the decoder's sequence, or beside it (Flamingo).

Profiles and compiled programs name its parts: vision, connector, decoder (`jax.named_scope`).
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.connectors import Connector, connect, linear, merger, module
from mmjax.connectors.qformer_labels import Text
from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, stack
from mmjax.encoders import Encoder, tiled, vit
from mmjax.encoders import module as encoder_of
from mmjax.encoders import see as look_at
from mmjax.models import decoder, encoder_decoder
from mmjax.models.language import Language
from mmjax.models.tower import Media
from mmjax.nn import transformer
from mmjax.nn.cache import KVCache
from mmjax.sequence import behind, budget, interleave, positions
from mmjax.sequence.batch import Batch
from mmjax.sequence.interleave import PIXEL
from mmjax.sequence.layout import IMAGE, NAMES, VIDEO


@dataclass(frozen=True)
class Config:
    """Where media enter is the decoder's choice: `decoder.cross`, or else in the sequence.

    vision, connector: None for both where there is nothing but text: a language model alone is the same without them.
    placeholder: the token id (or ids: of pictures, of videos) that stands where media tokens go; given, the train step
      checks that they do.
    deepstack, deep: blocks of the encoder whose outputs go to the first blocks of the decoder, each through a merger of
      its own, all like `deep` (Meng et al. 2024, DeepStack; Qwen3-VL).
    segments: whether a learnt vector of its modality is added to every token (the segment or token-type embedding of
      Devlin et al. 2019, BERT, section 3.2, as Li et al. 2019, VisualBERT, section 3.2, uses it).
    scaled: whether media tokens are multiplied by the decoder's `embed_scale` as well (Kosmos-2).
    newline: whether a learnt vector stands at those places of a picture that show none of its media tokens (the ends of
      its rows: `image_newline` of LLaVA-NeXT and LLaVA-OneVision), whatever token id they carry.
    """

    vision: Encoder | None
    connector: Connector | None
    decoder: Language
    placeholder: int | tuple[int, ...] | None = None
    segments: bool = False
    newline: bool = False
    scaled: bool = False
    deepstack: tuple[int, ...] = ()
    deep: merger.Config | None = None

    def __post_init__(self):
        if (self.vision is None) != (self.connector is None):
            raise InputError("An encoder of pictures and a connector go together; give both or neither.")
        if self.vision is None:
            self._refuse_media()
            return
        if bool(self.deepstack) != (self.deep is not None):
            raise InputError("DeepStack's blocks and the config of its mergers go together; give both or neither.")
        if self.deepstack and self.decoder.answers:
            raise InputError("DeepStack adds to the blocks of a decoder; leave it out of an encoder–decoder.")
        if self.deepstack and (self.decoder.cross is not None or len(self.deepstack) > self.decoder.blocks.layers):
            raise InputError(
                f"DeepStack of {len(self.deepstack)} blocks adds to media tokens in the sequence, after as many blocks "
                f"of the decoder; leave cross-attention out, and give the decoder enough blocks."
            )
        if self.vision.per_picture and self.vision.per_picture != self.connector.per_picture:
            raise InputError(
                f"The encoder makes {self.vision.per_picture} features of every picture, and the connector "
                f"{self.connector.per_picture} media tokens; set its per_picture to that."
            )
        if isinstance(self.connector, linear.Config) and self.connector.per_picture and not self.vision.per_picture:
            raise InputError(
                f"A linear connector makes a media token of every feature, but is to make {self.connector.per_picture} "
                f"of every picture, and the encoder has no fixed number; leave its per_picture out."
            )
        if self.connector.reads not in (None, self.vision.outputs):
            raise InputError(
                f"The connector reads features of {self.connector.reads} values, and the encoder makes some of "
                f"{self.vision.outputs}; set the connector's `inputs` to that."
            )
        if self.connector.prefix and not self.vision.prefix:
            raise InputError("The connector reads class or register tokens, and the encoder has none; give it some.")
        if self.connector.alone:
            raise InputError(
                f"The connector {type(self.connector).__module__} does not make media tokens that can be counted per "
                f"picture or per square of patches; call it as a function, or choose another one."
            )

    def _refuse_media(self) -> None:
        """Raises InputError where a model of text alone is told of media."""
        told = ("placeholder", "newline", "scaled", "deepstack", "deep")
        odd = next((name for name in told if getattr(self, name) not in (None, False, ())), None)
        odd = "decoder.cross" if self.decoder.cross is not None else odd
        if odd is not None:
            raise InputError(f"{odd} is of models that see pictures, and this one reads text alone; leave it out.")

    @property
    def sees(self) -> bool:
        """Whether there is an encoder of pictures; without one, text is read alone."""
        return self.vision is not None

    @property
    def asks(self) -> bool:
        """Whether the connector reads a text beside each picture, so that media tokens are not the picture's alone."""
        return self.connector is not None and self.connector.reads_text

    @property
    def per_picture(self) -> int:
        """Media tokens of every picture, where that number is fixed; 0: it depends on the picture."""
        return 0 if self.connector is None else self.connector.per_picture

    def refuse(self, sequence: interleave.Config) -> None:
        """Raises InputError where batches made with this config lack what the model reads."""
        square = 1 if self.per_picture or not self.sees else self.connector.square
        if square != sequence.merge:
            raise InputError(
                f"The {'connector' if self.sees else 'model'} reads squares of {square} × {square} patches, but "
                f"sequence.merge is {sequence.merge}; set it to {square}."
            )
        if (self.decoder.cross is not None) != (sequence.cross != "none"):
            raise InputError(
                f"The decoder {'looks' if self.decoder.cross else 'does not look'} at media by cross-attention, but "
                f"sequence.cross is {sequence.cross!r}; set it to 'last_image' (or its kin) with cross-attention, "
                f"and to 'none' without."
            )
        if self.decoder.answers != bool(sequence.answer):
            raise InputError(
                f"The language model is {'' if self.decoder.answers else 'no '}encoder and decoder, but "
                f"sequence.answer is {sequence.answer}; set it to how many tokens a row's answers may have, or to 0."
            )
        if self.asks != bool(sequence.instruction):
            raise InputError(
                f"The connector {'reads' if self.asks else 'does not read'} a text beside each "
                f"picture, but sequence.instruction is {sequence.instruction}; set it to such texts' tokens, or 0."
            )
        windows, canvas = (self.vision.window, self.vision.canvas) if self.sees else (0, 0)
        if (windows is None and not sequence.window) or (windows is not None and sequence.window != windows):
            raise InputError(
                f"The encoder reads patches in windows of {windows or 'any'} patches a side (0: in none), but "
                f"sequence.window is {sequence.window}; set both or neither."
            )
        if canvas != sequence.canvas:
            raise InputError(
                f"The encoder has {canvas} tiles of every picture, but sequence.canvas is "
                f"{sequence.canvas}; set it to that."
            )


def spec(cfg: Config) -> Spec:
    out = {"decoder": module(cfg.decoder).spec(cfg.decoder)}
    if cfg.sees:
        seen = encoder_of(cfg.vision).spec(cfg.vision), module(cfg.connector).spec(cfg.connector)
        out = {"vision": seen[0], "connector": seen[1]} | out
    if cfg.deep is not None:
        out["deep"] = stack(merger.spec(cfg.deep), len(cfg.deepstack))
    if cfg.segments:
        out["segments"] = ParamSpec((len(NAMES), cfg.decoder.blocks.width), (None, "embed"), Normal(0.02))
    if cfg.newline:
        width = cfg.decoder.blocks.width
        out["newline"] = ParamSpec((width,), (None,), Normal(width**-0.5))
    return out


def costs(cfg: Config, sequence: interleave.Config = interleave.PLAIN) -> budget.Costs:
    """What budgets are counted with: attention and MLPs of encoder and decoder, and the head.

    sequence: the descriptors of its batches, where text looks at media by cross-attention (left out: at all so far).
    """

    def blocks(b: transformer.Config) -> budget.Blocks:
        return budget.Blocks(b.layers, b.width, b.heads * b.head, b.kv_heads * b.head, b.hidden, b.gated)

    out = budget.Costs(blocks(cfg.decoder.blocks), cfg.decoder.said, bytes=4)
    if cfg.sees:
        # Transformers that follow each other are of one width and as good as one.
        layers = sum(stack.layers for stack in cfg.vision.stacks.values())
        encoder = dataclasses.replace(blocks(cfg.vision.blocks), layers=layers)
        tokens = cfg.vision.tokens(0) if cfg.vision.per_picture else 0
        out = dataclasses.replace(out, encoder=encoder, tokens=tokens)
    if cfg.decoder.answers:
        return dataclasses.replace(out, answer=blocks(cfg.decoder.answer))
    if (c := cfg.decoder.cross) is None:
        return out
    between = len(cfg.decoder.crossed), c.width, c.heads * c.head, c.keys * c.head, c.hidden, c.gated
    cross = {"cross": budget.Blocks(*between), "media": c.media, "blind": c.blind == "all"}
    return dataclasses.replace(out, sequence=sequence, **cross)


def see(params: dict, batch: Batch, cfg: Config) -> vit.Features:
    """What the vision encoder sees of the row's pictures: its features, and its blocks' for DeepStack."""
    with jax.named_scope("vision"):
        return look_at(
            params["vision"],
            batch.patches,
            cfg.vision,
            order=batch.patch_order,
            lo=batch.patch_lo,
            hi=batch.patch_hi,
            position=batch.patch_position,
            window=(batch.window_lo, batch.window_hi) if cfg.vision.window is None else None,
            taps=cfg.deepstack,
            image=batch.patch_image,
            grid=batch.grid,
        )


def media(params: dict, batch: Batch, cfg: Config, *, seen: vit.Features | None = None) -> Media:
    """The row's media tokens [B, M, D], picture after picture, and DeepStack's [T, B, M, D] where there are such.

    `seen` is what `see` makes, where that is known already (its patches and taps).
    """
    seen = see(params, batch, cfg) if seen is None else seen
    read, at = _read(seen, batch, cfg)
    with jax.named_scope("connector"):
        tokens = connect(params["connector"], read, cfg.connector, text=_instruction(batch, cfg), **at)
        if cfg.deep is None:
            return Media(tokens)
        # As many as there are taps, and few: unrolled, each product keeps its own place on a mesh.
        each = [jax.tree.map(lambda p, i=i: p[i], params["deep"]) for i in range(len(cfg.deepstack))]
        deep = [merger.apply(p, x, cfg.deep) for p, x in zip(each, seen.taps, strict=True)]
        return Media(tokens, jnp.stack(deep))


def _read(seen: vit.Features, batch: Batch, cfg: Config) -> tuple[Float[Array, "b s d"], dict]:
    """The features that the connector reads, and where they are: patches, and class and register tokens behind them."""
    image, order, many = batch.patch_image, batch.patch_order, cfg.vision.per_picture
    if many:
        number = jnp.where(batch.grid.prod(-1) > 0, jnp.arange(batch.grid.shape[1], dtype=jnp.int32)[None], -1)
        image = jnp.repeat(number, many, axis=1)
        order = jnp.where(image >= 0, jnp.arange(image.shape[1], dtype=jnp.int32)[None], -1)
    if not cfg.connector.prefix:
        return seen.patches, {"image": image, "grid": batch.grid, "order": order}
    if seen.prefix is None:
        raise InputError("This connector reads class or register tokens; features that are kept have none of them.")
    patches, image, order = sharding.unsplit((seen.patches, image, order))
    b, n, many, width = seen.prefix.shape
    labels, _, _ = behind.labels(image, order, batch.grid, many)
    number = jnp.where(batch.grid.prod(-1) > 0, jnp.arange(n, dtype=image.dtype)[None], -1)
    read = jnp.concatenate([patches, seen.prefix.reshape(b, n * many, width)], axis=1)
    image = jnp.concatenate([image, jnp.repeat(number, many, axis=1)], axis=1)
    return read, {"image": image, "grid": batch.grid, "order": labels}


def _instruction(batch: Batch, cfg: Config) -> Text | None:
    """What the connector reads beside the pictures."""
    if not cfg.asks:
        return None
    if (said := batch.instruction) is None:
        raise InputError("This connector reads a text beside each picture; make batches with sequence.instruction.")
    return Text(said.tokens, said.document, said.order)


def present(batch: Batch, cfg: Config) -> Bool[Array, "b m"] | None:
    """Which of the row's media tokens exist; None where there is one for each patch."""
    connector = cfg.connector
    if connector is None:
        return None
    if connector.per_picture:
        return jnp.repeat(batch.grid.prod(-1) > 0, connector.per_picture, axis=1)
    if connector.square > 1:
        kind = sharding.unsplit(batch.patch_kind)[:, :: connector.square**2]
        return kind == PIXEL if batch.media_lo is None else kind > 0
    return None


def hidden(params: dict, batch: Batch, cfg: Config, *, media: Media | None = None) -> Float[Array, "b l d"]:
    """Hidden states of every token [B, L, D]: media tokens take the place of their placeholders, or are looked at.

    Of an encoder–decoder, those of the second stream [B, T, D].

    `media` are the row's media tokens where they are known already (as between the steps of an answer).

    Raises:
      InputError: the batch has room for sound, which this model has no encoder for; or no second stream, and the
        language model reads one.
    """
    if cfg.decoder.answers and batch.answer is None:
        raise InputError("This language model reads a second stream of tokens; make batches with sequence.answer.")
    x, see = _placed(params, batch, cfg, media)
    with jax.named_scope("decoder"):
        if cfg.decoder.answers:
            return encoder_decoder.apply(params["decoder"], x, cfg.decoder, batch.answer, **_seen(see))
        return decoder.apply(params["decoder"], x, cfg.decoder, **see)


def encode(params: dict, batch: Batch, cfg: Config, *, media: Media | None = None) -> Float[Array, "b l d"]:
    """What the encoder of an encoder–decoder makes of the batch's first stream, media in their places."""
    x, see = _placed(params, batch, cfg, media)
    with jax.named_scope("decoder"):
        return encoder_decoder.encode(params["decoder"], x, cfg.decoder, **_seen(see))


def _seen(see: dict) -> dict:
    return {name: see[name] for name in ("order", "lo", "hi")}


def prefill(
    params: dict, batch: Batch, cfg: Config, cache: KVCache, *, media: Media | None = None
) -> tuple[Float[Array, "b l d"], KVCache]:
    """The same, and the cache with the batch's tokens in it (see models.decoder.cached). For inference.

    With cross-attention, the media tokens go to the cache as well: they are given, or there as patches, with the first
    part of a batch that is read in parts.
    """
    x, see = _placed(params, batch, cfg, media)
    if "media" in see:
        # Those of this batch are counted on from those in the cache, as `media_lo` and `media_hi` are.
        tokens, labels = see["media"]
        before = cache.media.order.max(-1, keepdims=True) + 1
        see["media"] = tokens, jnp.where(labels < 0, labels, labels + before)
    with jax.named_scope("decoder"):
        return decoder.cached(params["decoder"], x, cfg.decoder, cache, **see)


def _placed(params: dict, batch: Batch, cfg: Config, known: Media | None) -> tuple[Float[Array, "b l d"], dict]:
    """The vectors of all tokens, media in their places, and what the decoder is told of them."""
    if batch.frames is not None:
        raise InputError("This model has no encoder for sound; leave audio out of the documents.")
    see = {"order": batch.order, "lo": batch.lo, "hi": batch.hi, "position": batch.position}
    if (rope := cfg.decoder.blocks.rope) is not None and rope.needs_length:
        see["length"] = positions.lengths(batch.document, batch.position)
    with jax.named_scope("decoder"):
        x = module(cfg.decoder).embed(params["decoder"], batch.tokens, cfg.decoder)
    if cfg.decoder.cross is not None:
        see |= {"media_lo": batch.media_lo, "media_hi": batch.media_hi}
    if not cfg.sees and (known is not None or batch.patches.shape[1]):
        raise InputError("This model reads text alone; make batches without pictures.")
    if known is None and batch.patches.shape[1] == 0:
        return _marked(params, x, batch, cfg), see  # rows of text alone, or whose media were read before
    found = media(params, batch, cfg) if known is None else known
    if cfg.decoder.cross is not None:
        see["media"] = (found.tokens, _labels(batch, cfg, found.tokens.shape[1]))
    else:
        at = _mixed(found.tokens, batch)
        at = at * jnp.asarray(cfg.decoder.embed_scale, at.dtype) if cfg.scaled else at
        x = jnp.where((batch.slot >= 0)[:, :, None], at.astype(x.dtype), x)
        if cfg.newline:
            ends = (batch.slot < 0) & ((batch.modality == IMAGE) | (batch.modality == VIDEO))
            x = jnp.where(ends[:, :, None], params["newline"].astype(x.dtype)[None, None], x)
    if cfg.deep is not None:
        # Zeros where there is no media token.
        see["added"] = sharding.take_rows(found.deep.transpose(1, 2, 0, 3), batch.slot)
    return _marked(params, x, batch, cfg), see


def _labels(batch: Batch, cfg: Config, count: int) -> Int[Array, "b m"]:
    """Labels of the row's media tokens that text looks at by cross-attention, -1 where there is none."""
    if cfg.vision.canvas:
        return tiled.labels(batch.grid, _firsts(batch, cfg.connector.per_picture), cfg.vision)
    exists = present(batch, cfg)
    exists = batch.patch_order >= 0 if exists is None else exists
    return jnp.where(exists, jnp.arange(count, dtype=jnp.int32)[None], -1)


def _firsts(batch: Batch, per_picture: int) -> Int[Array, "b n"]:
    """The first picture of each picture's document: a document's first token looks at it, or sees all from it on."""
    document, lo, hi = sharding.unsplit((batch.document, batch.media_lo, batch.media_hi))
    begins = (document >= 0) & (document != jnp.pad(document, ((0, 0), (1, 0)), constant_values=-1)[:, :-1])
    first = jnp.where(begins, jnp.where(lo <= hi, lo, hi + 1) // per_picture, 0)[:, None]
    number = jnp.arange(batch.grid.shape[1], dtype=jnp.int32)[None, :, None]
    return jnp.where(first <= number, first, 0).max(-1)


def _mixed(tokens: Float[Array, "b m d"], batch: Batch) -> Float[Array, "b l d"]:
    """The media token at every place, or the mix of four that stands there; zeros where there is none."""
    at = sharding.take_rows(tokens, batch.slot)
    if batch.mix_slot is None:
        return at
    share = batch.mix_share.astype(tokens.dtype)
    parts = [at, *(sharding.take_rows(tokens, batch.mix_slot[:, :, n]) for n in range(3))]
    return sum(part * share[:, :, n : n + 1] for n, part in enumerate(parts))


def _marked(params: dict, x: Float[Array, "b l d"], batch: Batch, cfg: Config) -> Float[Array, "b l d"]:
    """Tokens with the vector of their modality added, where the model has such."""
    if not cfg.segments:
        return x
    return x + sharding.take(params["segments"], batch.modality.astype(jnp.int32), ("batch", "length", None)).astype(
        x.dtype
    )


def logits(params: dict, batch: Batch, cfg: Config) -> jax.Array:
    """f32[B, L, V]: what comes after each token; of an encoder–decoder f32[B, T, V], of those of the second stream."""
    return module(cfg.decoder).logits(params["decoder"], hidden(params, batch, cfg), cfg.decoder)
