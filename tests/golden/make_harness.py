"""tests/golden/peers/harness.json: what lm-evaluation-harness's own transformers back end answers, so that tests judge scoring by it where
the harness is not installed. Needs torch, transformers 5 and lm-eval 0.4.13. Run from the repository's root:

    python -m tests.golden.make_harness

The model is that of tests/experiments/scoring_worker.py: random weights made from their names, which are the same everywhere, a tokenizer
trained on its text, and a length of 64 tokens. Stored are, for CASES, log-likelihoods with whether they are greedy; for TEXTS, rolling
log-likelihoods; and for TASK the accuracies of the harness's own task.
"""

import json
import tempfile
from pathlib import Path

PATH = Path(__file__).parent / "peers" / "harness.json"
LENGTH, MODELS = 64, ("dense", "moe")
# pairs (context, continuation): spaces that move over the cut, no context, a long context, one that is too long, several tokens
CASES = [
    ["def function_1", "(x):"],
    ["def function_1(x):\n    ", "return x + 7"],
    ["def  ", "x"],
    ["", "def function"],
    ["", "<|im_end|>def"],
    ["return x", " + 7\ndef"],
    ["修行", " 去上海"],
    ["def function_2(x):\n    return x + 14\n" * 3, "def function_3(x):"],
    ["def function_2(x):\n    return x + 14\n" * 9, "def function_3(x):\n    return x + 21\n"],
]
TEXTS = ["def", "def function_1(x):\n    return x + 7\n", "def function_5(x):\n    return x + 35\n" * 12, "修行 去上海", ""]
DOCUMENTS = [{"q": "def function_", "choices": ["1(x)", "2", "return x", "é"], "gold": i % 4} for i in range(8)]
TASK = """\
task: ours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: '{{{{q}}}}'
doc_to_choice: '{{{{choices}}}}'
doc_to_target: gold
target_delimiter: ''
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def write_task(folder):
    """Writes the task and its documents; returns the folder."""
    data = Path(folder) / "data.json"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (Path(folder) / "ours.yaml").write_text(TASK.format(data=data))
    return folder


def answers(name):
    """{"pairs": [[context, continuation, log-likelihood, greedy]], "rolling": [log-likelihood], "acc", "acc_norm"} of the transformers
    back end. The pairs are those of CASES, and one whose continuation is greedy."""
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from parallel.trees import tree_map
    from qwen3 import hf
    from tests.experiments import scoring_worker
    from tests.tiny import DENSE, MOE, random_params

    tokenizer = scoring_worker.tokenizer()
    cfg = {"dense": DENSE, "moe": MOE}[name].replace(vocab_size=tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer")
        hf.save(f"{folder}/model", cfg, tree_map(lambda w: w, random_params(cfg)), tokenizer_dir=f"{folder}/tokenizer")
        options = {"device": "cpu", "dtype": "float32", "batch_size": 1, "max_length": LENGTH}
        peer = HFLM(pretrained=f"{folder}/model", tokenizer=f"{folder}/model", **options)
        assert type(peer.model).__name__ == {"dense": "Qwen3ForCausalLM", "moe": "Qwen3MoeForCausalLM"}[name]

        def requests(kind, arguments):
            return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]

        def scored(pairs):
            return [[*pair, *found] for pair, found in zip(pairs, peer.loglikelihood(requests("loglikelihood", map(tuple, pairs)), True))]

        contexts = [scoring_worker.TEXT[i : i + n] for i in range(40) for n in range(4, 20)]
        likeliest = ([context, tokenizer.decode([_likeliest(peer, context)])] for context in contexts if not context[-1].isspace())
        greedy = next(found for pair in likeliest if pair[1] for found in scored([pair]) if found[-1])
        scored_pairs = scored(CASES)
        rolling = peer.loglikelihood_rolling(requests("loglikelihood_rolling", ((text,) for text in TEXTS)), disable_tqdm=True)
        task = lm_eval.simple_evaluate(peer, tasks=["ours"], task_manager=TaskManager(include_path=write_task(folder)), bootstrap_iters=0)
    found = task["results"]["ours"]
    return {"pairs": [*scored_pairs, greedy], "rolling": rolling, "acc": found["acc,none"], "acc_norm": found["acc_norm,none"]}


def _likeliest(peer, context):
    """The id that the peer puts after a context."""
    import torch

    with torch.no_grad():
        return int(peer.model(torch.tensor([peer.tok_encode(context)])).logits[0, -1].argmax())


def main():
    import lm_eval

    found = {"lm_eval": lm_eval.__version__, **{name: answers(name) for name in MODELS}}
    PATH.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
