"""Fine-tuning from nothing to answers: a tiny model and adapters of it learn to reverse, add, sort and look up. Minutes each."""

import json

import pytest

from experiments import finetune
from experiments.configs import finetune_tiny
from experiments.data import instructions


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def exact_match(run):
    return lines(run)[-1]["exact_match"]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "run"
    finetune.finetune(finetune_tiny.get_config(), str(folder))
    return folder


@pytest.mark.slow
def test_fine_tuning_all_weights_answers_held_out_questions(full):
    assert exact_match(full) >= 0.9


@pytest.mark.slow
def test_adapters_answer_them_in_another_way(full, tmp_path):
    """The tasks that the base was trained on, asked for in other words, of which it makes nothing before."""
    config = finetune_tiny.get_config()
    config.model = config.init_from = config.data.tokenizer = str(full / "hf")
    config.data.path = str(tmp_path / "other.jsonl")
    config.lora.rank, config.lora.alpha, config.train.steps = 16, 32.0, 400
    other_words(config.data.path)
    finetune.finetune(config, str(tmp_path / "run"))
    assert lines(tmp_path / "run")[0]["eval_loss"] > 2 and exact_match(tmp_path / "run") >= 0.9


def other_words(path):
    """Instructions of another seed, with the task after what it is of; some of them the base knows in its own words."""
    with open(path, "w", encoding="utf-8") as file:
        for record in instructions.records(2000, seed=9):
            question, answer = (message["content"] for message in record["messages"])
            task = next(task for task in instructions.TASKS if question.startswith(task))
            said = f"{question.removeprefix(task).strip()} : {task}"
            messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
