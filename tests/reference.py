"""A model in plain numpy, float64, one head and one token after another: what the tests of the model's parts are judged by."""

import numpy as np

from parallel.trees import tree_map
from tests.tiny import host


def rms(w, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def turned(x, positions, theta):
    """Rotary embedding of x [S, H]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([x[:, :half] * cos - x[:, half:] * sin, x[:, half:] * cos + x[:, :half] * sin], 1)


def attention(cfg, p, x, positions, segments):
    """(y [S, D], the largest scaled logit of a real token) of a row x."""
    S, H, group = len(x), cfg.head_dim, cfg.num_heads // cfg.num_kv_heads
    sees = (segments[:, None] == segments) & (np.arange(S)[:, None] >= np.arange(S))
    q, k, v = (x @ p[w] for w in ("wq", "wk", "wv"))
    out, top = [], -np.inf
    for n in range(cfg.num_heads):
        own, kv = slice(n * H, (n + 1) * H), slice(n // group * H, (n // group + 1) * H)
        q_n, k_n = rms(p["q_norm"], q[:, own], cfg.rms_norm_eps), rms(p["k_norm"], k[:, kv], cfg.rms_norm_eps)
        z = turned(q_n, positions, cfg.rope_theta) @ turned(k_n, positions, cfg.rope_theta).T / np.sqrt(H)
        top = max(top, z[sees & (segments[:, None] > 0)].max(initial=-np.inf))
        out.append(softmax(np.where(sees, z, -np.inf)) @ v[:, kv])
    return np.concatenate(out, 1) @ p["wo"], top


def gated(x, gate, up, down):
    z = x @ gate
    return (z / (1 + np.exp(-z)) * (x @ up)) @ down


def ffn(cfg, p, x):
    """(y [S, D], the router's probabilities [S, E] or None) of a row x."""
    if "mlp" in p:
        return gated(x, *(p["mlp"][w] for w in ("w_gate", "w_up", "w_down"))), None
    p, y = p["moe"], np.zeros(x.shape)
    probs = softmax(x @ p["router"])
    for t, row in enumerate(probs):
        best = np.argsort(-row, kind="stable")[: cfg.experts_per_token]
        for e in best:
            share = row[e] / (row[best].sum() if cfg.norm_topk_prob else 1)
            y[t] += share * gated(x[t], p["w_gate"][e], p["w_up"][e], p["w_down"][e])
    return y, probs


def layers(cfg, params, tokens, positions, segments):
    """For each layer (x [S, D], the largest logit, the router's probabilities or None), and the logits [S, V], of a row. The norms are
    where the parameters say."""
    params = tree_map(lambda w: host(w).astype(np.float64), params)
    x, found = params["embed"][tokens], []

    def normed(p, name, x):
        return rms(p[name], x, cfg.rms_norm_eps) if name in p else x

    for p in params["layers"]:
        y, top = attention(cfg, p["attention"], normed(p, "attention_norm", x), positions, segments)
        x = x + normed(p, "attention_out_norm", y)
        y, probs = ffn(cfg, p, normed(p, "mlp_norm", x))
        x = x + normed(p, "mlp_out_norm", y)
        found.append((x, top, probs))
    return found, normed(params, "final_norm", x) @ params.get("lm_head", params["embed"]).T
