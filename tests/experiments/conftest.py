import sys

import pytest


@pytest.fixture(autouse=True, scope="session")
def programs():
    """Runs on one device, of one model and of one config but for its data and numbers of steps, share a program.

    It compiles for seconds, and keeps nothing between calls.
    """
    run, made = sys.modules.get("experiments.train.run"), {}
    if run is None:  # no test of this session trains, and MindSpore takes seconds to import
        yield made
        return
    build = run.build_program

    def build_program(cfg, config, sharding):
        if sharding.mesh.world > 1:
            return build(cfg, config, sharding)
        sections = (config[name].to_json(sort_keys=True) for name in ("ops", "optim", "parallel"))
        key = (cfg, *sections, *(config.train[name] for name in ("layer_loop", "recompute", "seed", "ema_decay")))
        if key not in made:
            made[key] = build(cfg, config, sharding)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_program", build_program)
        yield made
