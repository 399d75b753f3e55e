"""The ramp of the batch size: which rows a step has, on any ranks, and in a run that goes on."""

import json

import numpy as np
import pytest

from experiments import pretrain
from experiments.configs import common
from experiments.data import batch_ramp
from experiments.data.loader import Loader, first_rows
from experiments.data.packing import pack
from experiments.data.rows import PackedRows
from experiments.layout import check as layout
from parallel.checkpoint.files import step_folder
from tests.experiments.test_pretrain import make_text
from tests.experiments.test_resume import arrays, config_of, records, stopping_after
from tests.processes import run
from tests.tiny import DENSE, documents

RAMP, SIZES = "4:2,8:3", [4, 4, 8, 12, 12, 12]


def train_section(**changes):
    config = common.get_config()
    config.train.update({"batch_ramp": RAMP, "batch_size": 12, **changes})
    return config.train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("ramp") / "text")


def test_each_step_has_its_rows():
    train = train_section()
    assert [batch_ramp.rows_of(train)(step) for step in range(6)] == SIZES and batch_ramp.sizes(train) == (4, 8, 12)
    assert [batch_ramp.total(train, steps) for steps in range(7)] == np.cumsum([0, *SIZES]).tolist()
    plain = train_section(batch_ramp="")
    assert batch_ramp.sizes(plain) == (12,) and batch_ramp.total(plain, 5) == 60


@pytest.mark.parametrize("text", ["4", "4:", ":3", "x:3", "0:3", "4:0", "-4:3", "4:3:2", "4:3;8:5", "4:5,8:5", "4:5,8:3", "4:" + "9" * 50])
def test_what_is_no_ramp_is_refused(text):
    with pytest.raises(ValueError, match="train.batch_ramp"):
        batch_ramp.parse(text)


def test_a_ramp_that_does_not_fit_the_layout_is_refused_by_name():
    config = common.get_config()
    config.train.batch_size = 8
    for ramp, words in (("3:5", "train.batch_ramp=3 must be a multiple of parallel.dp=2"), ("16:5", "has steps of 16 rows, more than")):
        config.train.batch_ramp, config.parallel.dp = ramp, 2
        with pytest.raises(ValueError, match=words):
            layout.check(config, DENSE, 2)
    config.train.batch_ramp = "4:5"
    config.rl.loss, config.rl.group_size, config.rl.max_new_tokens = "grpo", 2, 8
    with pytest.raises(ValueError, match="train.batch_ramp=4:5 with rl.loss=grpo is not supported"):
        layout.check(config, DENSE, 2)


@pytest.mark.parametrize("ranks, micro", [(1, 1), (2, 1), (2, 2)])
def test_ranks_have_the_rows_of_one_loader_from_any_step_on(ranks, micro):
    source, size_of = PackedRows(pack(documents(DENSE, [15] * 60), 16, 0)), batch_ramp.rows_of(train_section())
    every, start = first_rows(source, sum(SIZES), 3)["tokens"], 0
    loaders = [Loader(source, size_of, 3, rank, ranks, micro) for rank in range(ranks)]
    states = []
    try:
        for size in SIZES:
            states.append(loaders[0].state())
            part, of_ranks = every[start : start + size], [next(loader)["tokens"] for loader in loaders]
            cut = [np.split(rows, micro) for rows in of_ranks]
            np.testing.assert_array_equal(np.concatenate([cut[rank][m] for m in range(micro) for rank in range(ranks)]), part)
            start += size
    finally:
        for loader in loaders:
            loader.close()
    with Loader(source, size_of, 3, state=states[3], begun=3) as again:
        assert len(next(again)["tokens"]) == 12 and again.state()["sample"] == sum(SIZES[:4])


def test_a_run_that_stops_in_its_ramp_goes_on_bit_for_bit(text, tmp_path, monkeypatch):
    config = lambda: config_of(text, **{"train.batch_ramp": "2:2,4:5", "train.batch_size": 8})
    pretrain.pretrain(config(), str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        pretrain.pretrain(config(), str(tmp_path / "run"))
    pretrain.pretrain(config(), str(tmp_path / "run"))
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    (got, _), (want, meta) = (arrays(step_folder(str(tmp_path / name), 6)) for name in ("run", "whole"))
    assert all(np.array_equal(got[name], want[name]) for name in want) and meta["loader"]["sample"] == 2 * 2 + 3 * 4 + 8
    tokens = [line["tokens"] for line in records(tmp_path / "whole") if "tokens" in line]
    assert len(tokens) == 6 and max(tokens[:2]) < min(tokens[2:5]) and max(tokens[2:5]) < tokens[5]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"parallel.dp": 2}, {"parallel.tp": 2}, {"parallel.pp": 2, "parallel.micro_batches": 2}], ids=str)
def test_two_ranks_take_the_steps_of_one(layout, text, tmp_path):
    changes = {"train.batch_ramp": "4:2", "train.batch_size": 8, "train.steps": 4}
    pretrain.pretrain(config_of(text, **changes), str(tmp_path / "one"))
    runs = tmp_path / "runs.json"
    runs.write_text(json.dumps([[str(tmp_path / "two"), {**changes, **layout}]]))
    run("tests.experiments.resume_worker:main", 2, str(text), str(runs))
    one, two = ({line["step"]: line["loss"] for line in records(tmp_path / name) if "loss" in line} for name in ("one", "two"))
    assert list(one) == list(two) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
