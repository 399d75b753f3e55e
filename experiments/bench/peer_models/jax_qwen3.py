"""Qwen3 and Qwen3-MoE in JAX as a contestant of experiments.bench: one jitted training step on float32, its state donated.

Run by experiments/bench/peers.py, in a process of its own, as a script; nothing imports this. Dims: B batch, S length, R = B * S rows, D
model, N heads, K kv heads, H head dim, F ffn, E experts, V vocab. Source of the model: HF modeling_qwen3 and modeling_qwen3_moe.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
from experiments.bench.turns import serve, timed, warmed_up  # noqa: E402

BLOCK = 256  # rows in a block of one expert


def rms_norm(w, x, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * w


def rotate(x, cos, sin):
    """x_BSNH, cos and sin [S, 1, H / 2]"""
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(model, p, x, cos, sin):
    """x_BSD; causal: a row is one document."""
    B, S, _ = x.shape
    q, k, v = ((x @ p[name]).reshape(B, S, -1, model["head_dim"]) for name in ("wq", "wk", "wv"))
    eps = model["rms_norm_eps"]
    q, k = rotate(rms_norm(p["q_norm"], q, eps), cos, sin), rotate(rms_norm(p["k_norm"], k, eps), cos, sin)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(B, S, -1) @ p["wo"]


def swiglu(p, x):
    return (jax.nn.silu(x @ p["w_gate"]) * (x @ p["w_up"])) @ p["w_down"]


def experts(model, p, x):
    """x_RD -> y_RD, router statistics [2, E]: the load and the mean probability of each expert.

    Assignments are sorted by expert, and each expert's padded to whole blocks. The blocks' weights come from a product with a one-hot
    matrix, and so do their gradients: a scatter would run on one core.
    """
    E, k = model["num_experts"], model["experts_per_token"]
    probs = jax.nn.softmax(x @ p["router"], -1)
    weight, expert = jax.lax.top_k(probs, k)
    weight = weight / weight.sum(-1, keepdims=True)
    flat = expert.reshape(-1)
    blocks_in_all = flat.size // BLOCK + min(E, flat.size)
    hit = jax.nn.one_hot(flat, E, dtype=jnp.int32)
    load = hit.sum(0)
    last = jnp.cumsum(-(-load // BLOCK))
    first = last - -(-load // BLOCK)
    place = (jnp.cumsum(hit, 0) - 1)[jnp.arange(flat.size), flat]  # among the assignments to its expert
    slot = first[flat] * BLOCK + place
    source = jnp.full(blocks_in_all * BLOCK, len(x)).at[slot].set(jnp.arange(flat.size) // k)
    group = (jnp.arange(blocks_in_all)[:, None] >= last).sum(1)  # E, whose one-hot row is 0, for the blocks that nothing is in
    chosen = jax.nn.one_hot(group, E)
    rows = jnp.concatenate([x, jnp.zeros_like(x[:1])])[source].reshape(blocks_in_all, BLOCK, -1)
    y = swiglu({name: jnp.einsum("ne,eio->nio", chosen, p[name]) for name in ("w_gate", "w_up", "w_down")}, rows)
    y = (y.reshape(blocks_in_all * BLOCK, -1)[slot].reshape(len(x), k, -1) * weight[..., None]).sum(1)
    return y, jnp.stack([load / len(x), probs.mean(0)])


def objective(model, params, batch):
    """(cross-entropy + router loss, cross-entropy)"""
    B, S = batch["tokens"].shape
    half = model["head_dim"] // 2
    angles = jnp.arange(S)[:, None] * model["rope_theta"] ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    x, eps, statistics = params["embed"][batch["tokens"]], model["rms_norm_eps"], []
    for p in params["layers"]:
        x = x + attention(model, p["attention"], rms_norm(p["attention_norm"], x, eps), cos, sin)
        normed = rms_norm(p["mlp_norm"], x, eps)
        if "moe" in p:
            y, stats = experts(model, p["moe"], normed.reshape(B * S, -1))
            statistics.append(stats)
            x = x + y.reshape(x.shape)
        else:
            x = x + swiglu(p["mlp"], normed)
    logits = rms_norm(params["final_norm"], x, eps) @ params["embed"].T
    nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    loss = (nats * batch["loss_weights"]).sum() / batch["loss_weights"].sum()
    if not statistics:
        return loss, loss
    load, probability = jnp.stack(statistics).mean(0)
    return loss + model["router_aux_coef"] * model["num_experts"] * (load * probability).sum(), loss


def adamw(optim, at, params, grads, m, v):
    """The order of operations is torch.optim.AdamW's; gradients are clipped by their global norm."""
    b1, b2, lr = optim["b1"], optim["b2"], optim["lr"]
    norm = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(grads)))
    scale = jnp.minimum(optim["clip_norm"] / (norm + 1e-6), 1.0)
    m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * scale * g, m, grads)
    v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(scale * g), v, grads)

    def update(p, m, v):
        decay = optim["weight_decay"] if p.ndim > 1 else 0.0
        return p * (1 - lr * decay) - lr * (m / (1 - b1**at)) / (jnp.sqrt(v / (1 - b2**at)) + optim["eps"])

    return jax.tree.map(update, params, m, v), m, v


def tree(flat):
    """{"layers.0.mlp.w_up": array} -> nested dicts and a list of layers."""
    root = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        at = root
        for key in parents:
            at = at.setdefault(key, {})
        at[name] = jnp.asarray(value)
    return {**root, "layers": [root["layers"][str(i)] for i in range(len(root["layers"]))]}


def train(job):
    """A step is forward, backward, clipping and AdamW on one batch, of one document a row."""
    folder, model, optim = Path(job["folder"]), job["model"], job["optim"]
    batch = {name: jnp.asarray(value) for name, value in np.load(folder / "documents.npz").items()}
    params = tree(np.load(folder / "params.npz"))
    state = [params, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params), jnp.float32(0)]

    @partial(jax.jit, donate_argnums=(0, 1, 2, 3))
    def run(params, m, v, at, batch):
        (_, loss), grads = jax.value_and_grad(partial(objective, model), has_aux=True)(params, batch)
        return *adamw(optim, at + 1, params, grads, m, v), at + 1, loss

    def step():
        *state[:], loss = run(*state, batch)
        jax.block_until_ready(state)
        return float(loss)

    facts = warmed_up(step, job["warmup_steps"])
    return facts, lambda: {"step_time_s": timed(step)[0]}


if __name__ == "__main__":
    serve({"train": train})
