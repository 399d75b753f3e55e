"""The dense feed-forward layer: down(silu(gate(x)) * up(x))."""

from layers import linear
from ops.registry import pick
from parallel.spec import ParamSpec, normal


def specs(cfg):
    D, F, init = cfg.hidden_size, cfg.ffn_size, normal(cfg.initializer_range)
    return {
        "w_gate": ParamSpec((D, F), ("embed", "ffn"), init),
        "w_up": ParamSpec((D, F), ("embed", "ffn"), init),
        "w_down": ParamSpec((F, D), ("ffn", "embed"), init),
    }


def build(cfg, sharding, kernels):
    """mlp(p, x_RD) -> y_RD"""
    inner, down = linear.columns(sharding, kernels, "ffn", "ffn"), linear.row(sharding, kernels, "ffn")
    act = sharding.op(pick(kernels, "swiglu")(), "tokens ffn", kind="elementwise")

    def mlp(p, x):
        gate, up = inner(x, p["w_gate"], p["w_up"])
        return down(act(gate, up), p["w_down"])

    return mlp
