"""The dense feed-forward layer: down(silu(gate(x)) * up(x)). Dims: R rows, D model, F ffn."""

from mindspore import ops

from layers import lora
from layers.lora import adapted
from ops.int8 import is_int8
from parallel.specs import ParamSpec, normal

cast = ops.Cast()
ADAPTED = {"gate": "w_gate", "up": "w_up", "down": "w_down"}


def specs(cfg):
    D, F, init = cfg.hidden_size, cfg.ffn_size, normal(cfg.initializer_range)
    p = {
        "w_gate": ParamSpec((D, F), ("embed", "ffn"), init),
        "w_up": ParamSpec((D, F), ("embed", "ffn"), init),
        "w_down": ParamSpec((F, D), ("ffn", "embed"), init),
    }
    return lora.specs(cfg, p, ADAPTED)


def mlp(cfg, op, p, x, rows):
    """x_RD -> y_RD"""
    gate, up = op.matmuls(x, (p["w_gate"], p["w_up"]), ("rows>tokens embed", "embed ffn -> tokens ffn", "embed ffn -> tokens ffn"))
    gate, up = adapted(cfg, op, p, "w_gate", x, gate, rows), adapted(cfg, op, p, "w_up", x, up, rows)
    h = op.glu(gate, up, "tokens ffn")
    y = op.matmul(h, p["w_down"], "tokens ffn, ffn embed -> tokens>rows embed")
    return adapted(cfg, op, p, "w_down", h, y, rows)


def decode(op, norm, p, x):
    """x_BD -> x + mlp(norm(x)). One fused op, for one token per row on one device. norm: the weights [D] of the norm."""
    norm, gate, up, down = cast(norm, x.dtype), p["w_gate"], p["w_up"], p["w_down"]
    if is_int8(gate):
        return op.decode_mlp_int8(x, norm, gate["int8"], up["int8"], down["int8"], gate["scale"], up["scale"], down["scale"])
    return op.decode_mlp(x, norm, cast(gate, x.dtype), cast(up, x.dtype), cast(down, x.dtype))
