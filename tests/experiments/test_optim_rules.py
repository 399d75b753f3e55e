"""Lion and SGD: their formulas, what is kept of them, and a run that goes on. In layouts: tests/parallel/test_layouts.py."""

import mindspore as ms
import numpy as np
import pytest

from experiments import flags
from experiments.train import lr_groups, optim, optim_rules
from experiments.train import program as train_program
from experiments.train.state import placements
from experiments.watch.monitors import Monitor
from parallel import matrices
from parallel.graph.jit import jit
from parallel.graph.nested import to_tuple
from parallel.mesh import ONE_DEVICE, Mesh
from parallel.specs import ParamSpec, init_params, normal
from parallel.trees import tree_leaves, tree_map, tree_paths
from qwen3.model import param_specs
from tests.experiments.test_train import make_batch, optim_config, optimizer_step
from tests.parallel import layouts
from tests.tiny import DENSE, FUSED, REFERENCE, random_params

RULES = tuple(optim_rules.RULES)


def formula(name, o, params, grads, lrs):
    """(params, m) in float64, from dicts of arrays."""
    params, m = ({k: x.astype(np.float64) * scale for k, x in params.items()} for scale in (1, 0))
    for g, lr in zip(grads, lrs):
        norm = np.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in g.values()))
        for k, x in g.items():
            x = x * min(1.0, o.clip_norm / (norm + 1e-6))
            m[k], step = {
                "lion": lambda m, x: (o.b2 * m + (1 - o.b2) * x, np.sign(o.b1 * m + (1 - o.b1) * x)),
                "sgd": lambda m, x: (o.b1 * m + x, o.b1 * m + x),
            }[name](m[k], x)
            params[k] = params[k] * (1 - lr * (o.weight_decay if x.ndim > 1 else 0)) - lr * step
    return params, m


@pytest.mark.parametrize("name", RULES)
def test_an_optimizer_equals_its_formula(name):
    specs = {"matrix": ParamSpec((5, 4), ("embed", "ffn"), normal(1.0)), "vector": ParamSpec((6,), ("embed",), normal(1.0))}
    o, lrs = optim_config(name=name, clip_norm=0.5, weight_decay=0.3), [0.1, 0.02, 0.3]
    start, grads = init_params(specs, 0), [init_params(specs, seed) for seed in (1, 2, 3)]
    params = tuple(map(ms.Tensor, start.values()))
    state, update = optim.init_state(params, o), optimizer_step(specs, o, FUSED)
    assert set(state) == {"m", "norm"}
    m, norm = state["m"], state["norm"]
    for at, (g, lr) in enumerate(zip(grads, lrs)):
        new, norm, _, _ = update(params, to_tuple(tree_map(ms.Tensor, g)), m, None, norm, optim.scalars(o, lr, at))
        params, m = ([leaf[i] for leaf in new] for i in range(2))
    for wants, got in zip(formula(name, o, start, grads, lrs), (params, m)):
        for want, x in zip(wants.values(), got):
            np.testing.assert_allclose(x.asnumpy(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_a_skipped_update_changes_nothing(name):
    o, specs = optim_config(name=name, skip_spikes=3.0), {"w": ParamSpec((2, 2), ("embed", "ffn"), normal(1.0))}
    update, p, m = optimizer_step(specs, o, FUSED), ms.Tensor(np.ones((2, 2), np.float32)), ms.Tensor(np.full((2, 2), 0.5, np.float32))
    for size, skips in ((100.0, 1), (float("nan"), 1), (1.0, 0)):
        g, norm = ms.Tensor(np.full((2, 2), size, np.float32)), ms.Tensor(2.0, ms.float32)
        new, _, _, skipped = update((p,), (g,), (m,), None, norm, optim.scalars(o, 0.1, 30))
        assert int(skipped) == skips
        assert skips == (np.array_equal(new[0][0].asnumpy(), p.asnumpy()) and np.array_equal(new[0][1].asnumpy(), m.asnumpy()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RULES, "muon"])
def test_a_restored_run_goes_on_bit_for_bit_and_its_gradients_are_seen(name):
    config = layouts.run_config({"optim": name})
    program, found = train_program.build_program(DENSE, config), {}
    state = program.init(tree_map(lambda w: w.asnumpy(), random_params(DENSE)))
    monitor = Monitor(program, ONE_DEVICE, config.optim, 1, lambda step, values: found.update({step: values}))
    for at in range(2):
        state, metrics = monitor.step(state, make_batch(at, vocab=DENSE.vocab_size), 1e-2, at)
        norms = [value for key, value in found[at + 1].items() if key.startswith("grad_norm/")]
        assert len(norms) == DENSE.num_layers + 2 and np.sqrt(np.square(norms).sum()) == pytest.approx(metrics["grad_norm"], rel=1e-4)
    saved = {h.names[0]: h.data.asnumpy().copy() for h in program.held(state)}
    assert {key.split("/")[0] for key in saved} == {"params", *optim_rules.MOMENTS[name]}
    again = program.restore(lambda key, slices: saved[key][slices], float(state["norm"]))
    ends = [program.step(s, make_batch(2, vocab=DENSE.vocab_size), 1e-2, 2) for s in (state, again)]
    assert ends[0][1] == ends[1][1]
    for (path, a), b in zip(tree_paths(program.params(ends[0][0])), tree_leaves(program.params(ends[1][0])), strict=True):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy(), err_msg=path)


def test_every_optimizer_may_be_named_and_no_other():
    ok, rule = flags.CHECKS["optim.name"]
    assert all(map(ok, optim_rules.MOMENTS)) and not ok("adam") and set(optim_rules.MOMENTS) == {"adamw", "muon", *RULES}
    assert all(name in rule for name in optim_rules.MOMENTS)


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw():
    """Two experts' matrices at once, one that is high, and one of the vocabulary, over two steps, in float64."""
    o = optim_config(name="muon", clip_norm=0.0, weight_decay=0.3)
    specs = {
        "experts": ParamSpec((2, 4, 7), ("experts", "embed", "ffn"), normal(1.0)),
        "high": ParamSpec((9, 5), ("ffn", "embed"), normal(1.0)),
        "embed": ParamSpec((6, 4), ("vocab", "embed"), normal(1.0)),
    }
    adamw, start, grads = optim_config(clip_norm=0.0, weight_decay=0.3), init_params(specs, 0), [init_params(specs, s) for s in (1, 2)]
    ends = []
    for options in (o, adamw):
        params, update = tuple(ms.Tensor(x.copy()) for x in start.values()), optimizer_step(specs, options, FUSED)
        state = optim.init_state(params, options)
        m, v, norm = state["m"], state["v"], state["norm"]
        for at, g in enumerate(grads):
            new, norm, _, _ = update(params, to_tuple(tree_map(ms.Tensor, g)), m, v, norm, optim.scalars(options, 0.1, at))
            params, m, v = ([leaf[i] for leaf in new] for i in range(3))
        ends.append([x.asnumpy() for x in params])
    np.testing.assert_array_equal(ends[0][2], ends[1][2])
    for name, got in zip(("experts", "high"), ends[0]):
        w, moment = start[name].astype(np.float64), 0.0
        for g in grads:
            moment = o.muon_momentum * moment + g[name]
            w = w * (1 - 0.1 * 0.3) - 0.1 * 0.2 * np.sqrt(max(w.shape[-2:])) * turned(g[name] + o.muon_momentum * moment)
        np.testing.assert_allclose(got, w, rtol=1e-4, atol=1e-5)


def turned(x):
    """The iteration on singular values alone, of matrices on the last two dims."""
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s = s / np.sqrt((s**2).sum(-1, keepdims=True))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert 0.3 < s.min() and s.max() < 1.3  # these have no small ones
    return (u * s[..., None, :]) @ v


SHARDS = {  # name -> (shape of a rank's shard, atoms of its dims, [(kind, count, padded)] of the moves)
    "a single matrix over two axes": ((4, 6), (("dp0",), ("tp0",)), [("AllGather", 1, 1), ("AllGather", 1, 1)]),
    "five layers over two ranks": ((5, 4, 6), ((), ("dp0",), ()), [("AlltoAll", 5, 6)]),
    "layers and experts": ((3, 2, 4, 6), ((), ("ep0",), ("tp0",), ("dp0",)), [("AlltoAll", 6, 6), ("AlltoAll", 3, 4)]),
    "fewer layers than ranks": ((2, 4, 6), ((), ("dp0", "tp0"), ()), [("AlltoAll", 2, 2), ("AllGather", 1, 1)]),
    "not sharded": ((2, 4, 6), ((), (), ()), []),
}


@pytest.mark.parametrize("name", SHARDS)
def test_ranks_exchange_stacked_matrices_and_gather_single_ones(name):
    shape, axes, want = SHARDS[name]
    found = matrices.moves(Mesh(dp=2, tp=2), shape, axes)
    assert [(move.kind, move.count, move.padded) for move in found] == want


STACK, PER_LAYER = 3, (0.5, 1.0, 2.0)  # factors of the layers of a stack


def grouped_step(o, specs, factors, params, grads, kernels):
    """Three steps with factors of the learning rate. factors: of each parameter, or of its layers."""
    rates = tuple(optim._own_rate(each) for each in factors) if factors else None
    clip, update = optim.build_clip(specs, o, kernels), optim.build_update(specs, o, kernels, rates)

    def step(params, grads, m, v, mean_norm, values):
        norm, factor, keep, mean_norm = clip(grads, mean_norm, values, ())
        return update(params, grads, m, v, factor, keep, values)

    step, state = jit(step), optim.init_state(params, o)
    m, v = state["m"], state.get("v")
    for at, g in enumerate(grads):
        new = step(params, g, m, v, state["norm"], optim.scalars(o, 0.1, at))
        params, m = (tuple(leaf[i] for leaf in new) for i in range(2))
        v = tuple(leaf[2] for leaf in new) if v is not None else None
    return [x.asnumpy().copy() for x in params]


@pytest.mark.extended(but=("adamw-fused", "muon-fused"))
@pytest.mark.parametrize("kernels", [REFERENCE, FUSED], ids=["reference", "fused"])
@pytest.mark.parametrize("name", sorted(optim_rules.MOMENTS))
def test_stacked_layers_move_by_their_own_learning_rates_as_single_ones_do(name, kernels):
    o, rng = optim_config(name=name, clip_norm=0.0, weight_decay=0.3), np.random.default_rng(0)
    start, *grads = rng.standard_normal((4, STACK, 5, 7)).astype(np.float32)

    def tensors(x):
        return tuple(ms.Tensor(np.ascontiguousarray(each)) for each in x)

    single = {str(i): ParamSpec((5, 7), ("embed", "ffn"), normal(1.0)) for i in range(STACK)}
    stack = {"all": ParamSpec((STACK, 5, 7), ("layers", "embed", "ffn"), normal(1.0))}
    one_by_one = grouped_step(o, single, [(f,) for f in PER_LAYER], tensors(start), [tensors(g) for g in grads], kernels)
    (stacked,) = grouped_step(o, stack, [PER_LAYER], tensors([start]), [tensors([g]) for g in grads], kernels)
    plain = grouped_step(o, single, None, tensors(start), [tensors(g) for g in grads], kernels)
    for i, factor in enumerate(PER_LAYER):
        np.testing.assert_allclose(stacked[i], one_by_one[i], rtol=2e-6, atol=1e-6)
        assert factor == 1.0 or np.abs(one_by_one[i] - plain[i]).max() > 1e-2
    np.testing.assert_array_equal(one_by_one[1], plain[1])  # a factor of 1 changes no bit


GROUPS = "layers.*=0.5,layers.1.*norm=3,embed=0.1,layers.0.attention.wq=0.25"


def test_a_pattern_names_one_layer_of_a_stack():
    """The factors that each array of a step gets."""
    config, sharding = layouts.run_config({"groups": GROUPS}), layouts.sharding_of(DENSE, {})
    found = {}
    for looped in (False, True):
        placed = placements(DENSE, sharding, looped)
        for (path, _), x in zip(tree_paths(placed), tree_leaves(optim.own_rates(config.optim, placed))):
            found[looped, path] = x.asnumpy()[..., 0].tolist()
            assert (x.asnumpy()[..., 1:] == 1).all()
    assert found[True, "layers.attention.wq"] == [found[False, f"layers.{i}.attention.wq"] for i in range(2)] == [0.25, 0.5]
    assert found[True, "layers.mlp_norm"] == [found[False, f"layers.{i}.mlp_norm"] for i in range(2)] == [0.5, 3]
    assert found[True, "layers.mlp.w_up"] == 0.5 and found[True, "embed"] == found[False, "embed"] == pytest.approx(0.1)
    assert found[True, "final_norm"] == 1
    config.optim.lr_groups = ""
    assert optim.own_rates(config.optim, placed) is None


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_a_pattern_reaches_one_layer_also_where_layers_are_looped_over(loop):
    """One step of SGD without momentum, clipping or decay: each parameter moves by its own factor."""
    moved = {}
    for groups in ("", GROUPS):
        config = layouts.run_config({"optim": "sgd", "loop": loop})
        config.optim.b1 = config.optim.weight_decay = config.optim.clip_norm = 0.0
        config.optim.lr_groups = groups
        program = train_program.build_program(DENSE, config)
        start = tree_map(lambda w: w.asnumpy().copy(), random_params(DENSE))
        state, _ = program.step(program.init(start), make_batch(0, vocab=DENSE.vocab_size), 1e-1, 0)
        before = dict(tree_paths(start))
        moved[groups] = {path: w.asnumpy() - before[path] for path, w in tree_paths(program.params(state))}
    for path, step in moved[""].items():
        want = {"embed": 0.1, "layers.0.attention.wq": 0.25, "final_norm": 1.0}.get(
            path, 3.0 if path.startswith("layers.1.") and path.endswith("norm") else 0.5
        )
        np.testing.assert_allclose(moved[GROUPS][path], want * step, rtol=1e-3, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    "text, why",
    [
        ("layers.9.*=2", "'layers.9.\\*' matches no parameter"),
        ("embd=2", "'embd' matches no parameter; did you mean 'embed'"),
        ("embed", "'embed' must be PATTERN=FACTOR, such as"),
        ("embed=x", "'embed=x' must be PATTERN=FACTOR"),
        ("embed=-1", "'embed=-1' must be PATTERN=FACTOR"),
        ("=2", "'=2' must be PATTERN=FACTOR"),
        ("embed=inf", "'embed=inf' must be PATTERN=FACTOR"),
        ("embed=0", "'embed=0' trains nothing of what it matches; use --config.train.freeze_include='embed'"),
        ("layers.0.*=2", "'layers.0.\\*' matches only what has no learning rate: frozen parameters or the router's bias"),
    ],
)
def test_a_group_that_would_change_nothing_is_an_error(text, why):
    with pytest.raises(ValueError, match=f"optim.lr_groups: {why}"):
        lr_groups.check(text, param_specs(DENSE.replace(frozen=(("layers.0.*",), ()))))


def test_the_last_pattern_that_matches_counts():
    groups = lr_groups.parse(" *=2, layers.1.* = 0.5 ,layers.1.mlp.*=3,")
    assert [lr_groups.factor(groups, path) for path in ("embed", "layers.0.mlp.w_up", "layers.1.attention.wq", "layers.1.mlp.w_up")] == [
        2,
        2,
        0.5,
        3,
    ]
    lr_groups.check("layers.1.*=2,*norm=3", param_specs(DENSE))
