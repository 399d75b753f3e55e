"""Tiny random models made by transformers, and what it computes with them: tests/golden/hf/NAME/ with the Hugging Face files and
reference.npz. Needs torch and transformers 5. Run from the repository's root:

    python tests/golden/make_hf_models.py

reference.npz, all float32 but for the ids: tokens [2,S]; logits [2,S,V]; loss, the mean cross-entropy of tokens[:, 1:] in nats;
aux_loss, the load-balancing loss (MoE only); total_loss = loss + coef * aux_loss; grad/NAME, its gradient for each Hugging Face name
(one per expert, as saved); prompt [1,6]; greedy [8], the ids that follow it. Seeds are chosen so that greedy has 4 different ids and
no choice is close: greedy top-2 gaps and the router's gap between the last expert chosen and the first left out are above 1e-3.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent / "hf"
MIN_GAP = 1e-3

COMMON = dict(vocab_size=101, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128)
DENSE = dict(COMMON, hidden_size=40, intermediate_size=56, num_hidden_layers=2, tie_word_embeddings=False)
MOE = dict(
    COMMON,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    router_aux_loss_coef=0.02,
    norm_topk_prob=True,
)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "dense_tied": ("Qwen3", dict(DENSE, tie_word_embeddings=True)),
    "dense_untied": ("Qwen3", dict(DENSE, num_hidden_layers=3)),
    "dense_yarn": ("Qwen3", dict(DENSE, rope_parameters=YARN)),
    "qwen2_bias": ("Qwen2", dict(DENSE, head_dim=10)),
    "moe_norm": ("Qwen3Moe", MOE),
    "moe_nonorm": ("Qwen3Moe", dict(MOE, norm_topk_prob=False)),
    "moe_mixed": ("Qwen3Moe", dict(MOE, num_hidden_layers=3, mlp_only_layers=[1])),
}


def make(kind, options, seed):
    """A float32 model with weights large enough for logits of order 1."""
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(pad_token_id=None, bos_token_id=None, eos_token_id=None, **options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0.0, 0.3 if name.endswith("bias") else 0.15)
    return model


def reference(model, seq_len, seed):
    """reference.npz's arrays, or None where a choice is too close."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, model.config.vocab_size, (2, seq_len)))
    moe = {"output_router_logits": True} if model.config.model_type == "qwen3_moe" else {}
    out = model(tokens, labels=tokens, **moe)
    total, aux = out.loss, out.aux_loss if moe else None
    total.backward()
    loss = total - model.config.router_aux_loss_coef * aux if moe else total
    arrays = {"tokens": tokens, "logits": out.logits, "loss": loss, "total_loss": total}
    if moe:
        arrays["aux_loss"] = aux
    for name, p in model.named_parameters():
        arrays.update({f"grad/{k}": v for k, v in per_expert(name, p.grad).items()})
    prompt = tokens[:1, :6]
    greedy, gap = continuation(model, prompt, 8)
    arrays.update(prompt=prompt, greedy=greedy)
    gaps = [gap] + [router_gap(r, model.config.num_experts_per_tok) for r in (out.router_logits if moe else ())]
    if min(gaps) < MIN_GAP or len(greedy.unique()) < 4:
        return None
    return {k: v.detach().numpy() for k, v in arrays.items()}


def per_expert(name, tensor):
    """transformers 5 fuses experts in memory: gate_up_proj [E,2F,D], down_proj [E,D,F]; the files keep one tensor an expert."""
    prefix, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        parts = {"gate_proj": tensor.chunk(2, 1)[0], "up_proj": tensor.chunk(2, 1)[1]}
    elif last == "down_proj":
        parts = {"down_proj": tensor}
    else:
        return {name: tensor}
    return {f"{prefix}.{e}.{part}.weight": value[e] for part, value in parts.items() for e in range(len(value))}


@torch.no_grad()
def continuation(model, prompt, n):
    """n greedy ids, and the smallest gap between the two largest logits on the way."""
    ids, gaps = prompt, []
    for _ in range(n):
        top = model(ids).logits[0, -1].topk(2)
        gaps.append(float(top.values[0] - top.values[1]))
        ids = torch.cat([ids, top.indices[:1][None]], 1)
    return ids[0, -n:], min(gaps)


def router_gap(logits, k):
    top = logits.detach().softmax(-1).topk(k + 1).values
    return float((top[..., k - 1] - top[..., k]).min())


def main():
    for name, (kind, options) in MODELS.items():
        seq_len = 48 if name == "dense_yarn" else 12
        for seed in range(1000):
            model = make(kind, options, seed)
            arrays = reference(model, seq_len, seed)
            if arrays is not None:
                break
        folder = HERE / name
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
        np.savez_compressed(folder / "reference.npz", **arrays)
        saved = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        with torch.no_grad():
            again = saved(torch.from_numpy(arrays["tokens"])).logits.numpy()
        assert np.array_equal(again, arrays["logits"]), name
        size_kb = sum(f.stat().st_size for f in folder.iterdir()) / 1000
        print(f"{name}: seed {seed}, loss {arrays['loss']:.4f}, {size_kb:.0f} kB, greedy {arrays['greedy'].tolist()}")


if __name__ == "__main__":
    main()
