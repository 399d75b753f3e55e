"""Muon: the step of a matrix is its momentum, orthogonalized by a Newton-Schulz iteration in float32: all singular values come near 1.

Steps are scaled as in Moonlight: they have the size of AdamW's steps, so AdamW's learning rate and decay can be used. Sources: Jordan et
al. 2024, also for the coefficients; Liu et al. 2025 (Moonlight).
"""

import mindspore as ms
from mindspore import ops

from ops.adamw import rate
from parallel import matrices
from parallel.graph.nested import expression, subscripts, to_tuple
from parallel.graph.source import function
from parallel.placement import local_shape
from parallel.trees import tree_leaves, unflatten

STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
AS_ADAMW = 0.2  # typical root mean square of AdamW's steps, before the learning rate


def is_matrix(spec):
    """Whether Muon trains a parameter: matrices inside layers, also stacks of one matrix per expert. AdamW trains the others."""
    return spec.optimizer == "adamw" and sum(dim != "layers" for dim in spec.dims) > 1 and "vocab" not in spec.dims


def directions(specs, optim, sharding=None, placed=None):
    """Returns f(grads, m, factor) -> (directions, new m), for use in a graph. All are nested tuples of the structure of `specs`.

    factor: the scale of the gradients. The direction of a matrix is what the update subtracts from it, before the learning rate; those of
    other leaves are their gradients, and their m is unchanged. sharding, placed: the layout and the flat list of Placed, where arrays are
    shards; a matrix is orthogonalised whole.
    """
    like, flat = to_tuple(specs), tree_leaves(specs)
    ats, names, turned, moved, lines = subscripts(like), {}, [], [], []
    for i, (spec, at) in enumerate(zip(flat, ats)):
        if not is_matrix(spec):
            turned.append(f"grads{at}")
            moved.append(f"m{at}")
            continue
        names[f"turn{i}"] = _turn(optim, step_of(sharding, placed[i]) if placed else scaled)
        lines.append(f"d{i}, m{i} = turn{i}(grads{at}, m{at}, factor)")
        turned.append(f"d{i}")
        moved.append(f"m{i}")
    trees = (expression(unflatten(like, each)) for each in (turned, moved))
    return function("directions(grads, m, factor)", [*lines, f"return {', '.join(trees)}"], **names)


def step_of(sharding, placed):
    """Returns f(momentum) -> its direction, both this rank's shard of matrices in a layout."""
    shape = local_shape(sharding.mesh, placed.spec, placed.state)
    return matrices.on_whole(sharding.mesh, shape, placed.state, scaled) if matrices.moves(sharding.mesh, shape, placed.state) else scaled


def _turn(optim, step):
    momentum, cast = optim.muon_momentum, ops.Cast()

    def turn(g, m, factor):
        g = cast(g, ms.float32) * factor
        m = momentum * m + g
        return step(g + momentum * m), m  # Nesterov's momentum

    return turn


def scaled(x):
    """x [..., A, B] float32 -> its direction: orthogonal, with the root mean square of AdamW's steps."""
    return AS_ADAMW * max(x.shape[-2], x.shape[-1]) ** 0.5 * ORTHOGONAL(x)


def orthogonalised(steps=STEPS):
    """Returns f(g [..., A, B] float32) -> g with its singular values moved to about 0.7 to 1.2; those near 0 stay smaller."""
    a, b, c = COEFFICIENTS
    by_transposed, product, swap, sqrt, total = (
        ops.BatchMatMul(transpose_b=True),
        ops.BatchMatMul(),
        ops.Transpose(),
        ops.Sqrt(),
        ops.ReduceSum(keep_dims=True),
    )
    reshape = ops.Reshape()

    def of_wide(x):
        x = x / (sqrt(total(x * x, (1, 2))) + 1e-7)
        for _ in range(steps):
            s = by_transposed(x, x)
            x = a * x + product(b * s + c * product(s, s), x)
        return x

    def of_any(g):
        x = reshape(g, (-1, g.shape[-2], g.shape[-1]))
        x = of_wide(x) if g.shape[-2] <= g.shape[-1] else swap(of_wide(swap(x, (0, 2, 1))), (0, 2, 1))
        return reshape(x, g.shape)

    return of_any


ORTHOGONAL = orthogonalised()


def moved(values, p, direction, decay):
    """The new p: decayed, and moved by the learning rate against its direction."""
    lr = rate(values, p)
    return p * (1 - lr * decay) - lr * direction
