"""tests/golden/peers: answers of transformers and PEFT, so that tests judge by them where the peers are not installed. Needs torch,
transformers 5 and PEFT. Run from the repository's root:

    [QWEN3_TOKENIZER=FOLDER] python -m tests.golden.make_peers

chats.json: each conversation of tests/qwen3/test_chat.py as text, and the lengths of the runs of its loss mask, 0s first.
renderings.json: texts of the templates of tests/qwen3/test_tokenizer.py. yarn.json: rotary frequencies. peft/NAME: an adapter that PEFT
saved for a model of tests/golden/hf, and its logits. states.npz: the last states of texts of several lengths. released.json: of the
released tokenizer, ids of texts and hashes of conversations; made only where QWEN3_TOKENIZER is set.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "peers"
# transformers' keys of rope_parameters; each value that is left out is its default.
YARN = [
    {"factor": 4.0, "original_max_position_embeddings": 64},
    {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.5, "mscale_all_dim": 1.0},
    {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7},
    {"factor": 8.0, "original_max_position_embeddings": 300, "truncate": False},
    {"factor": 8.0, "original_max_position_embeddings": 300, "truncate": True},
    {"factor": 2.5, "original_max_position_embeddings": 128, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"factor": 2.5, "original_max_position_embeddings": 128, "attention_factor": 1.3},
    {"factor": 1.0, "original_max_position_embeddings": 128},
]
ROTARY = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 512}
ADAPTERS = {  # name: (model, modules, options of LoraConfig)
    "dense": ("dense_untied", ["q_proj", "o_proj", "up_proj", "embed_tokens"], {"use_rslora": True}),
    "tied": ("dense_tied", ["v_proj", "down_proj"], {}),
    "qwen2": ("qwen2_bias", ["k_proj", "gate_proj"], {"lora_dropout": 0.1}),
    "moe": ("moe_norm", ["q_proj", "v_proj"], {}),
}


def runs(mask):
    """Lengths of the runs of a mask of 0 and 1, the first of 0s."""
    out, value = [0], 0
    for bit in mask:
        if int(bit) != value:
            out.append(0)
            value = int(bit)
        out[-1] += 1
    return out


def digest(text):
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def opened(tokenizer):
    """transformers' tokenizer of ours."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return transformers.AutoTokenizer.from_pretrained(folder)


def chats():
    from tests.qwen3 import test_chat as cases

    peer, out = opened(cases.make_tokenizer()), {}
    for name, tools, thinking in cases.CASES:
        kw = {} if thinking is None else {"enable_thinking": thinking}
        messages = cases.CONVERSATIONS[name]
        text = peer.apply_chat_template(messages, tools=tools, chat_template=cases.TAGGED, tokenize=False, **kw)
        out[cases.case_id(name, tools, thinking)] = [text, runs(cases.judge(peer, cases.TAGGED, messages, tools, thinking)[1])]
    return out


def renderings():
    from tests.qwen3 import test_tokenizer as cases

    peer = opened(cases.make_tokenizer())
    plain = [
        peer.apply_chat_template(cases.MESSAGES, tools=t, add_generation_prompt=p, chat_template=cases.TEMPLATE, tokenize=False, **more)
        for t, p, more in itertools.product(*cases.RENDERED)
    ]
    tagged = [
        peer.apply_chat_template(cases.TURNS, add_generation_prompt=prompt, chat_template=template, tokenize=False)
        for template, prompt in itertools.product(cases.TAGGED, (False, True))
    ]
    return {"plain": plain, "tagged": tagged}


def yarn():
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    out = []
    for rope in YARN:
        config = transformers.Qwen3Config(**ROTARY, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **rope})
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
        out.append([[float(x) for x in frequencies], float(factor)])
    return out


def adapters():
    import peft
    import torch
    import transformers

    tokens = np.random.default_rng(0).integers(0, 90, (2, 7))
    for name, (model, modules, options) in ADAPTERS.items():
        folder = HERE / "peft" / name
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            HERE.parent / "hf" / model, attn_implementation="eager", dtype=torch.float32
        )
        settings = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", "init_lora_weights": False}
        made = peft.get_peft_model(base, peft.LoraConfig(target_modules=modules, **settings, **options)).eval()
        made.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        config.update(base_model_name_or_path=model, target_modules=sorted(modules))
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        with torch.no_grad():
            np.savez(folder / "logits.npz", tokens=tokens.astype(np.int32), logits=made(torch.from_numpy(tokens)).logits.numpy())


def states():
    """{"NAME ids N": a text of N tokens, "NAME N": the state of its last token after the final norm}, of models of tests/golden/hf."""
    import torch
    import transformers

    out = {}
    for name in ("dense_tied", "moe_norm"):
        model = transformers.AutoModel.from_pretrained(HERE.parent / "hf" / name, attn_implementation="eager", dtype=torch.float32).eval()
        for n in (3, 9, 14):
            out[f"{name} ids {n}"] = ids = np.random.default_rng(n).integers(0, 101, n)
            with torch.no_grad():
                out[f"{name} {n}"] = model(torch.from_numpy(ids)[None]).last_hidden_state[0, -1].numpy()
    return out


def released(folder):
    import transformers

    from tests.qwen3 import test_released as cases

    peer = transformers.AutoTokenizer.from_pretrained(folder)
    hashes = {}
    for name, (messages, tools) in cases.conversations().items():
        for prompt, thinking in itertools.product((False, True), (None, True, False)):
            kw = {} if thinking is None else {"enable_thinking": thinking}
            text = peer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **kw)
            hashes[f"{name}, prompt {prompt}, thinking {thinking}"] = digest(text)
    return {"ids": [peer.encode(text) for text in cases.TEXTS], "hashes": hashes}


def write(name, value):
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) if isinstance(value, dict) else None
    text = f"{{\n{lines}\n}}\n" if lines is not None else "[\n" + ",\n".join(map(json.dumps, value)) + "\n]\n"
    (HERE / name).write_text(text)


def main():
    HERE.mkdir(exist_ok=True)
    write("chats.json", chats())
    write("renderings.json", renderings())
    write("yarn.json", yarn())
    adapters()
    np.savez(HERE / "states.npz", **states())
    if folder := os.environ.get("QWEN3_TOKENIZER"):
        write("released.json", released(folder))


if __name__ == "__main__":
    sys.exit(main())
