"""muP, a parametrisation in which the best learning rate of a narrow model is also that of a wide one. Source: Yang et al. 2022, Tensor
Programs V.

It is a rule on specs and changes no function of the model: each parameter gets another initial value and a factor of its learning rate, by
r = base width / hidden_size. A model of the base width is as without muP.

    parameter                                  initial value         factor of AdamW's learning rate
    matrices in layers, experts too            std * sqrt(r)         r
    router                                     std * r               r
    final_norm                                 r instead of 1        r
    embedding, head, other norms, biases       unchanged             1

The gain of the final norm is muP's multiplier of the logits: logits = head @ (gain * normalised x). The table of the head, which may be
that of a tied embedding, is thus as without muP, and the saved weights alone give the logits, in transformers too.

The rule takes for granted that heads * head_dim and the feed-forward sizes grow in proportion to hidden_size, and that head_dim, the
numbers of experts and of layers, and the vocabulary stay.
"""

from dataclasses import replace

from parallel.specs import constant, normal
from parallel.trees import tree_paths, unflatten


def with_mup(cfg, tree):
    """Returns a tree of ParamSpecs with muP's initial values and learning rates; the tree itself if cfg.mup_base_width is 0."""
    if not cfg.mup_base_width:
        return tree
    ratio = cfg.mup_base_width / cfg.hidden_size
    return unflatten(tree, [scaled(path, spec, ratio) for path, spec in tree_paths(tree)])


def scaled(path, spec, ratio):
    """Returns the spec of the parameter at `path` in muP. ratio: base width / width."""
    if path == "final_norm":
        return replace(spec, init=constant(ratio), lr=ratio)
    if len(spec.shape) < 2 or "vocab" in spec.dims or "one" in spec.dims:
        return spec
    return replace(spec, init=normal(spec.init[1] * (ratio if "router" in spec.dims else ratio**0.5)), lr=ratio)
