"""Whether the fused ops of decoding compute the layer that qwen3/model.py and layers/ describe.

A token is decoded in two ops a layer where the fields of the config allow it (layers/op_table.py). An edit of a function shows in no
field. So one token of a small layer is decoded both ways before a model generates, and where they differ its ops run one by one.
"""

import functools
import warnings

import mindspore as ms
import numpy as np

from layers.bound_ops import BoundOps
from parallel.sharding import Sharding
from parallel.specs import init_array
from parallel.trees import tree_map, tree_paths, unflatten
from qwen3.model import build, decode_layer, layer, layer_specs, rows_over_cache

# The sizes of the small layer. head_dim stays, as kernels are chosen by it
SMALL = dict(hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48)
SMALL_MOE = dict(num_experts=4, experts_per_token=2, moe_ffn_size=16)
SLOTS, AT = 8, (3, 5)  # the slots of a small cache, and in it the positions of two rows
TOLERANCE = 1e-3  # of the largest element: kernels round differently, and another layer differs by far more


def build_to_decode(cfg, sharding=None, kernels=None, rows_alone=False):
    """Returns qwen3.model.build with these arguments, whose layers decode in fused ops only where these agree with the layer."""
    model = build(cfg, sharding, kernels=kernels, rows_alone=rows_alone)
    for op in {id(op): op for op in model.op.of_layer}.values():
        if op.fused_decode and not agrees(op.cfg, op.kernels):
            warnings.warn("the fused ops of decoding do not compute this model's layer; its tokens are decoded op by op", stacklevel=2)
            op.fused_decode = False
    return model


@functools.lru_cache(maxsize=32)
def agrees(cfg, kernels):
    """Whether decode_layer gives what `layer` gives, the new keys and values included, for one token a row of a small layer of this kind.
    False for a config that allows no such sizes."""
    try:
        cfg = cfg.replace(**SMALL, **(SMALL_MOE if cfg.num_experts else {}))
    except ValueError:
        return False
    op, rng = BoundOps(cfg, Sharding(), kernels), np.random.default_rng(0)
    specs = layer_specs(cfg, 0)
    # noise on every initial value, so that a new scale of 1 or a new bias of 0 shows
    values = [init_array(spec, path, 0) + rng.normal(0, 0.3, spec.shape) for path, spec in tree_paths(specs)]
    p = tree_map(lambda w: ms.Tensor(w.astype(np.float32)), unflatten(specs, values))
    x = ms.Tensor(rng.normal(0, 1, (len(AT), cfg.hidden_size)).astype(np.float32))
    before = rng.normal(0, 1, (2, len(AT), SLOTS, cfg.num_kv_heads, cfg.head_dim)).astype(np.float32)
    positions = ms.Tensor(np.array(AT, np.int32)[:, None])

    def results(decode):
        cache = tuple(ms.Tensor(part.copy()) for part in before)  # which the kernels change
        y, *_, cache = decode(cfg, op, p, x, rows_over_cache(op, (cache,), positions), cache)
        return [part.asnumpy() for part in (y, *cache)]

    return all(np.abs(a - b).max() <= TOLERANCE * np.abs(a).max() for a, b in zip(results(layer), results(decode_layer)))
