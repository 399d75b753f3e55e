"""The manual lowering of an annotated op: every rank runs the op on its local shards, between collectives, as in JAX's shard_map.

A tensor is split over the mesh axes of its dims, and it and its cotangent are replicated over the others. An op varies over an axis if one
of its operands or results is split over it. The signature of the op gives the collectives:

  an operand lacks an axis over which the op varies   pvary: the cotangents are summed over the axis
  the result of a contraction lacks such an axis      psum: the result is summed over the axis
  `a>b` in an operand, where b lacks an axis of a     all-gather; backward: a reduce-scatter if the op varies over the axis, else a slice
  `a>b` in a result, where b has an axis more than a  a reduce-scatter if the result has to be summed over the axis, else a slice
  `a>b` where an axis moves from one dim to another   all-to-all

For example, "rows>tokens embed, embed heads -> tokens heads" under sequence parallel all-gathers rows over tp and, in the backward,
reduce-scatters their cotangent. Gradients of parameters are not summed over the data axes here; see parallel/sharding.py.
"""

from typing import NamedTuple

from parallel import collectives
from parallel.graph.recompute import gathered_again
from parallel.graph.source import function


def lower(sharding, fn, operands, results, kind, reduce):
    """Returns fn between its collectives; fn itself if there are none."""
    if kind == "elementwise":
        return fn
    enters, leaves = op_steps(sharding, operands, results, kind, reduce)
    enters, leaves = ([_built(sharding, steps) for steps in side] for side in (enters, leaves))
    return _between(enters, fn, leaves)


def lower_fan(sharding, fns, parsed):
    """Returns f(x, *ws) -> (fns[0](x, ws[0]), ...), with the collectives of x once. parsed: (operands, results) of each; x is the first."""
    over = [varying(sharding, operands, results) for operands, results in parsed]
    assert all(v == over[0] for v in over), "the results of a fan vary over the same axes"
    steps, each = entering(sharding, parsed[0][0][0], over[0]), ()
    for fn, (operands, results) in zip(fns, parsed):
        (_, *enters), leaves = op_steps(sharding, operands, results, "contraction")
        enters, leaves = ([_built(sharding, steps) for steps in side] for side in (enters, leaves))
        each += (_between([None, *enters], fn, leaves),)
    whole = fan(each, _built(sharding, steps))
    return gathered_again(whole, len(each)) if sharding.gathers_again and gathers(steps) else whole


def gathers(steps):
    """Whether the Steps of an operand all-gather it."""
    return any(step.name == "all_gather" for step in steps)


def fan(fns, enter=None):
    """Returns f(x, w0, w1, ...) -> (fns[0](x, w0), fns[1](x, w1), ...); enter(x) replaces x.

    f is made from text because a function that is made while a graph is compiled may not take *args (docs/mindspore.md).
    """
    names = {f"f{i}": f for i, f in enumerate(fns)}
    weights = [f"w{i}" for i in range(len(fns))]
    results = "".join(f"{f}(x, {w}), " for f, w in zip(names, weights))
    return function(f"fan(x, {', '.join(weights)})", [*(["x = enter(x)"] if enter else []), f"return ({results})"], enter=enter, **names)


def wrapped(fn, wrap):
    """Returns wrap(fn), or fn itself where there is no wrap."""
    return fn if wrap is None else wrap(fn)


def varying(sharding, operands, results):
    """Returns the atoms over which an op varies, in the order of the mesh."""
    dims = [used for part in operands for _, used in part] + [arrives for part in results for arrives, _ in part]
    found = {atom for dim in dims for atom in sharding.atoms(dim)}
    return tuple(atom for atom in sharding.mesh.sizes if atom in found)


def _missing(sharding, part, varying):
    """Returns the atoms of `varying` over which a result of the function is not split."""
    has = {atom for arrives, _ in part for atom in sharding.atoms(arrives)}
    return tuple(atom for atom in varying if atom not in has)


class Step(NamedTuple):
    """A collective: its name in parallel/collectives.py, its atoms and its further arguments."""

    name: str
    atoms: tuple
    args: tuple = ()


def entering(sharding, part, varying):
    """Returns the Steps of an operand before the function. varying: the atoms over which the op varies."""
    has = {atom for _, used in part for atom in sharding.atoms(used)}
    lacks = tuple(atom for atom in varying if atom not in has)
    gathers, summed = (), set()
    for i, lost, gained in _moves(sharding, part):
        assert not gained, f"an operand may gather, not split: {part}"
        for atoms, sums in _runs(lost, lacks):
            gathers += (Step("all_gather", atoms, (i, "scatter" if sums else "slice")),)
            summed.update(atoms if sums else ())
    rest = tuple(atom for atom in lacks if atom not in summed and atom not in sharding.data_atoms)
    return (*((Step("pvary", rest),) if rest else ()), *_exchanges(sharding, part), *gathers)


def leaving(sharding, part, summed, reduce="sum"):
    """Returns the Steps of a result after the function. summed: the atoms over which it is a partial sum."""
    steps, done = (), set()
    for i, lost, gained in _moves(sharding, part):
        assert not lost, f"a result may be split, not gathered: {part}"
        for atoms, sums in reversed(_runs(gained, summed)):
            assert reduce == "sum" or not sums
            steps += (Step("reduce_scatter" if sums else "split", atoms, (i,)),)
            done.update(atoms)
    rest = tuple(atom for atom in summed if atom not in done)
    return (*steps, *((Step({"sum": "psum", "max": "pmax"}[reduce], rest),) if rest else ()), *_exchanges(sharding, part))


def op_steps(sharding, operands, results, kind, reduce="sum"):
    """Returns ([Steps of each operand], [Steps of each result]) of an op."""
    if kind == "elementwise":
        return [()] * len(operands), [()] * len(results)
    over = varying(sharding, operands, results)
    enters = [entering(sharding, part, over) for part in operands]
    if kind == "kernel":
        return enters, [leaving(sharding, part, ()) for part in results]
    return enters, [leaving(sharding, results[0], _missing(sharding, results[0], over), reduce)]


def _built(sharding, steps):
    """Returns Steps as one function; None if there are none."""
    return _chain([getattr(collectives, name)(sharding.mesh, atoms, *args, partial=sharding.partial) for name, atoms, args in steps])


def _moves(sharding, part):
    """Returns [(dim, atoms lost, atoms gained)] for the `a>b` of a tensor, without atoms that move to another dim."""
    changes, exchanged = _changes(sharding, part), {atom for *_, atoms in _swaps(_changes(sharding, part)) for atom in atoms}
    out = []
    for i, (a, b) in enumerate(changes):
        lost = tuple(atom for atom in a if atom not in b and atom not in exchanged)
        gained = tuple(atom for atom in b if atom not in a and atom not in exchanged)
        if lost or gained:
            # If the atoms are not the innermost of the dim, a gather changes the order of its elements, and the split later restores it.
            out.append((i, lost, gained))
    return out


def _changes(sharding, part):
    return [(sharding.atoms(a), sharding.atoms(b)) for a, b in part]


def _swaps(changes):
    """Returns [(dim that gains, dim that loses, atoms)] for atoms that move from one dim to another."""
    out = []
    for j, (a, b) in enumerate(changes):
        lost = set(a) - set(b)
        for i, (c, d) in enumerate(changes):
            atoms = tuple(atom for atom in d if atom not in c and atom in lost)
            if atoms:
                out.append((i, j, atoms))
    return out


def _exchanges(sharding, part):
    return tuple(Step("all_to_all", atoms, (i, j)) for i, j, atoms in _swaps(_changes(sharding, part)))


def _runs(atoms, summed):
    """Groups neighbouring atoms: returns [(atoms, whether they are in `summed`)], innermost first."""
    runs = []
    for atom in reversed(atoms):
        if runs and runs[-1][1] == (atom in summed):
            runs[-1] = ((atom, *runs[-1][0]), runs[-1][1])
        else:
            runs.append(((atom,), atom in summed))
    return runs


def _chain(steps):
    """Returns the composition of functions of one argument; None if there are none."""
    if not steps:
        return None
    if len(steps) == 1:
        return steps[0]
    first, rest = steps[0], _chain(steps[1:])

    def chained(x):
        return rest(first(x))

    return chained


def _between(enters, fn, leaves):
    """Returns fn with enters[i] applied to operand i and leaves[i] to result i, each a function or None; fn itself if all are None.

    It is made from text because a function that is made while a graph is compiled may not take *args (docs/mindspore.md).
    """
    if not any((*enters, *leaves)):
        return fn
    names = {**{f"enter{i}": f for i, f in enumerate(enters) if f}, **{f"leave{i}": f for i, f in enumerate(leaves) if f}}
    operands = [f"a{i}" for i in range(len(enters))]
    inside = ", ".join(f"enter{i}({a})" if enters[i] else a for i, a in enumerate(operands))
    if len(leaves) == 1:
        out = "leave0(out)" if leaves[0] else "out"
    else:
        out = ", ".join(f"leave{i}(out[{i}])" if f else f"out[{i}]" for i, f in enumerate(leaves))
    return function(f"annotated({', '.join(operands)})", [f"out = fn({inside})", f"return {out}"], fn=fn, **names)
