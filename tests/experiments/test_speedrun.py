"""The speedrun: its corpus, its t test, and that a false record is refused: by what it says, and by running it again."""

import hashlib
import json
import os
import statistics

import pytest

from experiments import flags
from experiments.speedrun import board, corpus, record, run, student
from experiments.speedrun.record import TARGET, faults

GOOD = [TARGET + offset for offset in (-0.012, -0.010, -0.008, -0.011, -0.009)]
LUCKY = [TARGET + offset for offset in (0.002, -0.150, 0.004, 0.001, 0.003)]  # the mean of five is below the target, by one seed


def planted(folder, name, bits, keys=None, **changes):
    """A record whose results are `bits`. keys: its overrides. changes: of results.json."""
    path = folder / name
    path.mkdir(parents=True)
    overrides = keys or {}
    (path / "record.json").write_text(json.dumps({"title": name, "why": "planted", "overrides": overrides}))
    flops = run.flops_of(record.read(str(path)))
    seeds = [{"seed": i, "bits_per_byte": b, "cpu_s": 8.0, "baseline_cpu_s": 10.0, "curve": [[0, b]]} for i, b in enumerate(bits)]
    results = {"corpus": corpus.DIGEST, "overrides": overrides, "flops": flops, "commit": "a" * 40, "seeds": seeds, **changes}
    (path / "results.json").write_text(json.dumps(results))
    return record.read(str(path))


def faults_of(made, before=None):
    return " | ".join(faults(made, run.flops_of(made), before, before and run.flops_of(before)))


def test_the_corpus_is_the_same_bytes_everywhere(monkeypatch):
    made = corpus.text()
    assert hashlib.sha256(made.encode()).hexdigest() == corpus.DIGEST and len(made) == 400_129 and made.isascii()
    monkeypatch.setattr(corpus, "COLOURS", corpus.COLOURS[::-1])
    with pytest.raises(ValueError, match="undo the change of"):
        corpus.text()


# quantiles of Student's t from tables: P(T > t) = 0.01, 0.05 and 0.001
@pytest.mark.parametrize(
    "t, freedom, p",
    [(31.820516, 1, 0.01), (6.964557, 2, 0.01), (4.540703, 3, 0.01), (3.746947, 4, 0.01), (2.821438, 9, 0.01), (2.015048, 5, 0.05)]
    + [(7.173182, 4, 0.001), (2.390119, 60, 0.01), (0.0, 4, 0.5), (-3.746947, 4, 0.99)],
)
def test_student_is_that_of_the_tables(t, freedom, p):
    assert student.upper_tail(t, freedom) == pytest.approx(p, rel=2e-6)


def test_the_p_value_is_of_the_mean_below_the_target():
    assert student.p_below([1.0, 2.0, 3.0], 2.0) == pytest.approx(0.5)
    assert student.p_below([1.0, 2.0, 3.0], 2.0 + 6.964557 / 3**0.5) == pytest.approx(0.01, rel=1e-5)
    assert student.p_below([1.0, 1.0, 1.0], 2.0) == 1.0  # seeds without an effect prove nothing


def test_one_lucky_seed_makes_no_record(tmp_path):
    assert statistics.fmean(LUCKY) < TARGET
    assert "is not below the target" in faults_of(planted(tmp_path, "01_lucky", LUCKY))
    assert faults_of(planted(tmp_path, "02_good", GOOD)) == ""


@pytest.mark.parametrize(
    "bits, changes, said",
    [
        (GOOD[:4], {}, "has 4 seeds, and a record needs 5"),
        ([*GOOD[:4], float("nan")], {}, "not a finite number"),
        ([*GOOD[:4], "0.1"], {}, "not a finite number"),
        ([GOOD[0]] * 5, {}, "p = 1"),
        (GOOD, {"corpus": "another"}, "another corpus"),
        (GOOD, {"flops": 1.0}, "another config"),
        (GOOD, {"overrides": {"optim.lr": 1.0}}, "another config"),
    ],
)
def test_what_is_no_proof_is_refused(bits, changes, said, tmp_path):
    assert said in faults_of(planted(tmp_path, "01_wrong", bits, **changes))


def test_a_seed_that_stands_twice_is_refused(tmp_path):
    made = planted(tmp_path, "01_twice", GOOD)
    made.results["seeds"].append(made.results["seeds"][0])
    assert "a seed stands twice" in faults_of(made)


def test_a_record_takes_fewer_flops_than_the_one_before(tmp_path):
    before = planted(tmp_path, "00_baseline", GOOD)
    fewer = planted(tmp_path, "01_fewer", GOOD, {"train.steps": 200})
    equal = planted(tmp_path, "02_equal", GOOD, {"optim.lr": 0.01})
    ramp = planted(tmp_path, "03_ramp", GOOD, {"train.batch_ramp": "4:100"})
    assert faults_of(fewer, before) == faults_of(ramp, before) == ""
    assert "not fewer than" in faults_of(equal, before)
    assert run.flops_of(fewer) == pytest.approx(run.flops_of(before) * 200 / 280)


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"data.held_out": 0.5}, "data.held_out is the same in all records"),
        ({"train.seq_len": 512}, "train.seq_len is the same in all records"),
        ({"model_args.vocab_size": 300}, "is the same in all records"),
        ({"train.seed": 3}, "train.seed is the same in all records"),
        ({"optim.learning": 1}, "there is no key 'optim.learning'"),
        ({"lr": 1}, "there is no key 'lr'"),
    ],
)
def test_what_a_record_may_not_change_is_refused_by_name(overrides, said, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"title": "t", "overrides": overrides}))
    with pytest.raises(ValueError, match=said):
        record.read(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"title": "t"}', '{"title": "t", "overrides": []}'])
def test_a_broken_record_is_refused_by_its_path(text, tmp_path):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ValueError, match="record.json"):
        record.read(str(tmp_path))


def test_a_value_that_is_no_config_is_refused_with_the_records_name(tmp_path):
    with pytest.raises(ValueError, match="01_bad: optim.lr=-1.0 must be above 0"):
        planted(tmp_path, "01_bad", GOOD, {"optim.lr": -1.0})


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Stands for training: results by (record, seed), and the order in which they were asked for."""
    asked = []

    def one_seed(of, seed, folder):
        asked.append((of.name, seed))
        bits = GOOD[seed % 5] if seed < run.FRESH or of.name != "01_chosen" else TARGET + 0.001 * (seed % 5)
        return {"seed": seed, "bits_per_byte": bits, "cpu_s": 10.0 if of.name == "00_baseline" else 5.0, "curve": []}, "b" * 40

    monkeypatch.setattr(run, "one_seed", one_seed)
    return asked


def test_check_runs_in_turns_and_refuses_a_record_whose_seeds_were_chosen(trained, tmp_path):
    planted(tmp_path / "records", "00_baseline", GOOD)
    planted(tmp_path / "records", "01_chosen", GOOD, {"train.steps": 250})
    planted(tmp_path / "records", "02_true", GOOD, {"train.steps": 200})
    everything = record.read_all(str(tmp_path / "records"))
    verdict = run.check(everything[1], everything, 5, str(tmp_path / "runs"))
    assert not verdict.holds and "run again: its mean" in verdict.lines[1]
    assert trained == [(name, seed) for seed in range(run.FRESH, run.FRESH + 5) for name in ("00_baseline", "01_chosen")]
    verdict = run.check(everything[2], everything, 5, str(tmp_path / "runs"))
    assert verdict.holds and verdict.lines[0] == "02_true holds" and "0.50 of the baseline's CPU seconds" in verdict.lines[-1]


def test_check_refuses_one_lucky_seed_without_running(trained, tmp_path):
    planted(tmp_path / "records", "00_baseline", GOOD)
    made = planted(tmp_path / "records", "01_lucky", LUCKY, {"train.steps": 200})
    verdict = run.check(made, record.read_all(str(tmp_path / "records")), 5, str(tmp_path / "runs"))
    assert not verdict.holds and "is not below the target" in verdict.lines[1] and trained == []


def test_run_goes_on_where_it_stopped_and_refuses_results_of_another_config(trained, tmp_path):
    base = planted(tmp_path / "records", "00_baseline", GOOD)
    made = planted(tmp_path / "records", "01_more", GOOD[:3], {"train.steps": 200})
    run.in_turns([made], base, range(5), str(tmp_path / "runs"), record.save)
    assert trained == [(name, seed) for seed in (3, 4) for name in ("00_baseline", "01_more")]
    assert [seed["seed"] for seed in record.read(made.folder).seeds] == [0, 1, 2, 3, 4]
    changed = {"title": "t", "overrides": {"train.steps": 100}}
    (tmp_path / "records" / "01_more" / "record.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="results.json is of another overrides"):
        run.in_turns([record.read(made.folder)], base, range(5), str(tmp_path / "runs"))


def test_the_board_names_what_does_not_hold(tmp_path):
    planted(tmp_path, "00_baseline", GOOD)
    planted(tmp_path, "01_lucky", LUCKY, {"train.steps": 140})
    (tmp_path / "02_new").mkdir()
    (tmp_path / "02_new" / "record.json").write_text(json.dumps({"title": "a <b> | c", "overrides": {"train.steps": 100}}))
    everything = record.read_all(str(tmp_path))
    lines = board.markdown(everything).splitlines()
    assert lines[2].endswith("| yes |")
    assert "| 0.50 | 0.80 |" in lines[3] and "is not below" in lines[3] and "it was not run yet" in lines[4]
    assert "a <b> \\| c" in lines[4] and "a &lt;b&gt; | c" in board.page(everything)


def test_the_projects_own_records_hold():
    everything = record.read_all()
    assert len(everything) >= 3
    for made, before in zip(everything, [None, *everything]):
        assert faults_of(made, before) == "", made.name


@pytest.mark.slow
def test_a_seed_is_trained_and_an_error_of_its_run_is_told(tmp_path):
    corpus.write(str(tmp_path))
    made = record.Record(str(tmp_path / "00_short"), "short", {"train.steps": 3, "train.batch_size": 2}, {})
    entry, _ = run.one_seed(made, 7, str(tmp_path))
    assert entry["seed"] == 7 and 2 < entry["bits_per_byte"] < 4 and entry["cpu_s"] > 1 and [step for step, _ in entry["curve"]] == [0, 3]
    wrong = record.Record(str(tmp_path / "01_wrong"), "wrong", {"optim.lr": 1e30, "train.steps": 30, "optim.clip_norm": 0.0}, {})
    with pytest.raises(ValueError, match="01_wrong with train.seed=0 ended with status 2: error: step"):
        run.one_seed(wrong, 0, str(tmp_path))


def test_the_base_config_is_a_config():
    config = flags.resolved(run.target(record.Record("00_base", "", {}, {}), 4, data="x", workdir=os.devnull), 1)
    assert config.train.seed == 4 and config.data.path == "x"
