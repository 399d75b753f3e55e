"""A layer's norms and residual sums: where they are, before its parts, behind them, or both.

pre: x + f(norm(x)), as in Qwen3; post: x + norm(f(x)), the norm on what is added, as in OLMo 2; both: x + norm(f(norm(x))), as in Gemma 2.
"""

from types import SimpleNamespace

from layers import linear, norm

BEFORE, AFTER = ("pre", "both"), ("post", "both")
ATTENTION, FFN = ("attention_norm", "attention_out_norm"), ("mlp_norm", "mlp_out_norm")  # before and behind each part


def specs(cfg, attention, ffn):
    """The tree of a layer's specs: its norms, {"attention": attention}, and ffn, a dict of one part."""
    return {**_around(cfg, ATTENTION, {"attention": attention}), **_around(cfg, FFN, ffn)}


def _around(cfg, names, part):
    before = {names[0]: norm.specs(cfg)} if cfg.norm_placement in BEFORE else {}
    return {**before, **part, **({names[1]: norm.specs(cfg)} if cfg.norm_placement in AFTER else {})}


def attention_part(cfg):
    """f(p) -> what of a layer's tree attention and the norm before it have, of specs or of arrays."""

    def with_norm(p):
        return {"attention_norm": p["attention_norm"], "attention": p["attention"]}

    def alone(p):
        return {"attention": p["attention"]}

    return with_norm if cfg.norm_placement in BEFORE else alone


def build(cfg, sharding, kernels):
    """enter(p, x) -> what attention takes; between(p, x, y) -> (x with attention's y, what the feed-forward part takes of it);
    leave(p, x, y) -> x with that part's y; and rms, of layers/norm.py. p: a layer's parameters; all of x and y are [R, D]."""
    rms, add_rms = norm.build(cfg, sharding, kernels)
    add = linear.residual(sharding)

    def enter(p, x):
        return rms(p["attention_norm"], x)

    def between(p, x, y):
        return add_rms(p["mlp_norm"], x, y)

    def leave(p, x, y):
        return add(x, y)

    def enter_post(p, x):
        return x

    def between_post(p, x, y):
        x = add(x, rms(p["attention_out_norm"], y))
        return x, x

    def between_both(p, x, y):
        return add_rms(p["mlp_norm"], x, rms(p["attention_out_norm"], y))

    def leave_normed(p, x, y):
        return add(x, rms(p["mlp_out_norm"], y))

    found = {
        "pre": (enter, between, leave),
        "post": (enter_post, between_post, leave_normed),
        "both": (enter, between_both, leave_normed),
    }
    return SimpleNamespace(rms=rms, **dict(zip(("enter", "between", "leave"), found[cfg.norm_placement])))
