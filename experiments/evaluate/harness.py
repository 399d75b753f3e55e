"""Runs tasks of lm-evaluation-harness on our models. It needs `pip install lm-eval`; nothing else in this tree does."""

from experiments.evaluate import scoring
from qwen3 import chat

MISSING = "{} is not a file, and lm-eval, which knows tasks by name, is not installed; give a .jsonl file, or pip install lm-eval"


def adapter(scorer):
    """Returns an lm_eval.api.model.LM that calls a scoring.Scorer. Every rank of a layout runs the harness on the same requests, as if it
    were the only process. Raises ImportError where lm-eval is not installed."""
    from lm_eval.api.model import LM

    class Adapter(LM):
        tokenizer_name = "qwen3-mindspore"

        def loglikelihood(self, requests, disable_tqdm=False):
            return scoring.loglikelihood(scorer, [request.args for request in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return scoring.loglikelihood_rolling(scorer, [request.args[0] for request in requests])

        def generate_until(self, requests, disable_tqdm=False):
            return scoring.generate_until(scorer, [request.args for request in requests])

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return chat.prompt_text(scorer.tokenizer, chat_history, begin_turn=add_generation_prompt)

        def chat_template(self, chat_template=False):
            return scorer.tokenizer.chat_template if chat_template else None

    return Adapter()


def run(scorer, names, folder=None, limit=None):
    """Runs tasks of lm-evaluation-harness by name. folder: YAML files of more tasks, or None. Returns {task: (metrics, standard errors,
    number of documents)}."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("--tasks=" + MISSING.format(names[0])) from error
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"--tasks={unknown[0]}: neither a file, nor a task of lm-eval or --task_folder={folder}; check the name")
    results = lm_eval.simple_evaluate(model=adapter(scorer), tasks=list(names), task_manager=manager, limit=limit)
    return {name: (*_numbers(found), results["n-samples"].get(name, {}).get("effective", 0)) for name, found in results["results"].items()}


def _numbers(found):
    """Splits the harness' {"acc,none": ..., "acc_stderr,none": ...} into ({metric: value}, {metric: standard error})."""
    values, errors = {}, {}
    for key, value in found.items():
        name, _, filtered = key.partition(",")
        if filtered and isinstance(value, (int, float)):
            name = name if filtered == "none" else f"{name}, {filtered}"
            (errors if name.split(",")[0].endswith("_stderr") else values)[name.replace("_stderr", "")] = value
    return values, errors
