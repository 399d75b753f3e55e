"""The RMS norms of a layer: before attention and the feed-forward layer, after them, or both.

f is attention or the feed-forward layer. pre: x + f(norm(x)), as in Qwen3. post: x + norm(f(x)), as in OLMo 2. both: x + norm(f(norm(x))),
as in Gemma 2.
"""

from parallel.specs import ParamSpec, ones

BEFORE, AFTER = ("pre", "both"), ("post", "both")


def specs(cfg):
    """Returns the ParamSpec [D] of a norm of the residual stream."""
    return ParamSpec((cfg.hidden_size,), ("embed",), ones())


def around(cfg, name, tree):
    """Adds the specs of the norms to `tree`, the specs of attention or of the feed-forward layer: `{name}_norm` before it and
    `{name}_out_norm` after it, as cfg.norm_placement says."""
    before = {f"{name}_norm": specs(cfg)} if cfg.norm_placement in BEFORE else {}
    after = {f"{name}_out_norm": specs(cfg)} if cfg.norm_placement in AFTER else {}
    return {**before, **tree, **after}
