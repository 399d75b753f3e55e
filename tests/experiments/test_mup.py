"""muP: initial values and learning rates by width, what it refuses, and the coordinate check."""

import numpy as np
import pytest

from experiments import flags
from experiments.configs import common
from experiments.ladder import coordinates
from experiments.layout import check
from experiments.train import optim
from experiments.train.state import placements
from parallel.specs import init_params
from parallel.trees import tree_leaves, tree_paths
from qwen3 import hf
from qwen3.config import Qwen3Config
from qwen3.model import forward, param_specs
from tests.parallel import layouts
from tests.tiny import DENSE, KINDS, MOE, packed_batch, random_params

QUARTER = DENSE.hidden_size // 4  # a base width of a quarter of the model's


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_the_base_width_is_bit_for_bit_as_without(kind):
    cfg = KINDS[kind]
    plain, mup = param_specs(cfg), param_specs(cfg.replace(mup_base_width=cfg.hidden_size))
    for (path, a), b in zip(tree_paths(init_params(plain, 3)), tree_leaves(init_params(mup, 3)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert {spec.lr for spec in tree_leaves(mup)} == {1.0} == {spec.lr for spec in tree_leaves(plain)}


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_and_rates_at_four_times_the_base_width(kind):
    """Formulas of the paper, by the path of the parameter: matrices std / 2 and lr / 4, the router and the final norm by 1/4 in both."""
    cfg = KINDS[kind]
    before, after = param_specs(cfg), param_specs(cfg.replace(mup_base_width=QUARTER))
    specs, start, scaled = dict(tree_paths(after)), dict(tree_paths(init_params(before, 0))), dict(tree_paths(init_params(after, 0)))
    for path, spec in specs.items():
        name = path.rsplit(".", 1)[-1]
        init, rate = {
            **dict.fromkeys(("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"), (0.5, 0.25)),
            **dict.fromkeys(("router", "final_norm"), (0.25, 0.25)),
        }.get(name, (1.0, 1.0))
        assert spec.lr == rate, path
        np.testing.assert_allclose(scaled[path], init * start[path], rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_gives_the_same_logits_without_mup(tied, tmp_path):
    """The multiplier of the logits is in the weights, for a tied embedding too, so a reader that knows no muP computes the same model."""
    cfg = DENSE.replace(tie_embeddings=tied, mup_base_width=QUARTER)
    params, batch = random_params(cfg), packed_batch(cfg)
    want, _ = forward(params, batch["tokens"], cfg)
    hf.save(tmp_path, cfg, params)
    plain, read = hf.load(tmp_path)
    assert plain.mup_base_width == 0 and plain == Qwen3Config.from_hf(cfg.to_hf())
    np.testing.assert_array_equal(forward(read, batch["tokens"], plain)[0].asnumpy(), want.asnumpy())


def test_the_gain_of_the_final_norm_multiplies_the_logits():
    plain, mup = DENSE, DENSE.replace(mup_base_width=QUARTER)
    params, tokens = random_params(plain), packed_batch(plain)["tokens"]
    want = forward({**params, "final_norm": params["final_norm"] * 0 + 1}, tokens, plain)[0].asnumpy() / 4
    found = forward({**params, "final_norm": params["final_norm"] * 0 + 0.25}, tokens, mup)[0].asnumpy()
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("looped", [False, True])
def test_rates_of_each_optimizer_and_of_groups(looped):
    """Muon's steps of a matrix grow less with the width, so their rate falls by the root. Factors of lr_groups multiply those of muP."""
    cfg, groups = MOE.replace(mup_base_width=QUARTER), "layers.1.*=0.5,final_norm=3"
    for name, hidden in (("adamw", 0.25), ("lion", 0.25), ("muon", 0.5)):
        config = layouts.run_config({"optim": name, "groups": groups})
        placed = placements(cfg, layouts.sharding_of(cfg, {"tp": 2, "zero": 1, "dp": 2}), looped)
        rates = [x.asnumpy()[..., 0].tolist() for x in tree_leaves(optim.own_rates(config.optim, placed))]
        found = {path: rate for (path, _), rate in zip(tree_paths(placed), rates)}
        want = {"attention.wo": hidden, "moe.w_down": hidden, "moe.router": 0.25, "attention.q_norm": 1.0}
        for rest, rate in want.items():
            each = found[f"layers.{rest}"] if looped else [found[f"layers.{i}.{rest}"] for i in range(2)]
            assert each == [rate, rate / 2], (name, rest)
        assert (found["final_norm"], found["embed"], found["lm_head"]) == (0.75, 1.0, 1.0)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"optim.name": "sgd"}, "optim.name=sgd: .*use one of them, or train.mup_base_width=0"),
        ({"lora.rank": 2}, "lora.rank=2: adapters have no rule in muP; use train.mup_base_width=0, or lora.rank=0"),
        ({"train.mup_base_width": -1}, "must be 0 or more"),
    ],
)
def test_what_has_no_rule_is_refused(changes, why):
    config = common.get_config()
    config.model = "tiny"
    config.update_from_flattened_dict({"train.mup_base_width": 64, **changes})
    with pytest.raises(ValueError, match=f"train.mup_base_width.*{why}"):
        flags.check(config)


def test_the_partitioner_refuses_mup():
    config = common.get_config()
    config.parallel.lowering, config.train.mup_base_width = "shard", 64
    with pytest.raises(ValueError, match="train.mup_base_width=64 with parallel.lowering=shard: .*use train.mup_base_width=0"):
        check.check_partitioned(config, DENSE)


def test_the_key_reaches_the_specs():
    config = common.get_config()
    config.model, config.train.mup_base_width = "tiny", 32
    specs = param_specs(flags.model_config(config))
    assert specs["final_norm"].init == ("constant", 0.25) and specs["layers"][0]["mlp"]["w_up"].lr == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name, tied", [("adamw", True), ("adamw", False), ("muon", True)])
def test_changes_by_ten_steps_do_not_depend_on_the_width_with_mup(name, tied):
    """Widths 64 to 512. Without muP the logits change more the wider the model is."""
    slopes = {}
    for base in (0, 64):
        runs = [coordinates.changes_by_steps(coordinates.model(n, base, tie_embeddings=tied), name=name) for n in coordinates.WIDTHS]
        for what in runs[0]:
            slopes[base, what] = coordinates.slope(coordinates.WIDTHS, [run[what][-1] for run in runs])
    assert max(abs(slopes[64, what]) for what in ("residual stream", "logits")) < 0.1, slopes
    assert slopes[0, "logits"] > 0.3 and slopes[0, "residual stream"] > 0.3, slopes
