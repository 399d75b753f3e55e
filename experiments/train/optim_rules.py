"""The update rules of Lion and of SGD with momentum for one array, in MindSpore's own ops, with decoupled weight decay.

AdamW is in ops/adamw.py, Muon in muon.py. Sources: Chen et al. 2023 (Lion); torch.optim.SGD, except for the decay.
"""

import mindspore as ms
from mindspore import ops
from mindspore.ops.auto_generate import InplaceCopy

from experiments.train import muon
from ops.adamw import rate

# The optimizer's arrays, by optim.name. Muon's v is for the parameters that AdamW trains; it stays 0 for matrices
MOMENTS = {"adamw": ("m", "v"), "muon": ("m", "v"), "lion": ("m",), "sgd": ("m",)}


def lion(optim, decay):
    """Returns new(values, scale, p, g, m) -> (p, m): p moves by lr against the sign of b1 m + (1 - b1) g.

    values: float32 [lr, ...], see optim.scalars, or a row of them a layer. scale: the factor of the gradient g.
    """
    b1, b2, sign = optim.b1, optim.b2, ops.Sign()

    def new(values, scale, p, g, m):
        g, lr = g * scale, rate(values, p)
        return p * (1 - lr * decay) - lr * sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g

    return new


def sgd(optim, decay):
    """Returns new(values, scale, p, g, m) -> (p, m), as in lion(): m = b1 m + g, and p moves by -lr m."""
    b1 = optim.b1

    def new(values, scale, p, g, m):
        m, lr = b1 * m + g * scale, rate(values, p)
        return p * (1 - lr * decay) - lr * m, m

    return new


RULES = {"lion": lion, "sgd": sgd}


def build(new, skips, in_place):
    """Returns update(values, scale, keep, p, g, m) -> (p, m) by a rule `new`, see lion(); all float32.

    skips: nothing changes unless keep is above 0. in_place: p and m, which must be in device memory, are overwritten and returned.
    """
    keep_or_take, cast = taken(skips, in_place), ops.Cast()

    def update(values, scale, keep, p, g, m):
        new_p, new_m = new(values, scale, p, cast(g, ms.float32), m)
        return keep_or_take(keep, p, m, new_p, new_m)

    return update


def taken(skips, in_place):
    """Returns f(keep, p, m, new p, new m) -> (p, m). skips, in_place: as for build()."""
    select, copy = ops.Select(), InplaceCopy() if in_place else None

    def take(keep, p, m, new_p, new_m):
        if skips:
            keeps = ops.BroadcastTo(p.shape)(keep > 0)
            new_p, new_m = select(keeps, new_p, p), select(keeps, new_m, m)
        if in_place:
            return ops.depend(p, copy(p, new_p)), ops.depend(m, copy(m, new_m))
        return new_p, new_m

    return take


def momentum(optim, spec):
    """(decay, gain) of a parameter's first moment, m' = decay m + gain g, from which a monitor computes the gradient g."""
    if optim.name == "muon" and muon.is_matrix(spec):
        return optim.muon_momentum, 1.0
    adamw = optim.b1, 1 - optim.b1
    return {"adamw": adamw, "muon": adamw, "lion": (optim.b2, 1 - optim.b2), "sgd": (optim.b1, 1.0)}[optim.name]
