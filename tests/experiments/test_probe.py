"""What a watched step finds before it: the same in every layout, and nothing is trained otherwise."""

import json

import numpy as np
import pytest

from experiments.data.loader import Loader
from experiments.data.packing import pack
from experiments.data.rows import Blend, PackedRows
from experiments.train import program as train_program
from experiments.watch.monitors import Monitor
from experiments.watch.probe import Probe
from parallel import collectives
from parallel.mesh import ONE_DEVICE
from parallel.sharding import Sharding
from parallel.trees import tree_map, tree_paths
from tests import processes
from tests.parallel import layouts
from tests.tiny import DENSE, documents, random_params

LAYOUTS = {
    "dp2 tp2, sequence parallel, ZeRO 1, 2 micro-batches": ("dense", dict(dp=2, tp=2, seq=True, zero=1, micro=2)),
    "moe, dp2 tp2 ep2, ZeRO 3, scan": ("moe8", dict(dp=2, tp=2, ep=2, zero=3, loop="scan", seq=True)),
    "tp4 of 1 kv head": ("qwen2", dict(tp=4)),
    "cp2 tp2, ring, packed": ("untied", dict(cp=2, tp=2, packed=True)),
    "cp4, hybrid, packed": ("dense", dict(cp=4, ulysses=2, packed=True)),
    "moe, pp2 dp2 ep2, interleaved": ("moe8", dict(pp=2, dp=2, ep=2, micro=2, schedule="interleaved", virtual=2)),
    "mixed, pp2 cp2, Ulysses": ("mixed", dict(pp=2, cp=2, ulysses=2, micro=4)),
    "adapters with dropout, dp4, ZeRO 2": ("adapters", dict(dp=4, zero=2)),
}
NAMES = ["books", "code", "nothing"]


def in_layout(model, options, rank=0):
    """{step|key: value} of what is found before two steps, of which the first is taken."""
    cfg, config, sharding, program, state, mine = layouts.begun(model, options, rank)
    probe, out = Probe(cfg, config, sharding, program, lambda: (NAMES, [row % 2 for row in mine])), {}
    for at in range(2):
        batch = layouts.batch_of(cfg, options, at, mine)
        out.update({f"{at}|{key}": value for key, value in probe(state, batch).items()})
        if at == 0:
            state, _ = program.step(state, batch, 1e-2, at)
    return out


def main(names):
    rank = collectives.start()[0]
    return {f"{name}|{key}": value for name in json.loads(names) for key, value in in_layout(*LAYOUTS[name], rank).items()}


@pytest.mark.slow
def test_what_is_found_is_what_one_process_finds_in_any_layout():
    ranks = processes.run("tests.experiments.test_probe:main", 4, json.dumps(list(LAYOUTS)), timeout_s=500)
    for name, (model, options) in LAYOUTS.items():
        want = in_layout(model, {key: options[key] for key in ("micro", "packed") if key in options})
        assert {key.split("/")[0] for key in want} >= {"0|activation_norm", "0|attention_logit_max", "1|loss"}
        for rank in ranks:
            assert {key for key in rank if key.startswith(f"{name}|")} == {f"{name}|{key}" for key in want}
            for key, value in want.items():
                assert rank[f"{name}|{key}"] == pytest.approx(value, rel=2e-4), (name, key)


def blended():
    """Rows of two sources, of which the second has three in four."""
    rows = [PackedRows(pack(documents(DENSE, [16] * 12, seed), 16, 0), name) for seed, name in ((1, "books"), (2, "code"))]
    return Blend(rows, [1, 3], ["wiki", "wiki"])


@pytest.mark.extended
def test_sources_share_the_loss_and_watching_changes_no_bits():
    """Of steps of two micro-batches, every second of which is watched."""
    config, params = layouts.run_config({"micro": 2}), tree_map(lambda w: w.asnumpy(), random_params(DENSE))
    program, ends, found, losses, weights = train_program.build_program(DENSE, config), [], [], {}, {}
    for watched in (False, True):
        state = program.init(params)
        with Loader(blended(), 4, seed=0, micro_batches=2) as loader:
            probe = Probe(DENSE, config, Sharding(), program, loader.sources)
            monitor = Monitor(program, ONE_DEVICE, config.optim, 2, lambda step, values: found.append((step, values)), probe)
            for at, batch in zip(range(4), loader):
                state, metrics = (monitor if watched else program).step(state, batch, 1e-2, at)
                losses[at + 1] = metrics["loss"]
                source = np.array(loader.sources()[1])
                weights[at + 1] = [batch["loss_weights"][source == i].sum() for i in range(2)]
                assert (source == 1).sum() == 3
        ends.append(program.params(state))
    for (path, a), (_, b) in zip(*map(tree_paths, ends), strict=True):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy(), err_msg=path)
    assert [step for step, _ in found] == [2, 4]
    for step, values in found:
        kinds = {key.split("/")[0] for key in values}
        assert kinds == {"activation_norm", "attention_logit_max", "grad_norm", "weight_norm", "update_ratio", "loss"}
        of_sources = values["loss/wiki"], values["loss/wiki-2"]
        assert of_sources[0] != pytest.approx(of_sources[1], rel=1e-3)
        assert losses[step] == pytest.approx(np.average(of_sources, weights=weights[step]), rel=1e-5)
