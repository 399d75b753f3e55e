"""What Lion and SGD with momentum do to one array, elementwise as AdamW (ops/adamw.py), in MindSpore's own ops. Decay is decoupled. Muon is
muon.py.

Sources: Chen et al. 2023 (Lion); torch.optim.SGD, but for the decay.
"""

import mindspore as ms
from mindspore import ops
from mindspore.ops.auto_generate import InplaceCopy

from experiments.train import muon

# Of the state, by optim.name. Muon's v is used where AdamW trains, and stays 0 for matrices
MOMENTS = {"adamw": ("m", "v"), "muon": ("m", "v"), "lion": ("m",), "sgd": ("m",)}


def lion(optim, decay):
    """new(values, scale, p, g, m) -> p, m: p moves by lr against the sign of a mean of m and the gradient. values: float32 [lr, ...];
    scale: of the gradient g."""
    b1, b2, sign = optim.b1, optim.b2, ops.Sign()

    def new(values, scale, p, g, m):
        g = g * scale
        return p * (1 - values[0] * decay) - values[0] * sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g

    return new


def sgd(optim, decay):
    """new(values, scale, p, g, m) -> p, m, as of lion(): m sums the gradients, older ones times b1, and p moves by lr times that."""
    b1 = optim.b1

    def new(values, scale, p, g, m):
        m = b1 * m + g * scale
        return p * (1 - values[0] * decay) - values[0] * m, m

    return new


RULES = {"lion": lion, "sgd": sgd}


def build(new, skips, in_place):
    """update(values, scale, keep, p, g, m) -> p, m by a rule, as lion() gives one; all float32. skips: whether nothing changes where keep
    is not above 0. in_place: p and m themselves are changed and returned, which have to be in the device's memory."""
    select, cast, copy = ops.Select(), ops.Cast(), InplaceCopy() if in_place else None

    def update(values, scale, keep, p, g, m):
        return new(values, scale, p, cast(g, ms.float32), m)

    def update_or_skip(values, scale, keep, p, g, m):
        new_p, new_m = new(values, scale, p, cast(g, ms.float32), m)
        same = ops.BroadcastTo(p.shape)(keep > 0)
        return select(same, new_p, p), select(same, new_m, m)

    chosen = update_or_skip if skips else update

    def update_in_place(values, scale, keep, p, g, m):
        new_p, new_m = chosen(values, scale, keep, p, g, m)
        return ops.depend(p, copy(p, new_p)), ops.depend(m, copy(m, new_m))

    return update_in_place if in_place else chosen


def momentum(optim, spec):
    """(decay, gain) of the first moment of a parameter: m' = decay m + gain g, of which the gradient is found again."""
    if optim.name == "muon" and muon.is_matrix(spec):
        return optim.muon_momentum, 1.0
    adamw = optim.b1, 1 - optim.b1
    return {"adamw": adamw, "muon": adamw, "lion": (optim.b2, 1 - optim.b2), "sgd": (optim.b1, 1.0)}[optim.name]
