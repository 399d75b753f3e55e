"""Groups of parameters with a learning rate of their own: optim.lr_groups, such as "embed=0.1,layers.3.*=0.5".

Each entry is a pattern of parameter paths and the factor of the learning rate. The last pattern that matches a path counts, as in
.gitignore. Weight decay is a part of the step, so the factor holds for it too. The router's bias has optim.router_bias_rate instead.
"""

import fnmatch
import math

from parallel.hints import nearest
from parallel.trees import tree_paths


def parse(text):
    """Returns [(pattern, factor)]. Raises ValueError for a text that is no list of PATTERN=FACTOR with factors above 0."""
    out = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, _, number = (word.strip() for word in part.rpartition("="))
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not pattern or not 0 <= factor < math.inf:
            raise ValueError(f"optim.lr_groups: {part!r} must be PATTERN=FACTOR, such as 'embed=0.1,layers.3.*=0.5'")
        if factor == 0:
            raise ValueError(f"optim.lr_groups: {part!r} trains nothing of what it matches; use --config.train.freeze_include={pattern!r}")
        out.append((pattern, factor))
    return out


def check(text, specs):
    """Raises ValueError for a pattern that matches no parameter with a learning rate, as it would change nothing without a word.

    specs: the model's tree of ParamSpec."""
    groups, specs = parse(text), tree_paths(specs)
    paths = [path for path, spec in specs if spec.optimizer == "adamw"]
    for pattern, _ in groups:
        if any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            continue
        if any(fnmatch.fnmatchcase(path, pattern) for path, _ in specs):
            raise ValueError(f"optim.lr_groups: {pattern!r} matches only what has no learning rate: frozen parameters or the router's bias")
        near = nearest(pattern, paths) or f"; parameters are {paths[0]}, {paths[1]}, ... {paths[-1]}"
        raise ValueError(f"optim.lr_groups: {pattern!r} matches no parameter{near}")


def factor(groups, path):
    """Returns the factor of a parameter's learning rate. groups: of parse()."""
    return next((number for pattern, number in reversed(groups) if fnmatch.fnmatchcase(path, pattern)), 1.0)


def factors(groups, placed):
    """Returns the tuple of the factor of a leaf's learning rate, or of those of its stacked layers where they differ. placed: Placed."""
    if placed.spec.dims[:1] != ("layers",):
        return (factor(groups, placed.path),)
    rest = placed.path.split(".", 2)[2]
    out = tuple(factor(groups, f"layers.{i}.{rest}") for i in range(placed.spec.shape[0]))
    return out if len(set(out)) > 1 else out[:1]
