"""tests/golden/continuations.json: how transformers goes on greedily from prompts of mixed lengths, with the models of tests/golden/hf.
Needs torch and transformers 5. Run from the repository's root:

    python tests/golden/make_continuations.py

{model: [{"prompt": ids, "greedy": ids}]}. No choice is close: neither of a token, whose gap to the next likely one is above 1e-3, nor, at
any place, of an expert.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
LENGTHS = (9, 1, 23, 4, 16, 2, 31, 6)
NEW, MIN_GAP = 12, 1e-3


@torch.no_grad()
def continuation(model, prompt):
    """The ids that follow; None where a choice is close."""
    ids = torch.tensor([prompt])
    for _ in range(NEW):
        top = model(ids).logits[0, -1].topk(2)
        if float(top.values[0] - top.values[1]) < MIN_GAP:
            return None
        ids = torch.cat([ids, top.indices[:1][None]], 1)
    if model.config.model_type == "qwen3_moe":
        k = model.config.num_experts_per_tok
        for logits in model(ids, output_router_logits=True).router_logits:
            top = logits.softmax(-1).topk(k + 1).values
            if float((top[..., k - 1] - top[..., k]).min()) < MIN_GAP:
                return None
    return ids[0, len(prompt) :].tolist()


def continuations(folder):
    """One for each of LENGTHS, the first prompts of a seeded row that leave no close choice."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    rng, out = np.random.default_rng(0), []
    for length in LENGTHS:
        greedy = None
        while greedy is None:
            prompt = rng.integers(0, model.config.vocab_size, length).tolist()
            greedy = continuation(model, prompt)
        out.append({"prompt": prompt, "greedy": greedy})
    return out


def main():
    found = {folder.name: continuations(folder) for folder in sorted((HERE / "hf").iterdir())}
    text = ",\n".join(f'"{name}": [\n' + ",\n".join(json.dumps(one) for one in each) + "]" for name, each in found.items())
    (HERE / "continuations.json").write_text("{" + text + "}\n")


if __name__ == "__main__":
    main()
