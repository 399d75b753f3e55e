"""RMS norm of the residual stream."""

from mindspore import ops

from ops.registry import pick
from parallel.spec import ParamSpec, ones

cast = ops.Cast()


def specs(cfg):
    return ParamSpec((cfg.hidden_size,), ("embed",), ones())


def build(cfg, sharding, kernels):
    """norm(w_D, x_RD) -> x_RD; add_norm(w_D, x_RD, y_RD) -> x + y, norm(w, x + y)."""
    norm, add_norm = pick(kernels, "rms_norm")(cfg.rms_norm_eps), pick(kernels, "rms_norm", "add")(cfg.rms_norm_eps)
    norm = sharding.op(norm, "rows embed, embed -> rows embed", kind="kernel", call=_norm)
    dims = "rows embed, rows embed, embed -> rows embed, rows embed"
    add_norm = sharding.op(add_norm, dims, kind="kernel", call=_add_norm)

    def rms(w, x):
        return norm(x, w)

    def add_rms(w, x, y):
        return add_norm(x, y, w)

    return rms, add_rms


def _norm(norm, x, w):
    return norm(x, cast(w, x.dtype))


def _add_norm(norm, x, y, w):
    return norm(x, y, cast(w, x.dtype))
