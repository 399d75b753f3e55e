"""Values and gradients of pure functions of a tree of parameters, eager and compiled."""

import mindspore as ms
from mindspore import Parameter

from parallel.graph.jit import jit, structure
from parallel.graph.nested import from_tuple, rebuild, to_tuple
from parallel.trees import tree_leaves, unflatten


def value_and_grad(fn, aux=None, compiled=False):
    """Returns g(params, *args) -> (value, grads) for fn(params, *args) -> value. grads is a tree with the structure of params.

    params: a tree of tensors, or a tree of Parameters. Parameters are closed over instead of passed, as MindSpore's semi-auto parallel
        needs them. Raises ValueError for a mixture or for no leaves.
    aux: names in the dict that fn returns after its value, such as qwen3.model.metric_names(cfg) for qwen3.model.loss_fn. g then returns
        ((value, {name: tensor}), grads).
    compiled: compiles one graph for each structure of the arguments; else g runs eagerly.

    g raises ValueError where the value is not one number, or where fn returns more than its value and aux does not name it: MindSpore would
    differentiate the sum of everything that fn returns.
    """
    if isinstance(aux, str):
        raise ValueError(f"value_and_grad: aux={aux!r} must be a tuple of names; use aux=({aux!r},)")
    graphs = {}

    def g(params, *args):
        leaves = tree_leaves(params)
        if not leaves:
            raise ValueError("value_and_grad: params has no leaves, so there is nothing to differentiate")
        bound = isinstance(leaves[0], Parameter)
        if any(isinstance(leaf, Parameter) != bound for leaf in leaves):
            raise ValueError("value_and_grad: params mixes Parameters and tensors; use one kind")
        if not compiled:
            out, grads = (_closed_over(fn, params, aux) if bound else _eager(fn, params, aux))(*args)
        else:
            key = (structure(params), structure(args), tuple(map(id, leaves)) if bound else None)
            if key not in graphs:
                inside = _closed_over(fn, params, aux) if bound else grad_in_graph(fn, params, aux)
                graphs[key] = jit(inside)
            out, grads = graphs[key](*args) if bound else graphs[key](to_tuple(params), *args)
        _check_value(out if aux is None else out[0])
        grads = from_tuple(params, grads)
        return (out, grads) if aux is None else ((out[0], dict(zip(aux, out[1]))), grads)

    return g


def _check_value(value):
    """Raises ValueError unless `value` is a tensor of one number."""
    if isinstance(value, (tuple, list, dict)):
        raise ValueError(
            f"value_and_grad: the function returns a {type(value).__name__} of {len(value)}, whose sum would be differentiated; return one"
            " number, or (number, dict) with the names of the dict in aux, such as aux=qwen3.model.metric_names(cfg) for loss_fn"
        )
    if value.size != 1:
        raise ValueError(f"value_and_grad: the function returns a value of shape {list(value.shape)}; return one number, such as its sum")


def grad_in_graph(fn, like, aux=None):
    """Returns g(nested, *args) -> (value, nested grads), for use inside a compiled function; with aux, ((value, aux tuple), nested grads).

    nested: to_tuple(params). like: a tree with the structure of params.
    """
    build = rebuild(like)

    def of_nested(nested, *args):
        return fn(build(nested), *args)

    return grad_of_nested(of_nested, aux)


def grad_of_nested(fn, aux=None):
    """Returns g as grad_in_graph does, for a function whose first argument is nested tuples. The other arguments get no gradients."""
    vg = ms.value_and_grad(_with_aux_tuple(fn, aux), 0, has_aux=aux is not None)
    return _paired(vg, aux)


def _eager(fn, params, aux):
    leaves, fn = tree_leaves(params), _with_aux_tuple(fn, aux)

    def of_leaves(*values):
        return fn(unflatten(params, values[: len(leaves)]), *values[len(leaves) :])

    vg = ms.value_and_grad(of_leaves, tuple(range(len(leaves))), has_aux=aux is not None)
    paired = _paired(vg, aux)

    def of_args(*args):
        return paired(*leaves, *args)

    return of_args


def _closed_over(fn, params, aux):
    fn = _with_aux_tuple(fn, aux)

    def of_args(*args):
        return fn(params, *args)

    vg = ms.value_and_grad(of_args, None, weights=tree_leaves(params), has_aux=aux is not None)
    return _paired(vg, aux)


def _paired(vg, aux):
    """Returns vg with ((value, aux tuple), grads) as its result. MindSpore returns (value, aux...) as one flat tuple."""
    if aux is None:
        return vg

    def paired(*args):
        out, grads = vg(*args)
        return (out[0], out[1]), grads

    return paired


def _with_aux_tuple(fn, aux):
    """Returns fn with its dict of auxiliary results replaced by a tuple, in the order of the names `aux`."""
    if aux is None:
        return fn
    names, n = tuple(aux), len(aux)

    def with_tuple(*args):
        value, extra = fn(*args)
        picked = ()
        for i in range(n):
            picked += (extra[names[i]],)
        return value, picked

    return with_tuple
