"""Hugging Face transformers on torch as a contestant of experiments.bench: trains and generates with the weights of a folder.

Run by experiments/bench/peers.py, in a process of its own, as a script; nothing imports this.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).parents[3]))
from experiments.bench.turns import Clock, measured, serve, timed, warmed_up  # noqa: E402


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


SLOTS, GROUPS = 16, 4  # the most rows of a batch; batches of like lengths


class EachToken(StoppingCriteria):
    """Calls a function after each token of a batch, and stops nothing."""

    def __init__(self, call):
        self.call = call

    def __call__(self, ids, scores, **_):
        self.call()
        return torch.zeros(len(ids), dtype=torch.bool)


def continued(model, prompts, count, after=lambda: None):
    """Continues prompts of different lengths greedily, padded on the left, by `count` tokens each. after: called after each token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    out = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=StoppingCriteriaList([EachToken(after)]))
    return out[:, width:].tolist()


def in_groups(model, prompts):
    """Reads prompts in batches of like lengths."""
    prompts, size = sorted(prompts, key=len), -(-len(prompts) // GROUPS)
    for at in range(0, len(prompts), size):
        continued(model, prompts[at : at + size], 1)


def arrivals(model, load, clock):
    """Runs requests that arrive at load[i]["at"]; a batch is of those that wait. Returns the times of their first and last tokens."""
    first, last, at = [0.0] * len(load), [0.0] * len(load), 0
    while at < len(load):
        clock.wait_until(load[at]["at"])
        now = clock.now()
        batch = [i for i in range(at, min(at + SLOTS, len(load))) if load[i]["at"] <= now]
        seen = []
        longest = max(load[i]["new_tokens"] for i in batch)
        continued(model, [load[i]["prompt"] for i in batch], longest, lambda seen=seen: seen.append(clock.now()))
        for i in batch:
            first[i], last[i] = seen[0], seen[load[i]["new_tokens"] - 1]
        at += len(batch)
    return {"first": first, "last": last}


def serve_part(job):
    """A step is one part of the serving benchmark; see experiments/bench/serve.py."""
    model, many, counts = load(job).eval(), job["many"], job["answers"]
    continued(model, many[:2], 2)  # libraries prepare themselves
    if job["part"] == "one":
        return {}, lambda: measured("prefill_one", continued, model, [job["one"]], 1)[0]
    if job["part"] == "many":
        return {}, lambda: {
            **measured("prefill_many", continued, model, many, 1)[0],
            **measured("prefill_grouped", in_groups, model, many)[0],
        }
    if job["part"] == "batch":
        ids = continued(model, many, max(counts))
        return {"ids": [row[:n] for row, n in zip(ids, counts)]}, lambda: measured("batch", continued, model, many, max(counts))[0]
    return {}, lambda: arrivals(model, job["load"], Clock(job["clock"]))


if __name__ == "__main__":
    serve({"train": train, "decode": decode, "serve": serve_part})
