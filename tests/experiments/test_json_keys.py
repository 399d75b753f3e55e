"""JSON in which an object has a key twice: every reader refuses it with the names of the key and of the file, and takes neither value."""

import json
import re

import pytest

from experiments.data import parts, readers
from experiments.evaluate import tasks
from experiments.generate import defaults, prompts
from experiments.serve import requests as serve_requests
from experiments.train import run_folder
from parallel.checkpoint.files import CheckpointError
from parallel.checkpoint.read import Reader
from parallel.checkpoint.store import save
from parallel.json_text import DuplicateKey, loads
from qwen3 import hf, hf_files, messages, peft
from qwen3.config import Qwen3Config
from qwen3.tokenizer import Tokenizer
from tests.experiments import scoring_worker
from tests.qwen3.hf_folders import folder, sharded, write_raw  # noqa: F401, fixtures


def test_a_key_is_named_wherever_its_object_is():
    for text, key in (('{"a": 1, "a": 1}', "a"), ('[{"b": {"c": 1, "d": 2, "c": 3}}]', "c"), (b'{"x": 1, "\\u0078": 2}', "x")):
        with pytest.raises(DuplicateKey, match=f"the key '{key}' is there twice in one object") as error:
            loads(text)
        assert error.value.key == key
    assert loads('{"a": {"a": 1}, "b": [{"a": 2}, {"a": 2}]}') == {"a": {"a": 1}, "b": [{"a": 2}, {"a": 2}]}
    with pytest.raises(DuplicateKey) as error:
        loads(f'{{"{"a" * 10**6}": 1, "{"a" * 10**6}": 2}}')
    assert len(str(error.value)) < 200


def repeat(path, key):
    """Puts the first `"key": ` of a file there twice, with another value first."""
    text = path.read_text()
    assert f'"{key}":' in text, text[:500]
    path.write_text(text.replace(f'"{key}":', f'"{key}": 7, "{key}":', 1))


def refused(path, key, read, kind=ValueError):
    with pytest.raises(kind, match=f"{re.escape(str(path))}.*the key '{re.escape(key)}' is there twice"):
        read()


def test_of_a_model_folder(folder):  # noqa: F811
    config, text = folder / "config.json", (folder / "config.json").read_text()
    repeat(config, "rms_norm_eps")
    refused(config, "rms_norm_eps", lambda: hf.load(folder))
    config.write_text(text)
    (folder / "generation_config.json").write_text('{"top_p": 0.5, "top_p": 0.9}')
    refused(folder / "generation_config.json", "top_p", lambda: defaults.read(folder))
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    write_raw(folder, f'{{"a": {entry}, "a": {entry}}}'.encode(), bytes(4))
    refused(folder / "model.safetensors", "a", lambda: hf_files.open_weights(folder))


def test_of_an_index(sharded):  # noqa: F811
    repeat(sharded / hf_files.INDEX, "model.norm.weight")
    refused(sharded / hf_files.INDEX, "model.norm.weight", lambda: hf_files.open_weights(sharded))


@pytest.mark.parametrize("name, key", [("tokenizer.json", "merges"), ("tokenizer_config.json", "eos_token"), ("tokenizer.json", "\\n")])
def test_of_a_tokenizer(name, key, tmp_path):
    tokenizer = scoring_worker.tokenizer()
    tokenizer.save(tmp_path)
    if key == "\\n":  # a token of the vocabulary with two ids
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(re.sub(r'"vocab":\s*\{', '"vocab": {"!": 0,', text, count=1))
        refused(tmp_path / name, "!", lambda: Tokenizer.load(tmp_path))
        return
    repeat(tmp_path / name, key)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}.*(is there twice|duplicate field|cannot be read)"):
        Tokenizer.load(tmp_path)


def test_of_an_adapter(tmp_path):
    (tmp_path / peft.CONFIG).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "r": 8}')
    refused(tmp_path / peft.CONFIG, "r", lambda: peft.read_config(tmp_path))


def test_of_a_run_folder_and_its_checkpoint(tmp_path):
    for name, read in (("config.json", run_folder.saved_config), ("finished.json", run_folder.finished_step)):
        (tmp_path / name).write_text('{"step": 4, "data": {}, "optim": {}, "train": {"seed": 1, "seed": 2}, "step": 6}')
        with pytest.raises(ValueError, match=f"{name} is not JSON .the key '(seed|step)' is there twice"):
            read(tmp_path)
    save(str(tmp_path / "step_000007"), iter(()), {"step": 7})
    Reader(str(tmp_path / "step_000007"))
    repeat(tmp_path / "step_000007" / "manifest.json", "step")
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        Reader(str(tmp_path / "step_000007"))


TWICE = '{"text": "a", "text": "b"}'


@pytest.mark.parametrize(
    "name, content, where",
    [("a.jsonl", f'{{"text": "x"}}\n{TWICE}\n', "line 2"), ("a.json", f'[{{"text": "x"}},\n{TWICE}]', "line 2")],
)
def test_of_records(name, content, where, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    refused(f"{path}, {where}", "text", lambda: list(readers.records(path)))
    left_out = []
    assert [record.value for record in readers.records(path, bad=left_out.append)] == [{"text": "x"}]
    assert len(left_out) == 1 and "is there twice" in left_out[0]


def test_of_prompts_and_tasks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "prompt": "b"}\n')
    refused(f"{path}, line 1", "prompt", lambda: prompts.read(None, str(path)))
    path.write_text('{"context": "a", "target": "b", "target": "c"}\n')
    refused(f"{path}, line 1", "target", lambda: tasks.read(str(path)))


def test_of_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(str(tmp_path))
    path = tmp_path / "dataset_dict.json"
    repeat(path, "splits")
    refused(path, "splits", lambda: parts.find(f"hf:{tmp_path}", "text"))
    path.write_text('{"splits": 3}')
    with pytest.raises(ValueError, match=f'{re.escape(str(path))} must have "splits", a list of names'):
        parts.find(f"hf:{tmp_path}", "text")


@pytest.mark.parametrize(
    "body, key",
    [
        ('{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_tokens": 100}', "max_tokens"),
        ('{"model": "m", "messages": [{"role": "user", "content": "x", "role": "system"}]}', "role"),
    ],
)
def test_of_a_request(body, key):
    with pytest.raises(serve_requests.Refused, match=f"the key '{key}' is there twice in one object; send each key once") as error:
        serve_requests.parse(body.encode(), "chat", scoring_worker.tokenizer(), "m", 200, (7,), 10)
    assert (error.value.param, error.value.status) == (key, 400)


def test_of_the_arguments_of_a_call():
    with pytest.raises(ValueError, match="'tools' is not JSON: .the key 'name' is there twice"):
        messages.parse_json("tools", '[{"name": "a", "name": "b"}]')


def test_files_that_we_write_have_no_key_twice(tmp_path):
    assert loads(json.dumps(Qwen3Config().to_hf())) == Qwen3Config().to_hf()
