"""Optimizers on nested tuples of arrays, clipping by the global gradient norm, skipping of spikes, and learning-rate schedules.

AdamW is in ops/adamw.py, Lion and SGD in optim_rules.py, Muon in muon.py.
"""

import math
from functools import partial

import mindspore as ms
import numpy as np
from mindspore import ops

from experiments.train import lr_groups, muon, optim_rules
from experiments.train.optim_rules import MOMENTS
from ops.identity import identity
from ops.registry import pick
from parallel.graph.jit import in_device_memory
from parallel.graph.nested import to_tuple
from parallel.trees import tree_leaves, tree_map

NO_DECAY, SIGN, MUON = 0.0, -1.0, -2.0  # kinds of leaves; any value above 0 is a weight decay
NORM_MEMORY = 0.95  # decay of the running mean of gradient norms
SCALARS = 4  # elements of scalars(), of which the first is the learning rate
SPIKE_WARMUP_STEPS = 20  # no update is skipped before the running mean has seen this many


def learning_rate(optim, steps):
    """Returns f(step, from 0) -> learning rate, for a run of `steps` steps. optim: the config's section."""
    shapes = {"constant": _constant, "linear": _linear, "cosine": _cosine, "wsd": _wsd}
    shape, low = shapes[optim.schedule], optim.min_lr_ratio
    warmup = math.ceil(optim.warmup_ratio * steps) if optim.warmup_ratio else optim.warmup_steps

    def rate(step):
        if step < warmup:
            return optim.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return optim.lr * (low + (1 - low) * shape(min(done, 1.0), optim))

    return rate


def _constant(done, optim):
    return 1.0


def _linear(done, optim):
    return 1.0 - done


def _cosine(done, optim):
    return 0.5 * (1 + math.cos(math.pi * done))


def _wsd(done, optim):
    """Warmup-stable-decay: constant until the last decay_fraction of the steps, then linear."""
    return min(1.0, (1.0 - done) / optim.decay_fraction) if optim.decay_fraction else 1.0


def state_kinds(optim):
    """{kind of array that a checkpoint has: the field of Placed that gives its sharding}, such as {"params": "stored", "m": "state"}."""
    return {"params": "stored", **dict.fromkeys(MOMENTS[optim.name], "state")}


def init_state(params, optim):
    """The initial optimizer state for nested tuples of tensors: moments of zeros, see MOMENTS, and norm, the running mean of norms."""
    return {**{kind: zeros_like(params) for kind in MOMENTS[optim.name]}, "norm": ms.Tensor(0.0, ms.float32)}


def changes_in_place(kernels):
    """Whether the optimizer updates arrays in device memory in place. The other arrays of a step are then updated in place too."""
    return kernels.adamw == "vendor"


def resident(kernels):
    """Returns f(tree of tensors) that moves the tree to device memory if the optimizer works in place there, else the identity."""
    return in_device_memory if changes_in_place(kernels) else identity


def zeros_like(params):
    """A tree of float32 zeros with the shapes of `params`."""
    return tree_map(lambda w: ms.Tensor.from_numpy(np.zeros(w.shape, np.float32)), params)


def scalars(optim, lr, step):
    """float32 [4]: lr, the two bias corrections of Adam, and 1 if spikes may be skipped. A tensor, so that no step compiles again."""
    corrections = 1 - optim.b1 ** (step + 1), 1 - optim.b2 ** (step + 1)
    return ms.Tensor(np.array([lr, *corrections, step >= SPIKE_WARMUP_STEPS], np.float32))


def own_rates(optim, placed):
    """Returns nested tuples of tensors by which the leaves of a tree of Placed multiply the scalars of a step, for optim.lr_groups and muP:
    float32 [4], or [L, 4] for a leaf whose L stacked layers differ. None if all factors are 1."""
    groups = lr_groups.parse(optim.lr_groups)
    if all(own_factors(optim, groups, p) == (1.0,) for p in tree_leaves(placed)):
        return None
    return to_tuple(tree_map(lambda p: _own_rate(own_factors(optim, groups, p)), placed))


def own_factors(optim, groups, placed):
    """Returns the tuple of lr_groups.factors times the factor of the parameter's spec. groups: of lr_groups.parse()."""
    return tuple(factor * rate_of_spec(optim, placed.spec) for factor in lr_groups.factors(groups, placed))


def rate_of_spec(optim, spec):
    """Returns the factor of the learning rate that spec.lr gives under this optimizer.

    A step of AdamW or Lion changes each element of a matrix by about lr. Its spectral norm, which bounds the change of the output, then
    grows with the width n, so muP has the factor base / n. A step of Muon has the spectral norm lr * 0.2 * sqrt(n), so its factor for a
    matrix that grows in both dims is sqrt(base / n). The router has one fixed dim, and its factor is base / n here too."""
    if optim.name == "muon" and muon.is_matrix(spec) and "router" not in spec.dims:
        return spec.lr**0.5
    return spec.lr


def _own_rate(factors):
    rows = np.ones((len(factors), SCALARS), np.float32)
    rows[:, 0] = factors
    return ms.Tensor(rows if len(factors) > 1 else rows[0])


def build_clip(specs, optim, kernels, norm_squared=None):
    """Returns clip(flat gradients, running mean, scalars, after) -> (norm, factor, keep, running mean), for use in a graph.

    norm: the global norm of the gradients, without the leaves of spec.optimizer "sign". factor: the scale of the gradients for
    optim.clip_norm; the update multiplies by it while it reads them. keep: 1 to update, 0 to skip the update: optim.skip_spikes is on and
    the norm exceeds that multiple of the running mean of norms.
    norm_squared(flat gradients) -> their squared norm, needed if they are sharded. after: values that must be computed before the update,
    which may overwrite what they read; the factor is made to depend on them and on the gradients.
    """
    squares = norm_squared or _sum_of_squares(in_norm(specs), pick(kernels, "adamw", "squares")())
    control, sqrt = norm_control(optim), ops.Sqrt()

    def clip(grads, mean_norm, values, after):
        norm = sqrt(squares(grads))
        factor, keep, mean_norm = control(norm, mean_norm, values[3])
        return norm, ops.depend(factor, (after, grads)), keep, mean_norm

    return clip


def build_update(specs, optim, kernels, rates=None, directions=None):
    """Returns update(params, grads, m, v, factor, keep, scalars) -> nested tuples with (p, m, v) at each leaf, for use in a graph.

    The arguments are nested tuples of the structure of `specs`; factor and keep come from clip. Without a second moment, v is None and a
    leaf is (p, m). Leaves with two dims or more have weight decay. A leaf of spec.optimizer "sign" moves by router_bias_rate against the
    sign of its gradient. in_place() tells which leaves are updated in place.
    rates: nested tuples of what each leaf multiplies the scalars by, see own_rates(); None where all learning rates are lr.
    directions: muon.directions in a layout; default: on one device.
    """
    kinds, each = to_tuple(tree_map(partial(leaf_kind, optim), specs)), ops.HyperMap()
    leaf, by_muon, second = leaf_update(optim, kernels), optim.name == "muon", "v" in MOMENTS[optim.name]
    if by_muon:
        directions = directions or muon.directions(specs, optim)

    def own_rate(values, factor, keep, rate, kind, *arrays):
        return leaf(values * rate, factor, keep, kind, *arrays)

    def update(params, grads, m, v, factor, keep, values):
        arrays = (m, v) if second else (m,)
        if by_muon:
            grads, new_m = directions(grads, m, factor)
            arrays += (new_m,)
        if rates is None:
            return each(partial(leaf, values, factor, keep), kinds, params, grads, *arrays)
        return each(partial(own_rate, values, factor, keep), rates, kinds, params, grads, *arrays)

    return update


def in_place(specs, kernels, optim):
    """For each leaf, whether its p, m and v are updated in place. Nothing changes if a gradient is not finite or the step is skipped."""
    return tuple(_works_in_place(kernels, leaf_kind(optim, spec), optim) for spec in tree_leaves(specs))


def _works_in_place(kernels, kind, optim):
    if kind == SIGN:
        return False
    by_adamw = optim.name == "adamw" or (optim.name == "muon" and kind != MUON)
    return kernels.adamw != "reference" if by_adamw else changes_in_place(kernels)


def in_norm(specs):
    """The indices of the leaves of a tree of specs whose gradients count in the norm."""
    return tuple(i for i, spec in enumerate(tree_leaves(specs)) if spec.optimizer != "sign")


def leaf_kind(optim, spec):
    """SIGN, MUON, or for any other leaf its weight decay."""
    if spec.optimizer == "sign":
        return SIGN
    if optim.name == "muon" and muon.is_matrix(spec):
        return MUON
    return float(optim.weight_decay) if len(spec.shape) > 1 else NO_DECAY


def _sum_of_squares(counted, of_leaf):
    add, n = ops.AddN(), len(counted)

    def squares(leaves):
        each = ()
        for i in range(n):
            each += (of_leaf(ops.Cast()(leaves[counted[i]], ms.float32)),)
        return add(each)

    return squares


def norm_control(optim):
    """Returns control(norm, running mean, warm) -> (factor of the gradients, 1 to update or 0 to skip, new running mean).

    warm: 0 for the first SPIKE_WARMUP_STEPS steps, which are never skipped; 1 after them.
    """
    clip, limit = optim.clip_norm, optim.skip_spikes
    minimum, cast, select = ops.Minimum(), ops.Cast(), ops.Select()

    def control(norm, mean, warm):
        scale = minimum(clip / (norm + 1e-6), 1.0) if clip else norm * 0 + 1
        finite = cast(norm < float("inf"), ms.float32)
        if not limit:
            return scale, finite, mean
        spike = cast(norm > limit * mean, ms.float32) * cast(mean > 0, ms.float32) * warm
        seen = select(mean > 0, mean * NORM_MEMORY + norm * (1 - NORM_MEMORY), norm)
        keep = (1 - spike) * finite
        return scale, keep, select(keep > 0, seen, mean)  # select, because 0 * inf is NaN

    return control


def leaf_update(optim, kernels):
    """Returns leaf(values, scale, keep, leaf_kind, p, g, m, v) -> (p, m, v); without v if the optimizer has no second moment.

    For Muon, g of a matrix is its direction, and a last argument is the new m, see muon.directions."""
    # an in-place update must also be skipped for a gradient that is not finite: the old values would be lost
    skips, in_memory, decay = bool(optim.skip_spikes), changes_in_place(kernels), float(optim.weight_decay)
    if optim.name in optim_rules.RULES:
        by_rule = partial(optim_rules.build, skips=skips or in_memory, in_place=in_memory)
        decayed, plain = (by_rule(optim_rules.RULES[optim.name](optim, each)) for each in (decay, NO_DECAY))
    else:
        make = partial(pick(kernels, "adamw"), optim.b1, optim.b2, optim.eps, skips=skips or kernels.adamw != "reference")
        decayed, plain = make(decay=decay), make(decay=NO_DECAY)
    take = optim_rules.taken(skips or in_memory, in_memory)
    rate, sign, cast = optim.router_bias_rate, ops.Sign(), ops.Cast()

    def leaf(values, scale, keep, kind, p, g, m, v):
        if kind == SIGN:
            return p - cast(rate * keep * sign(g), p.dtype), m, v
        if kind > 0:
            return decayed(values, scale, keep, p, g, m, v)
        return plain(values, scale, keep, p, g, m, v)

    def leaf_of_one(values, scale, keep, kind, p, g, m):
        if kind == SIGN:
            return p - cast(rate * keep * sign(g), p.dtype), m
        if kind > 0:
            return decayed(values, scale, keep, p, g, m)
        return plain(values, scale, keep, p, g, m)

    def leaf_of_muon(values, scale, keep, kind, p, g, m, v, new_m):
        if kind != MUON:
            return leaf(values, scale, keep, kind, p, g, m, v)
        p, m = take(keep, p, m, muon.moved(values, p, g, decay), new_m)
        return p, m, v

    if optim.name == "muon":
        return leaf_of_muon
    return leaf if "v" in MOMENTS[optim.name] else leaf_of_one
