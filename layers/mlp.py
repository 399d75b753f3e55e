"""The dense feed-forward layer: down(silu(gate(x)) * up(x))."""

from functools import partial

from mindspore import ops

from layers import linear, lora
from ops.registry import pick
from parallel.spec import ParamSpec, normal

ADAPTED = {"gate": "w_gate", "up": "w_up", "down": "w_down"}
cast = ops.Cast()


def specs(cfg):
    D, F, init = cfg.hidden_size, cfg.ffn_size, normal(cfg.initializer_range)
    p = {
        "w_gate": ParamSpec((D, F), ("embed", "ffn"), init),
        "w_up": ParamSpec((D, F), ("embed", "ffn"), init),
        "w_down": ParamSpec((F, D), ("ffn", "embed"), init),
    }
    return lora.specs(cfg, p, ADAPTED)


def build(cfg, sharding, kernels):
    """mlp(p, x_RD) -> y_RD"""
    inner, down = linear.columns(sharding, kernels, "ffn", "ffn"), linear.row(sharding, kernels, "ffn")
    act = sharding.op(pick(kernels, "swiglu")(), "tokens ffn", kind="elementwise")

    beside, D = partial(lora.beside, cfg, sharding, kernels), cfg.hidden_size
    more_gate, more_up = beside("gate", "w_gate", D, into="ffn"), beside("up", "w_up", D, into="ffn")
    more_down = beside("down", "w_down", cfg.ffn_size, inner="ffn")

    def mlp(p, x):
        gate, up = inner(x, p["w_gate"], p["w_up"])
        h = act(more_gate(p, x, gate), more_up(p, x, up))
        return more_down(p, h, down(h, p["w_down"]))

    return mlp


def build_decode(cfg, kernels):
    """decode(norm_D, p, x_BD) -> x + mlp(norm(x)), as one op on one device: for one token a row."""
    op = pick(kernels, "decode_mlp")(cfg.rms_norm_eps)

    def decode(norm, p, x):
        return op(x, cast(norm, x.dtype), cast(p["w_gate"], x.dtype), cast(p["w_up"], x.dtype), cast(p["w_down"], x.dtype))

    return decode
