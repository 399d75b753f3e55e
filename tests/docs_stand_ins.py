"""Files for the commands of the pages, where the slow tests run them: tiny models and a little of each kind of data."""

import json
import os

import pyarrow
import pyarrow.parquet

from parallel.trees import tree_map
from qwen3 import hf
from qwen3.tokenizer import train_bpe
from tests.tiny import DENSE, MOE, random_params

TEXTS = [f"def function_{j}(x):\n    return x + {7 * j}\n去上海的旅游攻略\n" for j in range(80)]


def make_stand_ins(folder):
    """Fills `folder`. DIR, Qwen3-32B and so on are Hugging Face folders; FILE_OR_FOLDER is a text; CHATS.jsonl has conversations, and
    PAIRS.jsonl preferences, PROMPTS.jsonl prompts with their answers, TEXTS.txt one text a line."""
    tokenizer = train_bpe(TEXTS, 320)
    tokenizer.save(folder / "tokenizer")
    (folder / "model_from_hf").mkdir()
    (folder / "dataset").mkdir()
    for name, cfg in (("Qwen3-32B", DENSE), ("Qwen3-30B-A3B", MOE)):
        cfg = cfg.replace(vocab_size=tokenizer.vocab_size, max_position=256, eos_id=tokenizer.eos_id)
        params = tree_map(lambda w: w, random_params(cfg))
        hf.save(folder / name, cfg, params, tokenizer_dir=folder / "tokenizer")
    for name in ("DIR", "hf_dir", "model_from_hf/qwen2.5-7b-hf", "model_from_hf/qwen3-8b-hf"):
        os.symlink(folder / "Qwen3-32B", folder / name)
    (folder / "FILE_OR_FOLDER").mkdir()
    (folder / "FILE_OR_FOLDER" / "a.txt").write_text("".join(TEXTS))
    (folder / "wiki.train.tokens").write_text("".join(f" \n = Title {i} = \n \n {text}" for i, text in enumerate(TEXTS)))
    (folder / "data.jsonl").write_text("".join(json.dumps({"src": "a", "text": text}) + "\n" for text in TEXTS))
    table = pyarrow.table({"instruction": TEXTS, "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "dataset" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet")
    chats = [{"instruction": f"def {j}", "input": "", "output": f"return {j}"} for j in range(80)]
    (folder / "alpaca_gpt4_data_zh.json").write_text(json.dumps(chats))
    pairs = [{"prompt": chat["instruction"], "chosen": chat["output"], "rejected": "no"} for chat in chats]
    (folder / "PAIRS.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prompts = [{"prompt": chat["instruction"], "answer": chat["output"]} for chat in chats]
    (folder / "PROMPTS.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "CHATS.jsonl").write_text("".join(json.dumps({"messages": messages(chat)}) + "\n" for chat in chats))
    (folder / "input_predict_data.txt").write_text("去上海\n" * 5)
    (folder / "prompts.txt").write_text("def a\ndef b\n")
    (folder / "TEXTS.txt").write_text("".join(TEXTS[:3]))
    (folder / "prompts.jsonl").write_text(json.dumps("def a") + "\n" + json.dumps([{"role": "user", "content": "def b"}]) + "\n")
    (folder / "quiz.jsonl").write_text(json.dumps({"context": "def", "choices": ["f", "g"], "answer": 0}) + "\n")
    (folder / "cloze.jsonl").write_text(json.dumps({"context": "def", "target": "f"}) + "\n")


def messages(chat):
    """One record of alpaca as OpenAI's messages."""
    return [{"role": "user", "content": chat["instruction"]}, {"role": "assistant", "content": chat["output"]}]
