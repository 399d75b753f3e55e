"""The update rules of Lion and of SGD with momentum for one array, in MindSpore's own ops, with decoupled weight decay.

AdamW is in ops/adamw.py, Muon in muon.py. Sources: Chen et al. 2023 (Lion); torch.optim.SGD, except for the decay.
"""

import mindspore as ms
from mindspore import ops
from mindspore.ops.auto_generate import InplaceCopy

from experiments.train import muon

# The optimizer's arrays, by optim.name. Muon's v is for the parameters that AdamW trains; it stays 0 for matrices
MOMENTS = {"adamw": ("m", "v"), "muon": ("m", "v"), "lion": ("m",), "sgd": ("m",)}


def lion(optim, decay):
    """Returns new(values, scale, p, g, m) -> (p, m): p moves by lr against the sign of b1 m + (1 - b1) g.

    values: float32 [lr, ...], see optim.scalars. scale: the factor of the gradient g.
    """
    b1, b2, sign = optim.b1, optim.b2, ops.Sign()

    def new(values, scale, p, g, m):
        g = g * scale
        return p * (1 - values[0] * decay) - values[0] * sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g

    return new


def sgd(optim, decay):
    """Returns new(values, scale, p, g, m) -> (p, m), as in lion(): m = b1 m + g, and p moves by -lr m."""
    b1 = optim.b1

    def new(values, scale, p, g, m):
        m = b1 * m + g * scale
        return p * (1 - values[0] * decay) - values[0] * m, m

    return new


RULES = {"lion": lion, "sgd": sgd}


def build(new, skips, in_place):
    """Returns update(values, scale, keep, p, g, m) -> (p, m) by a rule `new`, see lion(); all float32.

    skips: nothing changes unless keep is above 0. in_place: p and m, which must be in device memory, are overwritten and returned.
    """
    select, cast, copy = ops.Select(), ops.Cast(), InplaceCopy() if in_place else None

    def update(values, scale, keep, p, g, m):
        return new(values, scale, p, cast(g, ms.float32), m)

    def update_or_skip(values, scale, keep, p, g, m):
        new_p, new_m = new(values, scale, p, cast(g, ms.float32), m)
        keeps = ops.BroadcastTo(p.shape)(keep > 0)
        return select(keeps, new_p, p), select(keeps, new_m, m)

    chosen = update_or_skip if skips else update

    def update_in_place(values, scale, keep, p, g, m):
        new_p, new_m = chosen(values, scale, keep, p, g, m)
        return ops.depend(p, copy(p, new_p)), ops.depend(m, copy(m, new_m))

    return update_in_place if in_place else chosen


def momentum(optim, spec):
    """(decay, gain) of a parameter's first moment, m' = decay m + gain g, from which a monitor computes the gradient g."""
    if optim.name == "muon" and muon.is_matrix(spec):
        return optim.muon_momentum, 1.0
    adamw = optim.b1, 1 - optim.b1
    return {"adamw": adamw, "muon": adamw, "lion": (optim.b2, 1 - optim.b2), "sgd": (optim.b1, 1.0)}[optim.name]
