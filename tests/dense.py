"""Attention straight down, with a dense mask, in float64: what the interval form is compared with."""

import numpy as np


def seen(order, lo, hi):
    """The mask [B, L, S] of intervals."""
    order, lo, hi = (np.asarray(x) for x in (order, lo, hi))
    return (lo[:, :, None] <= order[:, None, :]) & (order[:, None, :] <= hi[:, :, None])


def attention(q, k, v, mask, *, key_bias=None, bias=None, softcap=None, sinks=None, d_out=None, d_lse=None):
    """(out, lse, softmax weights [B, H, L, S], gradients by name for the cotangents d_out and d_lse).

    Softmax's derivative written out: d score = p (d p − Σ p d p + d lse).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    kk, vv = np.repeat(k, group, 2), np.repeat(v, group, 2)
    raw = np.einsum("blhe,bshe->bhls", q, kk) / np.sqrt(q.shape[-1])
    slope = 1.0
    score = raw
    if softcap is not None:
        slope = 1 - np.tanh(raw / softcap) ** 2
        score = softcap * np.tanh(raw / softcap)
    if bias is not None:
        score = score + np.asarray(bias, np.float64)
    if key_bias is not None:
        score = score + np.asarray(key_bias, np.float64)[:, None, None, :]
    score = np.where(mask[:, None], score, -np.inf)
    sink = np.full(q.shape[2], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    top = np.maximum(np.maximum(score.max(-1), sink[None, :, None]), -1e300)
    of_sink = np.exp(sink[None, :, None] - top)
    weight = np.exp(score - top[..., None])
    total = weight.sum(-1) + of_sink
    safe = np.where(total > 0, total, 1)
    p, of_sink = weight / safe[..., None], of_sink / safe
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    out = np.einsum("bhls,bshe->blhe", p, vv)
    lse = lse.transpose(0, 2, 1)
    if d_out is None:
        return out, lse, p, None
    d_out, d_lse = np.asarray(d_out, np.float64), np.where(np.isfinite(lse), d_lse, 0).transpose(0, 2, 1)
    d_p = np.einsum("blhe,bshe->bhls", d_out, vv)
    mean = (p * d_p).sum(-1)
    d_score = p * (d_p - mean[..., None] + d_lse[..., None])
    d_raw = d_score * slope / np.sqrt(q.shape[-1])
    b, s, kv, _ = k.shape
    grads = {
        "q": np.einsum("bhls,bshe->blhe", d_raw, kk),
        "k": np.einsum("bhls,blhe->bshe", d_raw, q).reshape(b, s, kv, group, -1).sum(3),
        "v": np.einsum("bhls,blhe->bshe", p, d_out).reshape(b, s, kv, group, -1).sum(3),
        "key_bias": d_score.sum((1, 2)),
        "bias": d_score,
        "sinks": (of_sink * (d_lse - mean)).sum((0, 2)),
    }
    return out, lse, p, grads
