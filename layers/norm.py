"""The norms of a layer: RMS norm, before each part of the layer, behind it, or both.

pre: x + f(norm(x)), as in Qwen3. post: x + norm(f(x)), the norm on what is added, as in OLMo 2. both: x + norm(f(norm(x))), as in Gemma 2.
"""

from parallel.specs import ParamSpec, ones

BEFORE, AFTER = ("pre", "both"), ("post", "both")


def specs(cfg):
    return ParamSpec((cfg.hidden_size,), ("embed",), ones())


def around(cfg, name, part):
    """Adds the norms `{name}_norm` and `{name}_out_norm` to `part`, a dict of one part's specs, where the config places them."""
    before = {f"{name}_norm": specs(cfg)} if cfg.norm_placement in BEFORE else {}
    after = {f"{name}_out_norm": specs(cfg)} if cfg.norm_placement in AFTER else {}
    return {**before, **part, **after}
