"""--profile_steps: every op of the steps is in the table, by its name and as often as the model calls it."""

import csv
import json

import pytest

from experiments import flags, pretrain
from experiments.configs import tiny

TEXT = "".join(f"def function_{j}(x):\n    return x + {7 * j}\n" for j in range(200))
LAYERS = 2


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    c = tiny.get_config()
    c.data.path, c.data.vocab_size = str(tmp_path / "text.txt"), 300
    c.model_args.num_layers, c.train.batch_size, c.train.seq_len, c.train.steps = LAYERS, 2, 32, 4
    c.train.sample_tokens, c.train.save_hf, c.train.profile_steps = 0, False, "2:3"
    return c


@pytest.mark.extended
@pytest.mark.parametrize("loop", ["unroll", pytest.param("scan", marks=pytest.mark.slow)])
def test_the_table_has_each_op_as_often_as_a_step_calls_it(config, tmp_path, loop, capsys):
    """A scanned layer is computed again in the backward."""
    config.train.layer_loop = loop
    pretrain.pretrain(config, str(tmp_path / "run"))
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["ops.csv", "trace_view.json"]
    rows = {row["op"]: row for row in csv.DictReader(open(folder / "ops.csv"))}
    forward = LAYERS * (2 if loop == "scan" else 1)
    calls = {"attention": forward, "attention_grad": LAYERS, "swiglu": forward, "swiglu_grad": LAYERS, "head_loss": 1, "head_loss_grad": 1}
    calls |= {"rope_norm": 2 * forward, "rope_norm_grad": 2 * LAYERS, "embedding": 1, "embedding_grad": 1}
    assert {name: float(rows[name]["calls a step"]) for name in calls} == calls
    assert "Custom" not in rows  # which would be a kernel of ours without its name
    assert sum(float(row["share"]) for row in rows.values()) == pytest.approx(1)
    assert float(rows["attention"]["ms a step"]) > 0 and float(rows["(outside ops)"]["ms a step"]) > 0
    events = [event for event in json.loads((folder / "trace_view.json").read_text()) if event.get("args", {}).get("type") == "HostCpuOps"]
    assert len(events) == pytest.approx(2 * sum(float(row["calls a step"]) for row in rows.values()))
    assert "profile    2 steps" in capsys.readouterr().out


def test_bad_steps_are_named(config):
    for text in ("3", "0:2", "5:3", "a:b", "1:2:3"):
        config.train.profile_steps = text
        with pytest.raises(ValueError, match="train.profile_steps=.* must be FIRST:LAST"):
            flags.check(config)
