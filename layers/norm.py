"""RMS norm of the residual stream."""

from ops import rms_norm
from parallel.spec import ParamSpec, ones


def specs(cfg):
    return ParamSpec((cfg.hidden_size,), ("embed",), ones())


def build(cfg, sharding):
    """norm(w_D, x_RD) -> x_RD"""
    norm = sharding.op(rms_norm.reference(cfg.rms_norm_eps), "rows embed, embed -> rows embed", kind="kernel")

    def rms(w, x):
        return norm(x, w)

    return rms
