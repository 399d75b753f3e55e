"""Binding pure functions of parameter trees to MindSpore: compilation, and gradients with respect to a tree.

MindSpore compiles a function's source, takes nested tuples of tensors as true inputs (`mutable`), and differentiates with
respect to them; dicts at that border are constants, or lose their gradients, without a word (docs/mindspore.md). So trees
cross it as nested tuples and are rebuilt inside, and `fullgraph` refuses whatever would fall back to the interpreter.
"""

import mindspore as ms
from mindspore import Parameter, Tensor, mutable

from parallel.source import function
from parallel.spec import is_leaf, tree_leaves, tree_map, tree_paths, unflatten

ms.set_recursion_limit(100000)  # room for deep unrolled models; the default is 1000

_NONE = Tensor(0, ms.int32)  # stands for None at the border, where only tensors pass


def to_tuple(tree):
    """Nested tuples with the leaves of a tree, in its order. On the host."""
    if isinstance(tree, dict):
        return tuple(to_tuple(v) for v in tree.values())
    if isinstance(tree, (list, tuple)):
        return tuple(to_tuple(v) for v in tree)
    return tree


def from_tuple(like, nested):
    """The inverse of to_tuple: a tree of `like`'s structure. On the host."""
    return unflatten(like, tree_leaves(nested))


def rebuild(like):
    """A function, for use inside a compiled one, from to_tuple's form to a tree of `like`'s structure; lists become tuples."""
    lines = []
    return _tree_function("nested", expression(like, "nested", lines), lines)


def rebuild_flat(like):
    """The same from the flat tuple of the leaves."""
    places = iter(range(len(tree_leaves(like))))
    return _tree_function("flat", expression(tree_map(lambda _: f"flat[{next(places)}]", like)))


def joined(like, *parts):
    """f(*nested) -> the tree of `like`'s structure, for use inside a compiled function; nested: to_tuple of each of the trees `parts`,
    which have its leaves between them, by path."""
    lines, found = [], {}
    for number, part in enumerate(parts):
        found.update(_sources(part, f"nested{number}", lines))
    tree = unflatten(like, [found[path] for path, _ in tree_paths(like)])
    arguments = ", ".join(f"nested{i}" for i in range(len(parts)))
    return function(f"tree_of({arguments})", [*lines, f"return {expression(tree)}"])


def _sources(tree, at, lines, path=()):
    """{path: source of the leaf}, taken from nested tuples at `at`; lines: as in expression."""
    if is_leaf(tree):
        return {".".join(path): at}
    name, out = f"t{len(lines)}", {}
    lines.append(f"{name} = {at}")
    for i, key in enumerate(tree if isinstance(tree, dict) else range(len(tree))):
        out.update(_sources(tree[key], f"{name}[{i}]", lines, (*path, str(key))))
    return out


def flatten_in_graph(like):
    """A function, for use inside a compiled one, from a tree of `like`'s structure to the flat tuple of its leaves."""
    return _tree_function("tree", "(" + "".join(f"tree{at}, " for at in subscripts(like)) + ")")


def expression(tree, at=None, lines=None):
    """Python source of a literal like `tree`, its leaves taken from nested tuples at `at`; without it, leaves are source.

    lines: gets statements that name each nested tuple once. The gradient of a subscript is a whole tuple, so that leaves taken
    one by one from the root, as `nested[0][1][2]`, make the compile time of a backward grow with the square of their number.
    """
    if is_leaf(tree):
        return "None" if tree is None else at or tree
    if at:
        lines.append(f"t{len(lines)} = {at}")
        at = f"t{len(lines) - 1}"
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    parts = [expression(tree[k], at and f"{at}[{i}]", lines) for i, k in enumerate(keys)]
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{k!r}: {part}" for k, part in zip(keys, parts)) + "}"
    return "(" + "".join(part + ", " for part in parts) + ")"


def subscripts(tree):
    """Python source of the way to each leaf, such as "['layers'][0]"."""
    if is_leaf(tree):
        return [""]
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    return [f"[{k!r}]" + rest for k in keys for rest in subscripts(tree[k])]


def _tree_function(argument, expression, lines=()):
    """A function of one argument, from the statements before its result and the result.

    The result is a literal, because gradients through dict(zip()) are lost (docs/mindspore.md).
    """
    return function(f"tree_of({argument})", [*lines, f"return {expression}"])


def jit(fn, order="bfs"):
    """Compile fn(*trees) -> a tensor or nested tuples of tensors (not dicts).

    Arguments are trees of tensors or None. New values never compile again; a new structure, shape or dtype does, once. order: of ops on
    Ascend: bfs lets work go on beside exchanges, dfs keeps fewer tensors at a time.
    """
    graphs = {}

    def compiled(*args):
        key = _structure(args)
        if key not in graphs:
            graphs[key] = _graph(fn, args, order)
        return graphs[key](mutable(to_tuple(tree_map(_placed, args))))

    return compiled


def _graph(fn, args, order):
    build, options = rebuild(args), {"exec_order": order} if ms.get_context("device_target") == "Ascend" else {}

    @ms.jit(fullgraph=True, **options)
    def graph(nested):
        return fn(*build(nested))

    return graph


def _placed(leaf):
    return _NONE if leaf is None else leaf.contiguous()  # a graph with loops reads a slice of a tensor from the wrong place


def in_device_memory(tree):
    """A tree of tensors in the device's memory. Of a tensor that comes from the host each graph on Ascend keeps a copy of its own; on CPU
    all take the host's, and the tree is returned as it is."""
    return tree if ms.get_context("device_target") == "CPU" else tree_map(_copied, tree)


def _copied(x):
    """Not in a graph, which would keep its input; nor of x itself, which would keep its own copy for as long as it is there."""
    return ms.Tensor.from_numpy(x.asnumpy()) * 1


def _structure(tree):
    """A hashable description of a tree's keys, and of the shape and dtype of its leaves."""
    if isinstance(tree, dict):
        return ("dict", *((k, _structure(v)) for k, v in tree.items()))
    if isinstance(tree, (list, tuple)):
        return ("list", *(_structure(v) for v in tree))
    return None if tree is None else (tuple(tree.shape), str(tree.dtype))


def value_and_grad(fn, aux=None, compiled=False):
    """g(params, *args) -> (value, grads) for fn(params, *args) -> value; grads has the structure of params.

    params: a tree of tensors, or of Parameters, which are then closed over instead of passed (the form that semi-auto parallel
    shards). aux: names in the dict that fn returns beside its value; g then returns ((value, {name: tensor}), grads). Without aux the
    gradients are of the sum of all that fn returns (docs/mindspore.md).
    compiled: one graph per structure of the arguments, instead of eager execution.
    """
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
            key = (_structure(params), _structure(args), tuple(map(id, leaves)) if bound else None)
            if key not in graphs:
                inside = _closed_over(fn, params, aux) if bound else grad_in_graph(fn, params, aux)
                graphs[key] = jit(inside)
            out, grads = graphs[key](*args) if bound else graphs[key](to_tuple(params), *args)
        grads = from_tuple(params, grads)
        return (out, grads) if aux is None else ((out[0], dict(zip(aux, out[1]))), grads)

    return g


def grad_in_graph(fn, like, aux=None):
    """g(nested, *args) -> (value, nested grads), or ((value, aux tuple), nested grads), for use inside a compiled function.

    nested is to_tuple of params, whose structure `like` has.
    """
    build = rebuild(like)

    def of_nested(nested, *args):
        return fn(build(nested), *args)

    return grad_of_nested(of_nested, aux)


def grad_of_nested(fn, aux=None):
    """The same for a function whose first argument is nested tuples; of its other arguments there are no gradients."""
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
    """MindSpore returns (value, aux...) flat beside the gradients; give ((value, aux tuple), grads)."""
    if aux is None:
        return vg

    def paired(*args):
        out, grads = vg(*args)
        return (out[0], out[1]), grads

    return paired


def _with_aux_tuple(fn, aux):
    """fn with its dict of auxiliary results as a tuple in the order of the names `aux`."""
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
