"""The stages `collectives` and `layouts`: what ranks send each other, and whether a model split over them is the model."""

import functools
import time
from functools import partial

import mindspore as ms
import numpy as np

from experiments.accept import tiny
from experiments.accept.kernels import error_of
from experiments.accept.outcome import Failed, NotHere
from parallel import collectives
from parallel.mesh import Mesh
from parallel.step import value_and_grad

ROWS, WIDTH = 6, 5  # of what each rank gives, times the number of ranks where it is split
BANDWIDTH_BYTES = {"CPU": 4 << 20, "Ascend": 256 << 20}
TURNS = 5
# Largest errors of a layout against one process. CPU: sums in another order; AdamW divides by the size of a gradient, so that parameters
# of small gradients move by more. Ascend: not known before it has run there; its float32 products may be made of less.
TOLERANCES = {
    "CPU": {"loss": 1e-5, "norm": 1e-5, "gradient": 1e-4, "parameter": 1e-4},
    "Ascend": {"loss": 1e-4, "norm": 1e-4, "gradient": 1e-3, "parameter": 1e-3},
}


def needs_ranks(job):
    if job.world == 1:
        raise NotHere("the job has one rank; start the kit with experiments.launch --nproc=N, N processes of a CPU or N NPUs")


def collectives_checks(job):
    groups = {"all ranks": (Mesh(dp=job.world, rank=job.rank), ("dp",))}
    if job.world >= 4 and job.world % 2 == 0:
        mesh = Mesh(dp=2, tp=job.world // 2, rank=job.rank)
        groups |= {"neighbours": (mesh, ("tp",)), "every other": (mesh, ("dp",))}
    values = {f"{kind}, {where}": partial(_right, job, kind, *group) for where, group in groups.items() for kind in KINDS}
    sends = {"send and receive": partial(_ring, job)}
    rates = {f"bandwidth of {kind}": partial(_bandwidth, job, kind) for kind in RATES}
    return {**values, **sends, **rates}


def _columns(parts, at):
    """Returns part `at` of each array, along the leading dim."""
    return [np.split(x, len(parts))[at] for x in parts]


# kind -> (make(mesh, axes, n), whether ranks give the same input, whether they have the same cotangent, and for index `at` of a group with
# inputs xs, or cotangents ws, of each of its ranks: its result, and its gradient)
KINDS = {
    "psum": (lambda m, a, n: collectives.psum(m, a), False, True, lambda xs, at: sum(xs), lambda ws, at: ws[at]),
    "pvary": (lambda m, a, n: collectives.pvary(m, a), True, False, lambda xs, at: xs[at], lambda ws, at: sum(ws)),
    "pmax": (lambda m, a, n: collectives.pmax(m, a), False, True, lambda xs, at: np.max(xs, 0), lambda ws, at: 0 * ws[at]),
    "all-gather": (
        *(lambda m, a, n: collectives.all_gather(m, a), False, False),
        *(lambda xs, at: np.concatenate(xs), lambda ws, at: sum(_columns(ws, at))),
    ),
    "all-gather, same cotangent": (
        *(lambda m, a, n: collectives.all_gather(m, a, grad="slice"), False, True),
        *(lambda xs, at: np.concatenate(xs), lambda ws, at: _columns(ws, at)[at]),
    ),
    "reduce-scatter": (
        *(lambda m, a, n: collectives.reduce_scatter(m, a), False, False),
        *(lambda xs, at: sum(_columns(xs, at)), lambda ws, at: np.concatenate(ws)),
    ),
    "split": (
        *(lambda m, a, n: collectives.split(m, a), True, False),
        *(lambda xs, at: _columns(xs, at)[at], lambda ws, at: np.concatenate(ws)),
    ),
    "all-to-all": (
        *(lambda m, a, n: collectives.all_to_all(m, a, 0, 0), False, False),
        *(lambda xs, at: np.concatenate(_columns(xs, at)), lambda ws, at: np.concatenate(_columns(ws, at))),
    ),
    "ppermute": (
        *(lambda m, a, n: collectives.ppermute(m, a, [(i, (i + 1) % n) for i in range(n)]), False, False),
        *(lambda xs, at: xs[at - 1], lambda ws, at: ws[(at + 1) % len(ws)]),
    ),
    "broadcast": (
        *(lambda m, a, n: collectives.broadcast(m, a, n - 1), False, False),
        *(lambda xs, at: xs[-1], lambda ws, at: sum(ws) if at == len(ws) - 1 else 0 * ws[at]),
    ),
}


def _right(job, kind, mesh, axes):
    """Compares a collective, and its gradient, with numpy. The numbers are small integers, whose sums are exact."""
    needs_ranks(job)
    make, same_input, same_cotangent, value, gradient = KINDS[kind]
    n, at, group = mesh.size(axes), mesh.index(axes), mesh.members(axes)
    xs = _draw(group, (ROWS * n, WIDTH), same_input, 0)
    want = value(xs, at)
    ws = _draw(group, want.shape, same_cotangent, 1)
    collective = make(mesh, axes, n)

    def weighted(x, w):
        y = collective(x)
        return (y * w).sum(), {"y": y}

    (_, found), grad = value_and_grad(weighted, ("y",), compiled=True)(ms.Tensor(xs[at]), ms.Tensor(ws[at]))
    wrong = {
        "value": int((found["y"].asnumpy() != want).sum()) if found["y"].shape == want.shape else want.size,
        "gradient": int((grad.asnumpy() != gradient(ws, at)).sum()),
    }
    facts = {"ranks of a group": n, "numbers": int(want.size)}
    if any(wrong.values()):
        text = ", ".join(f"{count} numbers of its {name} are wrong" for name, count in wrong.items() if count)
        raise Failed(f"{text}, on index {at} of the group of ranks {', '.join(map(str, group))}", facts)
    return facts


def _draw(group, shape, same, stream):
    return [np.random.default_rng([stream, group[0] if same else rank]).integers(-50, 51, shape).astype(np.float32) for rank in group]


def _ring(job):
    """Each rank sends its number to the next, as pipeline stages do."""
    needs_ranks(job)
    mesh = Mesh(pp=job.world, rank=job.rank)
    collectives.send(mesh, (job.rank + 1) % job.world, ms.Tensor(np.full((3, 2), job.rank, np.float32)))
    before = (job.rank - 1) % job.world
    found = collectives.receive(mesh, before, (3, 2), ms.float32).asnumpy()
    if not (found == before).all():
        raise Failed(f"rank {before} sent its number, and rank {job.rank} received {found.ravel()[0]:g}")
    return {"ranks": job.world}


# kind -> (the function of parallel.collectives, elements that a rank sends in a ring, as a multiple of those that it has)
RATES = {
    "psum": (lambda mesh, axes: collectives.psum(mesh, axes), lambda n: 2 * (n - 1) / n),
    "all-gather": (lambda mesh, axes: collectives.all_gather(mesh, axes), lambda n: n - 1),
    "reduce-scatter": (lambda mesh, axes: collectives.reduce_scatter(mesh, axes), lambda n: (n - 1) / n),
    "all-to-all": (lambda mesh, axes: collectives.all_to_all(mesh, axes, 0, 0), lambda n: (n - 1) / n),
}


def _bandwidth(job, kind):
    """Times a collective of float32. The rate is of what a rank would send in a ring, whatever the collective is made of here."""
    needs_ranks(job)
    make, share = RATES[kind]
    mesh, axes, target = Mesh(dp=job.world, rank=job.rank), ("dp",), ms.get_context("device_target")
    nbytes = BANDWIDTH_BYTES[target] // (4 if job.quick else 1)
    x, run = ms.Tensor(np.ones((job.world, nbytes // 4 // job.world), np.float32)), make(mesh, axes)
    times = []
    for _ in range(TURNS + 2):
        collectives.host_sum(mesh, axes, [0.0])  # all begin at once
        began = time.perf_counter()
        run(x)[:1, :1].asnumpy()
        times.append(time.perf_counter() - began)
    seconds = float(np.median(times[2:]))
    return {"MB": nbytes / 1e6, "ms": 1e3 * seconds, "GB/s sent by a rank": share(job.world) * nbytes / seconds / 1e9}


def layouts_checks(job):
    checks = {}
    for model, parallel in _layouts(job):
        checks[f"{model}: {tiny.title(parallel)}"] = partial(_equals_one_process, job, model, parallel)
    return checks


def _layouts(job):
    """Returns [(model, changes to config.parallel)] for the number of ranks. Some of them may not fit it; Run says so."""
    n = job.world
    half, largest = max(n // 2, 1), max(i for i in range(1, min(n, 8) + 1) if n % i == 0)  # the models have 8 heads and 8 experts
    dense = [
        {"dp": n},
        {"dp": n, "zero": 1},
        {"tp": largest, "dp": n // largest, "seq_parallel": True},
        {"pp": 2, "dp": half, "micro_batches": 2},
        {"cp": largest, "dp": n // largest, "cp_attention": "ring"},
        {"dp": n, "zero": 3},
        {"tp": largest, "dp": n // largest},
        {"dp": n, "zero": 2, "micro_batches": 2},
        {"cp": min(largest, 4), "dp": n // min(largest, 4), "cp_attention": "ulysses", "zero": 2},
        {"pp": min(n, 4), "dp": n // min(n, 4), "micro_batches": 4},
        {"pp": 2, "dp": half, "micro_batches": 2, "pp_schedule": "interleaved", "virtual_stages": 2},
    ]
    moe = [{"dp": n, "ep": largest}, {"dp": n, "ep": largest, "zero": 3}, {"pp": 2, "dp": half, "ep": min(half, 8), "micro_batches": 2}]
    if n >= 4:
        dense += [
            {"dp": 2, "tp": half, "seq_parallel": True, "zero": 1},
            {"dp": 2, "tp": half, "zero": 3},
            {"pp": 2, "tp": half, "micro_batches": 2, "zero": 1},
            {"cp": 2, "tp": half, "seq_parallel": True},
        ]
        moe += [{"dp": 2, "tp": half, "ep": 2}, {"dp": 2, "tp": half, "ep": min(n, 8), "seq_parallel": True, "zero": 1}]
    if job.quick:
        dense, moe = dense[:5], moe[:1]
    return [*(("dense", each) for each in dense), *(("moe", each) for each in moe)]


def _steps(job):
    return 2 if job.quick else 3


@functools.cache
def _alone(cfg, rows, micro_batches, steps):
    """Returns what this process computes by itself."""
    return tiny.Run(cfg, {"micro_batches": micro_batches}, rows).trained(steps)


def _equals_one_process(job, model, parallel):
    needs_ranks(job)
    rows, cfg = 4 * job.world, tiny.MODELS[model]
    cfg = cfg.replace(num_layers=max(cfg.num_layers, parallel.get("pp", 1) * parallel.get("virtual_stages", 1)))
    try:
        run = tiny.Run(cfg, parallel, rows, job.rank, job.world)
    except ValueError as error:
        raise NotHere(f"the layout does not fit: {error}") from None
    want = _alone(cfg, rows, parallel.get("micro_batches", 1), _steps(job))
    return compared(want, run.trained(_steps(job)), TOLERANCES[ms.get_context("device_target")])


def compared(want, found, tolerances):
    """Compares two results of tiny.Run.trained. Returns the largest error of each kind; raises Failed if one is above its tolerance."""
    if not all(np.any(want[key]) for key in ("loss 0", "norm 0")):
        raise Failed(
            f"what it is compared with has a loss of {want['loss 0']} and gradients of norm {want['norm 0']}, so it judges nothing"
        )
    worst, where = dict.fromkeys(tolerances, 0.0), {}
    for key, value in want.items():
        kind = key.split()[0]
        error = error_of(value, found[key])
        if error >= worst[kind]:
            worst[kind], where[kind] = error, key
    facts = {f"error of {kind}": error for kind, error in worst.items()}
    wrong = [kind for kind, error in worst.items() if not error <= tolerances[kind]]
    if wrong:
        text = "; ".join(f"{where[kind]}: error {worst[kind]:.3g} is above {tolerances[kind]:g}" for kind in wrong)
        raise Failed(f"it differs: {text}", facts)
    return facts
