"""Ways of writing a function, and where MindSpore 2.10 compiles them: the rules for whoever writes a layer (docs/mindspore.md).

Each row of RULES, below the functions, is one rule: a function of (p, x) that computes exp(x * w) * w, written in the way that the rule is
about, and the modes in which it works. A test fails when a release takes away what the code rests on, and also when it mends what the code
avoids. Each (rule, mode) that works runs in the test's own process. Each that fails runs in a process of its own, as some of them crash.
"""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from typing import NamedTuple

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from tests.processes import ROOT

exp, mul = ops.Exp(), ops.Mul()


@dataclasses.dataclass(frozen=True)
class Config:
    placement: str = "pre"
    qk_norm: bool = True
    lora: object = None
    sparse: tuple = (1, 3)

    @property
    def is_mixed(self):
        return len(self.sparse) > 0

    def is_sparse(self, i):
        return i in self.sparse


CONFIG = Config()


def times(a, b):
    return a * b


def exp_of_times(a, b):
    return exp(a * b)


class Product(nn.Cell):
    """With a backward of its own."""

    def construct(self, a, b):
        return a * b

    def bprop(self, a, b, out, dout):
        return dout * b, dout * a


def branching(name):
    plain, fns = name == "plain", (mul, times)

    def one_of(a, b):
        if plain:
            return a
        for i in range(2):
            if i == 1:
                a = fns[i](a, b)
        return a

    return one_of


def by_name(name):
    return {"function": times, "cell": Product(), "primitive": ops.Mul(), "branching": branching("product")}[name.split(":")[0]]


class Context:
    """An op object: the ops of a model, each bound to its signature while a graph is compiled."""

    def __init__(self, config):
        self.config = config
        self.bound = ops.constexpr(functools.lru_cache(maxsize=None)(by_name), name="bound_by_name")
        self.prebuilt = {"rows embed, embed -> rows": times, "rows -> rows": exp}
        self.steps = (exp_of_times, times)

    def product(self, a, b, name):
        if self.config.qk_norm:
            return self.bound(name)(a, b)
        return a

    def step(self, i, a, b):
        return self.steps[i](a, b)

    def with_default(self, a, scale=None):
        if scale is None:
            return a * 1
        return a * scale

    def with_star(self, a, *factors):
        for b in factors:
            a = a * b
        return a

    def times(self, a, b):
        return a * b


CONTEXT = Context(CONFIG)

# --- what a constexpr returns


def constexpr_returns_a_function(p, x):
    return exp(CONTEXT.bound("function")(x, p["w"])) * p["w"]


def constexpr_returns_a_function_with_a_branch_and_a_loop(p, x):
    return exp(CONTEXT.bound("branching")(x, p["w"])) * p["w"]


def constexpr_returns_a_cell(p, x):
    return exp(CONTEXT.bound("cell")(x, p["w"])) * p["w"]


def constexpr_returns_a_primitive(p, x):
    return exp(CONTEXT.bound("primitive")(x, p["w"])) * p["w"]


def constexpr_of_an_f_string(p, x):
    return exp(CONTEXT.bound(f"function: {x.shape[0]} {CONFIG.placement}")(x, p["w"])) * p["w"]


def constexpr_function_called_with_a_starred_tuple(p, x):
    rest = (p["w"],)
    return exp(CONTEXT.bound("function")(x, *rest)) * p["w"]


def prebuilt_ops_by_signature(p, x):
    return CONTEXT.prebuilt["rows -> rows"](CONTEXT.prebuilt["rows embed, embed -> rows"](x, p["w"])) * p["w"]


@ops.constexpr
def of_star(name):
    def product(*factors):
        return factors[0] * factors[1]

    return product


def constexpr_returns_a_function_of_star_args(p, x):
    return exp(of_star("product")(x, p["w"])) * p["w"]


@ops.constexpr
def of_double_star(name):
    def product(a, **sizes):
        return a * sizes["b"]

    return product


def constexpr_returns_a_function_of_sizes(p, x):
    return exp(of_double_star("product")(x * p["w"], b=1)) * p["w"]


@ops.constexpr
def of_default(name):
    def product(a, b, scale=1):
        return a * b * scale

    return product


def constexpr_returns_a_function_with_a_default(p, x):
    return exp(of_default("product")(x, p["w"])) * p["w"]


def constexpr_function_called_by_keyword(p, x):
    return exp(CONTEXT.bound("function")(x, b=p["w"])) * p["w"]


def call_in(fn, a, b):
    return fn(a, b)


@ops.constexpr
def partly(name):
    return functools.partial(call_in, mul)


def constexpr_returns_a_partial(p, x):
    return exp(partly("product")(x, p["w"])) * p["w"]


PARTIAL = functools.partial(call_in, mul)


def partial_made_outside_the_graph(p, x):
    return exp(PARTIAL(x, p["w"])) * p["w"]


def partial_made_inside_the_graph(p, x):
    product = functools.partial(call_in, mul)
    return exp(product(x, p["w"])) * p["w"]


# --- branches


def branch_on_an_attribute(p, x):
    y = x
    if CONFIG.qk_norm:
        y = exp(x * p["w"])
    return y * p["w"]


def branch_on_a_property(p, x):
    if CONFIG.is_mixed:
        y = exp(x * p["w"])
    else:
        y = x
    return y * p["w"]


def branch_on_a_string(p, x):
    y = x if CONFIG.placement == "post" else exp(x * p["w"])
    if CONFIG.placement in ("pre", "both"):
        return y * p["w"]
    return y


def or_none(a, cache):
    if cache is None:
        return exp(a), cache
    return a, cache


def branch_on_none(p, x):
    y, cache = or_none(x * p["w"], None)
    if cache is not None or CONFIG.lora is not None:
        return y
    return y * p["w"]


def branch_on_a_key_of_a_dict(p, x):
    y = exp(x * p["w"])
    if "lora" in p:
        y = y * p["lora"]
    if "w" in p:
        y = y * p["w"]
    return y


def branch_on_a_shape(p, x):
    y = exp(x * p["w"])
    if x.shape[0] > 2:
        y = x
    return y * p["w"]


def normed(config, p, x):
    if not config.qk_norm:
        return x
    y = exp(x * p["w"])
    return y * p["w"]


def early_return_and_config_as_an_argument(p, x):
    return normed(CONFIG, p, x)


# --- objects


def layer(op, p, x):
    y = op.product(x, p["w"], "function: rows embed, embed -> rows")
    if op.config.qk_norm:
        y = exp(y)
    return y * p["w"]


def context_as_an_argument_and_its_methods(p, x):
    return layer(CONTEXT, p, x)


def method_that_indexes_a_tuple_of_functions(p, x):
    y = x
    for i in range(2):
        y = CONTEXT.step(i, y, p["w"])
    return y


def method_of_a_config_in_a_loop(p, x):
    y = x * 0
    for i in range(4):
        if CONFIG.is_sparse(i):
            y = y + exp(x * p["w"]) * p["w"]
    return y / 2


def method_with_a_default_and_a_branch(p, x):
    return exp(x * p["w"]) * CONTEXT.with_default(p["w"])


def method_with_star_args_and_a_loop(p, x):
    return exp(CONTEXT.with_star(x, p["w"])) * p["w"]


def primitive_made_inside(p, x):
    return ops.Exp()(ops.Mul()(x, p["w"])) * p["w"]


# --- dicts, tuples


def of_rows(rows):
    if "sin" in rows:
        return exp(rows["cos"] * rows["sin"]) * rows["sin"]
    return rows["cos"]


def dict_of_arrays_built_in_the_graph(p, x):
    return of_rows({"cos": x, "sin": p["w"]})


def item_set_after_the_literal(p, x):
    rows = {"cos": x}
    rows["sin"] = p["w"]
    return of_rows(rows)


def with_item(rows, w):
    rows["sin"] = w
    return of_rows(rows)


def item_set_in_an_argument(p, x):
    return with_item({"cos": x}, p["w"])


def dict_joined_by_stars(p, x):
    rows = {"cos": x}
    return of_rows({**rows, "sin": p["w"]})


def dict_joined_by_a_bar(p, x):
    return of_rows({"cos": x} | {"sin": p["w"]})


def dict_called(p, x):
    return of_rows(dict(cos=x, sin=p["w"]))


def items_of_a_dict(p, x):
    y = x * 0
    for _, w in p.items():
        y = y + exp(x * w) * w
    return y


def values_of_a_dict(p, x):
    y = x * 0
    for w in p.values():
        y = y + exp(x * w) * w
    return y


def keys_of_a_dict(p, x):
    rows, y = {"a": p["w"], "b": p["w"]}, x * 0
    for name in rows:
        y = y + exp(x * rows[name]) * rows[name]
    return y / 2


class Pair(NamedTuple):
    cos: object
    sin: object


PAIR = Pair(exp, mul)


def named_tuple_of_arrays(p, x):
    rows = Pair(x, p["w"])
    return exp(rows.cos * rows.sin) * rows.sin


def named_tuple_of_functions(p, x):
    return PAIR.cos(PAIR.sin(x, p["w"])) * p["w"]


@dataclasses.dataclass(frozen=True)
class Rows:
    cos: object
    sin: object


def dataclass_of_arrays(p, x):
    rows = Rows(x, p["w"])
    return exp(rows.cos * rows.sin) * rows.sin


# --- loops

STEPS = (exp_of_times, times)


def loop_over_a_range(p, x):
    y = x
    for i in range(len(STEPS)):
        y = STEPS[i](y, p["w"])
    return y


def loop_over_a_tuple_of_functions(p, x):
    y = x
    for step in STEPS:
        y = step(y, p["w"])
    return y


def joined(pairs):
    out = ()
    for a, b in pairs:
        out += (exp(a * b) * b,)
    return out


def loop_over_a_tuple_of_pairs_of_arrays(p, x):
    y = joined(((x, p["w"]), (x, p["w"])))
    return (y[0] + y[1]) / 2


def loop_over_zip(p, x):
    y = x * 0
    for a, w in zip((x, x), (p["w"], p["w"])):
        y = y + exp(a * w) * w
    return y / 2


def loop_over_enumerate(p, x):
    y = x * 0
    for _, w in enumerate((p["w"], p["w"])):
        y = y + exp(x * w) * w
    return y / 2


# --- arguments


def default_scale(a, scale=1):
    return a * scale


def default_without_a_branch(p, x):
    return exp(default_scale(x * p["w"])) * p["w"]


def default_or(a, scale=None):
    if scale is None:
        return a * 1
    return a * scale


def default_and_a_branch(p, x):
    return exp(default_or(x * p["w"])) * p["w"]


def default_given_and_a_branch(p, x):
    return exp(default_or(x * p["w"], None)) * p["w"]


def default_each(a, scale=1):
    for _ in range(2):
        a = a * scale
    return a


def default_and_a_loop(p, x):
    return exp(default_each(x * p["w"])) * p["w"]


class DefaultOr(nn.Cell):
    def construct(self, a, scale=None):
        if scale is None:
            return a * 1
        return a * scale


DEFAULT_OR = DefaultOr()


def cell_with_a_default_and_a_branch(p, x):
    return exp(DEFAULT_OR(x * p["w"])) * p["w"]


def scaled(a, scale):
    if scale is None:
        return a * 1
    return a * scale


def default_scaled(a, scale=None):
    return scaled(a, scale)


def default_whose_branch_is_in_another_function(p, x):
    return exp(default_scaled(x * p["w"])) * p["w"]


def passed_on(*factors):
    return times(*factors)


def star_args_without_a_loop(p, x):
    return exp(passed_on(x, p["w"])) * p["w"]


def product_of(*factors):
    y = factors[0]
    for i in range(1, len(factors)):
        y = y * factors[i]
    return y


def star_args_and_a_loop(p, x):
    return exp(product_of(x, p["w"])) * p["w"]


def product_or(a, *factors):
    if len(factors) == 1:
        return a * factors[0]
    return a


def star_args_and_a_branch(p, x):
    return exp(product_or(x, p["w"])) * p["w"]


@ops.constexpr
def planned(pattern, shape, sizes):
    """As a pattern of einops: the function of reshapes that it means."""
    reshape, rows = ops.Reshape(), shape[0] // sizes["b"]

    def rearranged(x):
        return reshape(reshape(x, (rows, sizes["b"])), shape)

    return rearranged


def rearrange(x, pattern, **sizes):
    return planned(pattern, x.shape, sizes)(x)


def keyword_sizes_passed_to_a_constexpr(p, x):
    return exp(rearrange(x * p["w"], "(a b) -> a b", b=2)) * rearrange(p["w"], "(a b) -> a b", b=x.shape[0])


def sized(a, **sizes):
    if "b" in sizes:
        return a * sizes["b"]
    return a


def keyword_sizes_and_a_branch(p, x):
    return exp(sized(x * p["w"], b=1)) * p["w"]


def of_itself(a, **sizes):
    return a * sizes["sizes"]


def keyword_named_as_the_double_star(p, x):
    return exp(of_itself(x * p["w"], sizes=1)) * p["w"]


def constant_by_keyword(p, x):
    return exp(default_scale(times(x * p["w"], b=1), scale=1)) * p["w"]


def constant_by_keyword_and_a_branch(p, x):
    return exp(scaled(x * p["w"], scale=None)) * p["w"]


def array_by_keyword(p, x):
    return exp(times(x, b=p["w"])) * p["w"]


def array_by_keyword_to_a_method(p, x):
    return exp(CONTEXT.times(x, b=p["w"])) * p["w"]


def by_size(a, **arrays):
    return a * arrays["b"]


def array_by_double_star(p, x):
    return exp(by_size(x, b=p["w"])) * p["w"]


# --- MindSpore's own


def ops_softmax(p, x):
    return exp(x * p["w"]) * p["w"] + 0 * ops.softmax(x, -1)


def ops_mean(p, x):
    return exp(x * p["w"]) * p["w"] + 0 * ops.mean(x)


def ops_arange(p, x):
    return exp(x * p["w"]) * p["w"] + 0 * ops.arange(2)


# Modes: the function called eagerly, in a graph, differentiated in a graph; used by the construct and, differentiated anew, by the bprop of
# one Cell, as parallel/graph/recompute.py does; and in a `while` of that bprop, as parallel/graph/scan.py does.
MODES = ("eager", "graph", "gradient", "backward", "loop")
EVERYWHERE = MODES
NO_BACKWARD = ("eager", "graph", "gradient")
EAGER = ("eager",)
# How the other modes fail.
EMPTY = "func graph is empty"
KEYWORD = "unexpected keyword argument"
NO_BPROP = "bprop not defined"
NO_MANAGER = "no manager for this func graph"
NOT_CONSTANT = "inputs should be constant"


class Rule(NamedTuple):
    fn: object
    works: tuple
    error: str = ""


RULES = (
    Rule(constexpr_returns_a_function, EVERYWHERE),
    Rule(constexpr_returns_a_function_with_a_branch_and_a_loop, EVERYWHERE),
    Rule(constexpr_returns_a_cell, EVERYWHERE),
    Rule(constexpr_returns_a_primitive, EVERYWHERE),
    Rule(constexpr_of_an_f_string, EVERYWHERE),
    Rule(constexpr_function_called_with_a_starred_tuple, EVERYWHERE),
    Rule(prebuilt_ops_by_signature, EVERYWHERE),  # the way back, if a release lets no constexpr return a function
    Rule(partial_made_inside_the_graph, EVERYWHERE),
    Rule(branch_on_an_attribute, EVERYWHERE),
    Rule(branch_on_a_property, EVERYWHERE),
    Rule(branch_on_a_string, EVERYWHERE),
    Rule(branch_on_none, EVERYWHERE),
    Rule(branch_on_a_key_of_a_dict, EVERYWHERE),
    Rule(branch_on_a_shape, EVERYWHERE),
    Rule(early_return_and_config_as_an_argument, EVERYWHERE),
    Rule(context_as_an_argument_and_its_methods, EVERYWHERE),
    Rule(method_that_indexes_a_tuple_of_functions, EVERYWHERE),
    Rule(method_of_a_config_in_a_loop, EVERYWHERE),
    Rule(method_with_a_default_and_a_branch, EVERYWHERE),
    Rule(method_with_star_args_and_a_loop, EVERYWHERE),
    Rule(primitive_made_inside, EVERYWHERE),
    Rule(dict_of_arrays_built_in_the_graph, EVERYWHERE),
    Rule(item_set_after_the_literal, EVERYWHERE),
    Rule(item_set_in_an_argument, EVERYWHERE),
    Rule(keys_of_a_dict, EVERYWHERE),
    Rule(loop_over_a_range, EVERYWHERE),
    Rule(loop_over_a_tuple_of_functions, EVERYWHERE),
    Rule(loop_over_a_tuple_of_pairs_of_arrays, EVERYWHERE),
    Rule(default_without_a_branch, EVERYWHERE),
    Rule(default_whose_branch_is_in_another_function, EVERYWHERE),
    Rule(star_args_without_a_loop, EVERYWHERE),
    Rule(keyword_sizes_passed_to_a_constexpr, EVERYWHERE),
    Rule(constant_by_keyword, EVERYWHERE),
    Rule(default_and_a_branch, NO_BACKWARD, EMPTY),
    Rule(default_given_and_a_branch, NO_BACKWARD, EMPTY),
    Rule(default_and_a_loop, NO_BACKWARD, EMPTY),
    Rule(cell_with_a_default_and_a_branch, NO_BACKWARD, EMPTY),
    Rule(star_args_and_a_loop, NO_BACKWARD, EMPTY),
    Rule(star_args_and_a_branch, NO_BACKWARD, EMPTY),
    Rule(keyword_sizes_and_a_branch, NO_BACKWARD, EMPTY),
    Rule(constant_by_keyword_and_a_branch, NO_BACKWARD, EMPTY),
    Rule(loop_over_zip, NO_BACKWARD, EMPTY),
    Rule(loop_over_enumerate, NO_BACKWARD, EMPTY),
    Rule(ops_softmax, NO_BACKWARD, EMPTY),
    Rule(ops_mean, NO_BACKWARD, EMPTY),
    Rule(ops_arange, NO_BACKWARD, EMPTY),
    Rule(array_by_keyword, NO_BACKWARD, KEYWORD),
    Rule(array_by_keyword_to_a_method, NO_BACKWARD, KEYWORD),
    Rule(array_by_double_star, NO_BACKWARD, KEYWORD),
    Rule(items_of_a_dict, NO_BACKWARD, NO_BPROP),
    Rule(values_of_a_dict, NO_BACKWARD, NO_BPROP),
    Rule(named_tuple_of_arrays, EAGER, NOT_CONSTANT),
    Rule(named_tuple_of_functions, EAGER, "cannot get attributes cos"),
    Rule(dataclass_of_arrays, EAGER, NOT_CONSTANT),
    Rule(dict_joined_by_stars, EAGER, "does not match expected type 'Tensor'"),
    Rule(dict_joined_by_a_bar, EAGER, "bitwise_or"),
    Rule(dict_called, EAGER, NOT_CONSTANT),
    Rule(keyword_named_as_the_double_star, EAGER, "'int' object is not subscriptable"),
    Rule(constexpr_returns_a_function_of_star_args, EAGER, NO_MANAGER),
    Rule(constexpr_returns_a_function_of_sizes, EAGER, NO_MANAGER),
    Rule(constexpr_returns_a_function_with_a_default, EAGER, NO_MANAGER),
    Rule(constexpr_function_called_by_keyword, EAGER, NO_MANAGER),
    Rule(constexpr_returns_a_partial, EAGER, NOT_CONSTANT),
    Rule(partial_made_outside_the_graph, EAGER, NOT_CONSTANT),
)
BY_NAME = {rule.fn.__name__: rule for rule in RULES}


class Backward(nn.Cell):
    """A function whose backward computes it again, as those of parallel/graph/recompute.py do."""

    def __init__(self, fn):
        super().__init__()
        self.fn, self.vjp, self.zeros_like = fn, ops.GradOperation(get_all=True, sens_param=True), ops.ZerosLike()

    def construct(self, w, x):
        return self.fn(w, x)

    def bprop(self, w, x, out, dout):
        return self.vjp(self.fn)(w, x, dout)


class Loop(Backward):
    """The same in a loop of the backward, as in parallel/graph/scan.py."""

    def bprop(self, w, x, out, dout):
        i = Tensor(0, ms.int32)
        dw, dx = self.zeros_like(w), self.zeros_like(x)
        while i < 3:
            back = self.vjp(self.fn)(w, x, dout)
            dw, dx = dw + back[0], dx + back[1]
            i = i + 1
        return dw / 3, dx / 3


def check(fn, mode):
    """Raises an AssertionError where the result, or a gradient, is wrong; whatever MindSpore raises where it refuses the function."""
    w, x = np.array([0.3, -0.2], np.float32), np.array([0.5, 0.7], np.float32)
    y = np.exp(x * w) * w

    def of_leaves(w, x):
        return fn({"w": w}, x)

    body = {"backward": Backward, "loop": Loop}.get(mode, lambda body: body)(of_leaves)

    def loss(w, x):
        return body(w * 1, x * 1).sum()

    @ms.jit(fullgraph=True)
    def graph(w, x):
        return of_leaves(w, x)

    @ms.jit(fullgraph=True)
    def gradient(w, x):
        return ms.value_and_grad(loss, (0, 1))(w, x)

    if mode in ("eager", "graph"):
        out = (of_leaves if mode == "eager" else graph)(Tensor(w), Tensor(x))
        np.testing.assert_allclose(out.asnumpy(), y, rtol=1e-6)
    else:
        value, (dw, dx) = gradient(Tensor(w), Tensor(x))
        np.testing.assert_allclose(float(value), y.sum(), rtol=1e-6)
        np.testing.assert_allclose(dw.asnumpy(), np.exp(x * w) * (1 + x * w), rtol=1e-6)
        np.testing.assert_allclose(dx.asnumpy(), y * w, rtol=1e-6)


# The loop has the others in it: the function in a graph, and its gradient in a backward. What works there has worked in all.
RESTED_ON = [
    pytest.param(name, mode, marks=() if mode in ("eager", "loop") else pytest.mark.slow)
    for name, rule in BY_NAME.items()
    if rule.works == EVERYWHERE
    for mode in MODES
]
AVOIDED = {name: rule for name, rule in BY_NAME.items() if rule.works != EVERYWHERE}
FAILING = {name: [mode for mode in MODES if mode not in rule.works] for name, rule in AVOIDED.items()}
FIRST_FAILING = [(name, modes[0]) for name, modes in FAILING.items()]
OTHER_FAILING = [(name, mode) for name, modes in FAILING.items() for mode in modes[1:]]


@pytest.mark.parametrize("name, mode", RESTED_ON)
def test_what_the_code_rests_on_works(name, mode):
    check(BY_NAME[name].fn, mode)


@pytest.mark.parametrize("name", AVOIDED)
def test_what_the_code_avoids_works_eagerly(name):
    check(BY_NAME[name].fn, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name, mode", [(name, mode) for name, rule in AVOIDED.items() for mode in rule.works[1:]])
def test_what_the_code_avoids_works_elsewhere(name, mode):
    check(BY_NAME[name].fn, mode)


@pytest.fixture(scope="module")
def first_outcomes(tmp_path_factory):
    return outcomes_of(FIRST_FAILING, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def other_outcomes(tmp_path_factory):
    return outcomes_of(OTHER_FAILING, tmp_path_factory.mktemp("other"))


@pytest.mark.slow
@pytest.mark.parametrize("name, mode", FIRST_FAILING)
def test_what_the_code_avoids_still_fails(name, mode, first_outcomes):
    still_fails(name, mode, first_outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("name, mode", OTHER_FAILING)
def test_what_the_code_avoids_still_fails_in_the_other_modes(name, mode, other_outcomes):
    still_fails(name, mode, other_outcomes)


def still_fails(name, mode, outcomes):
    outcome, error = outcomes[f"{name} {mode}"], BY_NAME[name].error
    assert outcome != "works", (
        f"this MindSpore behaves otherwise than 2.10: it works; then simplify: add {mode!r} to the row and mend docs/mindspore.md"
    )
    crashed = error == EMPTY and outcome in CRASHES
    assert error in outcome or crashed, f"it fails, but otherwise than with MindSpore 2.10: {outcome}"


CRASHES = [f"ended by signal {number}" for number in (signal.SIGSEGV, signal.SIGABRT)]


def outcomes_of(cases, folder):
    """{"name mode": "works", or how it fails}, from a program that runs each case in a process of its own. MindSpore writes into folder."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), "GLOG_v": "4"}
    command = [sys.executable, "-m", "tests.parallel.test_mindspore_styles", json.dumps(cases)]
    ran = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, timeout=500, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def main(cases):
    print(json.dumps({f"{name} {mode}": outcome(name, mode) for name, mode in json.loads(cases)}))


def outcome(name, mode):
    """Of a forked process, so that a crash ends that one alone; MindSpore has run nothing in this one."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            check(BY_NAME[name].fn, mode)
            text = "works"
        except Exception as error:  # whichever: the test reads its text
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:2000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    return text or f"ended by signal {os.WTERMSIG(status)}"


if __name__ == "__main__":
    main(sys.argv[1])
