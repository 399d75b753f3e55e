"""Muon: the step of a matrix is its momentum, orthogonalized by a Newton-Schulz iteration in float32: all singular values come near 1.

Steps are scaled as in Moonlight: they have the size of AdamW's steps, so AdamW's learning rate and decay can be used. Sources: Jordan et
al. 2024, also for the coefficients; Liu et al. 2025 (Moonlight).
"""

from mindspore import ops

STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
AS_ADAMW = 0.2  # typical root mean square of AdamW's steps, before the learning rate


def is_matrix(spec):
    """Whether Muon trains a parameter: matrices inside layers, also stacks of one matrix per expert. AdamW trains the others."""
    return spec.optimizer == "adamw" and len(spec.shape) > 1 and "vocab" not in spec.dims


def check_whole(specs, placed):
    """Raises ValueError if a matrix that Muon trains is sharded. specs, placed: flat sequences for the same parameters."""
    for spec, p in zip(specs, placed):
        if is_matrix(spec) and any(p.state[-2:]):
            why = "ZeRO" if p.used[-2:] != p.state[-2:] else "tensor parallelism"
            raise ValueError(
                f"optim.name=muon needs whole matrices, and {p.path} is sharded by {why};"
                " use --zero=0 and --tp=1, or --config.optim.name=adamw"
            )


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


def rule(optim, decay):
    """Returns new(values, scale, p, g, m) -> (p, m), a rule as in optim_rules.py, with Nesterov momentum."""
    momentum, orthogonal = optim.muon_momentum, orthogonalised()

    def new(values, scale, p, g, m):
        g = g * scale
        m = momentum * m + g
        size = AS_ADAMW * max(p.shape[-2], p.shape[-1]) ** 0.5
        return p * (1 - values[0] * decay) - values[0] * size * orthogonal(g + momentum * m), m

    return new
