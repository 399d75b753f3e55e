"""Models with matrices in 8 bits compute what the floats compute that these stand for, in every way that a model is called."""

import mindspore as ms
import numpy as np
import pytest

from ops.int8 import dequantize, is_int8
from parallel.mesh import Mesh
from parallel.placement import place
from parallel.sharding import Sharding
from parallel.trees import tree_paths
from qwen3 import generate
from qwen3.engine import Engine, Request
from qwen3.int8 import MATRICES, Quantised, int8_specs, quantised
from qwen3.model import build, forward, param_specs
from tests.tiny import FUSED, KINDS, REFERENCE, assert_close, host, random_params

GROUP = 8  # so that there are several groups in the small matrices of the tests


def with_floats(tree, name=""):
    """A tree of parameters whose matrices in 8 bits are floats again, in the order of dims of param_specs."""
    if is_int8(tree) and set(tree) == {"int8", "scale"}:
        w = dequantize(host(tree["int8"]), host(tree["scale"]))
        return ms.Tensor(np.ascontiguousarray(np.swapaxes(w, -1, -2)) if name in MATRICES else w)
    if isinstance(tree, dict):
        return {key: with_floats(branch, key) for key, branch in tree.items()}
    return [with_floats(branch) for branch in tree] if isinstance(tree, list) else tree


def pair(kind):
    """(cfg, parameters in 8 bits, the floats that they stand for)."""
    cfg = KINDS[kind]
    params = quantised(cfg, random_params(cfg), GROUP)
    return cfg, params, with_floats(params)


def tokens(cfg, *shape):
    return np.random.default_rng(0).integers(1, cfg.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_all_matrices_and_nothing_else_are_in_8_bits(kind):
    cfg, params, floats = pair(kind)
    specs, given = dict(tree_paths(param_specs(cfg))), dict(tree_paths(params))
    for path, spec in specs.items():
        in_8_bits = len(spec.shape) > 1 and not path.endswith("router")
        assert (f"{path}.int8" in given) == in_8_bits and (path in given) != in_8_bits, path
    wanted = dict(tree_paths(int8_specs(param_specs(cfg), GROUP)))
    assert {path: tuple(w.shape) for path, w in given.items()} == {path: spec.shape for path, spec in wanted.items()}
    for path, w in tree_paths(random_params(cfg)):
        difference = np.abs(host(w) - host(dict(tree_paths(floats))[path])).max()
        assert difference <= np.abs(host(w)).max() / 254 * 1.001, path


@pytest.mark.extended(but=("*cpu",))
@pytest.mark.parametrize("kernels", [FUSED, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_floats(kind, kernels):
    cfg, params, floats = pair(kind)
    x = ms.Tensor(tokens(cfg, 2, 11))
    model = build(cfg, kernels=kernels)
    assert_close(forward(floats, x, cfg)[0], model.forward(params, x)[0], 1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_scores_are_those_of_the_floats(kind):
    cfg, params, floats = pair(kind)
    x, y = tokens(cfg, 2, 9), tokens(cfg, 2, 9)[:, ::-1].copy()
    positions, segments = np.tile(np.arange(9, dtype=np.int32), (2, 1)), np.ones((2, 9), np.int32)
    given = [ms.Tensor(a) for a in (x, y, positions, segments)]
    for a, b in zip(build(cfg).score(floats, *given), build(cfg).score(params, *given)):
        assert_close(a, b, 1e-5)


@pytest.mark.extended(but=("dense-cpu",))
@pytest.mark.parametrize("kernels", [FUSED, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_prefill_and_decode_are_those_of_the_floats(kind, kernels):
    """The C++ kernels decode in fused ops, and the reference op by op."""
    cfg, params, floats = pair(kind)
    prompts, steps = [[5, 3, 9], [2, 7, 1, 8, 4]], tokens(cfg, 3, 2)
    (a, cache_a), (b, cache_b) = (generate.prefill(p, prompts, cfg, 16, k) for p, k in ((floats, FUSED), (params, kernels)))
    assert_close(a, b, 1e-5)
    for i, step in enumerate(steps):
        at = np.array([3, 5], np.int32) + i
        a, cache_a = generate.decode_step(floats, cache_a, step, at, cfg, FUSED)
        b, cache_b = generate.decode_step(params, cache_b, step, at, cfg, kernels)
        assert_close(a, b, 1e-5)


@pytest.mark.extended(but=("dense",))
@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_the_engine_gives_the_text_of_the_floats(kind):
    cfg, params, floats = pair(kind)
    prompts, texts = [[5, 3, 9], [2, 7, 1, 8, 4], [6] * 9], []
    for p in (floats, params):
        engine = Engine(p, cfg, slots=2, length=64, prefill_chunk=8)
        numbers, found = [engine.submit(Request(prompt, max_new_tokens=12)) for prompt in prompts], {}
        while engine.busy():
            for event in engine.step():
                found.setdefault(event.id, []).append(event.token)
        texts.append([found[number] for number in numbers])
    assert texts[0] == texts[1]


def test_a_layout_that_would_cut_a_group_is_refused_by_name():
    specs, sharding = {"mlp": param_specs(KINDS["dense"])["layers"][0]["mlp"]}, Sharding(Mesh(tp=2))
    placed = dict(tree_paths(place(sharding, int8_specs(specs, 4))))
    assert placed["mlp.w_down.scale"].used == placed["mlp.w_down.int8"].used and any(placed["mlp.w_down.scale"].used)
    with pytest.raises(ValueError, match=r"mlp.w_down.scale: dim 'ffn' has 5, which the 2 ranks of tp do not divide; use 1, 5"):
        place(sharding, int8_specs(specs, 8))


def test_a_matrix_is_read_once_and_a_slice_of_it_has_the_numbers_of_the_whole():
    cfg = KINDS["dense"]
    params, asked = dict(tree_paths(random_params(cfg))), []

    def read(path, slices):
        asked.append(path)
        return host(params[path])[slices]

    specs = param_specs(cfg)
    whole, part = (Quantised(read, specs, GROUP).read for _ in range(2))
    all_of, rows, columns = slice(0, 24), slice(8, 24), slice(8, 24)  # w_down is [F=40, D=24], in 8 bits [24, 40]
    numbers = whole("layers.1.mlp.w_down.int8", (all_of, slice(0, 40)))
    scale = whole("layers.1.mlp.w_down.scale", (all_of, slice(0, 5)))
    assert asked == ["layers.1.mlp.w_down"]
    np.testing.assert_array_equal(part("layers.1.mlp.w_down.int8", (rows, columns)), numbers[rows, columns])
    np.testing.assert_array_equal(part("layers.1.mlp.w_down.scale", (rows, slice(1, 3))), scale[rows, 1:3])
    assert len(asked) == 2
    np.testing.assert_array_equal(part("layers.1.mlp.w_down.scale", (all_of, slice(0, 5))), scale)  # of another slice: read again
    assert len(asked) == 3
