"""Makes training_curves.json: python -m tests.golden.make_training_curves, after a wanted change of the numbers only."""

import json

from tests.experiments.test_train import DENSE, GENTLE, GOLDEN, MOE, make_config, run

KEYS = {"dense": ("loss", "grad_norm"), "moe": ("loss", "objective", "router_loss", "grad_norm")}
config, models = make_config(**GENTLE), (("dense", DENSE), ("moe", MOE))
curves = {name: [{key: m[key] for key in KEYS[name]} for m in run(cfg, config)[0]] for name, cfg in models}
with open(GOLDEN, "w", encoding="utf-8") as file:
    json.dump(curves, file, indent=1)
