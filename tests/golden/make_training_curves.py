"""Makes training_curves.json: python -m tests.golden.make_training_curves, after a wanted change of the numbers only."""

import json

from tests.experiments.test_train import DENSE, GOLDEN, MOE, make_config, run

KEYS = {"dense": ("loss", "grad_norm"), "moe": ("loss", "objective", "router_loss", "grad_norm")}
curves = {name: [{key: m[key] for key in KEYS[name]} for m in run(cfg, make_config())[0]] for name, cfg in (("dense", DENSE), ("moe", MOE))}
with open(GOLDEN, "w", encoding="utf-8") as file:
    json.dump(curves, file, indent=1)
