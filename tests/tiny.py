"""Tiny configs, random parameters, packed batches and the one measure of error that tests share."""

from dataclasses import replace

import mindspore as ms
import numpy as np

from experiments.data.packing import pack
from ops import registry
from parallel.specs import init_params, normal
from parallel.trees import tree_leaves, tree_map, tree_paths, unflatten
from qwen3.config import Qwen3Config
from qwen3.model import param_specs

DENSE = Qwen3Config(
    vocab_size=61,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=40,
    max_position=64,
    rope_theta=1e4,
    initializer_range=0.2,
    tie_embeddings=True,
)
QWEN2 = DENSE.replace(model_type="qwen2", qk_norm=False, qkv_bias=True, tie_embeddings=False, num_kv_heads=1)
MOE = DENSE.replace(
    model_type="qwen3_moe",
    tie_embeddings=False,
    num_experts=6,
    experts_per_token=2,
    moe_ffn_size=16,
    router_aux_coef=0.02,
    router_z_coef=0.003,
    moe_block_size=4,
)
MIXED = MOE.replace(num_layers=3, mlp_only_layers=(1,), norm_topk_prob=False)
KINDS = {"dense": DENSE, "qwen2": QWEN2, "moe": MOE, "mixed": MIXED}

FUSED = registry.choose({}, "CPU", "float32")
REFERENCE = registry.Kernels()


def random_params(cfg, seed=0):
    """A tree of float32 tensors in which nothing is 0 or 1: norms and biases are moved by noise too."""
    specs = param_specs(cfg)
    noise = init_params(tree_map(lambda s: replace(s, init=normal(0.2)), specs), seed + 1)

    def value(spec, start, moved):
        return ms.Tensor(start if spec.init[0] == "normal" else start + moved)

    return tree_map(value, specs, init_params(specs, seed), noise)


def documents(cfg, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, cfg.vocab_size, n) for n in lengths]


def packed_batch(cfg, lengths=(5, 9, 3, 7), seq_len=16, seed=0):
    """loss_fn's batch: documents of these lengths, each with an end token (0) after it, in rows of seq_len; the last is padded."""
    return tree_map(ms.Tensor, pack(documents(cfg, lengths, seed), seq_len, 0))


def error(reference, value):
    """max|a - b| / max|a|, and inf for a tensor that is not 0 where the reference is."""
    a, b = host(reference).astype(np.float64), host(value).astype(np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    difference, largest = np.abs(a - b).max(), np.abs(a).max()
    return difference / largest if largest else (0.0 if difference == 0 else np.inf)


def host(x):
    return x.asnumpy() if hasattr(x, "asnumpy") else np.asarray(x)


def assert_close(reference, value, tolerance, name=""):
    found = error(reference, value)
    assert found <= tolerance, f"{name}: error {found:.3g} is above {tolerance:.3g}"


def assert_trees_close(reference, value, tolerance):
    """The same for every leaf, by path."""
    a, b = dict(tree_paths(reference)), dict(tree_paths(value))
    assert list(a) == list(b)
    for path in a:
        assert_close(a[path], b[path], tolerance, path)


def stack_layers(params):
    """params, of arrays or tensors, with `layers` as one tree of tensors stacked on a new first dim, for build(cfg, scan=True)."""
    leaves = [tree_leaves(layer) for layer in params["layers"]]
    stacked = [ms.Tensor(np.stack([host(leaf) for leaf in same])) for same in zip(*leaves)]
    return {**params, "layers": unflatten(params["layers"][0], stacked)}


def unstack_layers(params):
    """stack_layers undone."""
    layers = params["layers"]
    each = [unflatten(layers, [ms.Tensor(host(w)[i]) for w in tree_leaves(layers)]) for i in range(tree_leaves(layers)[0].shape[0])]
    return {**params, "layers": each}
