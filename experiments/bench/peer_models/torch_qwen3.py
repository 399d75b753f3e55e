"""Hugging Face transformers on torch as a contestant of experiments.bench: trains and generates with the weights of a folder.

Run by experiments/bench/peers.py, in a process of its own, as a script; nothing imports this.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[3]))
from experiments.bench.turns import serve, timed, warmed_up  # noqa: E402


def load(job):
    """The model, with the attention and the experts that were fastest here; on the cores that the job names."""
    torch.set_num_threads(job["threads"])
    torch.set_flush_denormal(True)
    choice = {"experts_implementation": job.get("experts", "grouped_mm")} if job["model"]["num_experts"] else {}
    return AutoModelForCausalLM.from_pretrained(Path(job["folder"]) / "model", dtype=torch.float32, attn_implementation="sdpa", **choice)


def train(job):
    """A step is forward, backward, clipping and AdamW on one batch, of one document a row."""
    model, batch = load(job).train(), np.load(Path(job["folder"]) / "documents.npz")
    tokens = torch.from_numpy(batch["tokens"].astype(np.int64))
    weights = batch["loss_weights"]
    labels = np.where(np.roll(weights, 1, 1) > 0, batch["tokens"], -100)  # transformers shifts them: a label is its own token
    labels[:, 0] = -100
    labels = torch.from_numpy(labels.astype(np.int64))
    optim = job["optim"]
    groups = [[], []]
    for w in model.parameters():
        groups[w.dim() > 1].append(w)
    groups = [{"params": params, "weight_decay": decay} for params, decay in zip(groups, (0.0, optim["weight_decay"]))]
    optimizer = torch.optim.AdamW(groups, optim["lr"], (optim["b1"], optim["b2"]), optim["eps"], fused=True)

    extra = {"output_router_logits": True} if job["model"]["num_experts"] else {}  # so that the router's loss is in the loss
    router_coef = model.config.router_aux_loss_coef if job["model"]["num_experts"] else 0.0

    def losses():
        out = model(input_ids=tokens, labels=labels, use_cache=False, **extra)
        return out.loss, out.get("aux_loss")

    if job["compile"]:
        losses = torch.compile(losses, mode=job.get("mode"))

    def step():
        loss, router_loss = losses()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() - (router_coef * router_loss.item() if router_coef else 0.0)

    facts = warmed_up(step, job["warmup_steps"])
    return facts, lambda: {"step_time_s": timed(step)[0]}


def decode(job):
    """A step reads the prompts and continues them greedily, once by one token and once by all."""
    model = load(job).eval()
    prompts = torch.tensor(job["prompts"])
    plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generation = {n: GenerationConfig(max_new_tokens=n, min_new_tokens=n, **plain) for n in (1, job["new_tokens"])}

    def generate(n):
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=generation[n])
        return out[:, prompts.shape[1] :].tolist()

    def step():
        first, _ = timed(generate, 1)
        every, _ = timed(generate, job["new_tokens"])
        return {"prefill_s": first, "total_s": every}

    return {"ids": generate(job["new_tokens"])}, step


if __name__ == "__main__":
    serve({"train": train, "decode": decode})
