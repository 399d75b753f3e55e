"""Wrong types, sizes and kinds of files in what comes from outside: words, and soon; or accepted with a meaning. Never a stack trace."""

import copy
import json
import os
import random
import shutil
import signal
import time
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.data import readers
from experiments.generate import defaults
from experiments.serve import requests as serve_requests
from experiments.serve.access import read_keys
from layers import rope
from qwen3 import hf, hf_files, peft
from qwen3.chat import encode_chat, openai
from qwen3.config import Qwen3Config
from qwen3.json_files import read_json
from qwen3.tokenizer import Tokenizer, train_bpe
from tests.qwen3.hf_folders import GOLDEN
from tests.qwen3.test_peft import saved
from tests.tiny import DENSE, MOE

CASES, SLOW_CASES, LIMIT_S = 2000, 20_000, 3.0
DEEP = json.loads("[" * 200 + "]" * 200)
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    -5,
    1.5,
    0.0,
    -0.0,
    2**31,
    2**63,
    10**30,
    1e30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "5",
    "\ud800",
]
ODD += ["hot", "a" * 5000, [], [[]], [1], [[1]], [None], {}, {"x": 1}, {"content": 5}, {"5": {}}, {"99999999999": {"content": "a"}}, DEEP]
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ m.reasoning_content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder with a tokenizer and an adapter beside it."""
    made = tmp_path_factory.mktemp("wrong")
    tok = train_bpe(["the quick brown fox"] * 3, 290)
    Tokenizer(tok._backend, {**tok._config, "chat_template": TEMPLATE}).save(made / "tokenizer")
    saved(made, DENSE, targets=("q", "down"))
    for file in (made / "tokenizer").iterdir():
        shutil.copy(file, made / "base")
    return made


@contextmanager
def in_time():
    """Fails where what is inside takes longer than LIMIT_S."""

    def late(*_):
        raise AssertionError(f"more than {LIMIT_S} s")

    before, start = signal.signal(signal.SIGALRM, late), time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - start < LIMIT_S


def tokenizer_config(folder, **changes):
    file = folder / "base" / "tokenizer_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), **changes}))
    try:
        return Tokenizer.load(folder / "base")
    finally:
        file.write_text(before)


TOKENIZER = {
    "eos_token=5 must be text, or an object": {"eos_token": 5},
    "pad_token=[] must be text": {"pad_token": []},
    "pad_token={'x': 1} must be text": {"pad_token": {"x": 1}},
    "added_tokens_decoder=5 must be an object of ids": {"added_tokens_decoder": 5},
    "added_tokens_decoder={'5': {}} must be an object of ids": {"added_tokens_decoder": {"5": {}}},
    "added_tokens_decoder={'x': {'content': 'a'}} must be": {"added_tokens_decoder": {"x": {"content": "a"}}},
    "broken JSON (nested more than 64 deep)": {"extra": DEEP},
    "chat_template=3 must be one Jinja text": {"chat_template": 3},
}


@pytest.mark.parametrize("said", TOKENIZER)
def test_wrong_values_in_tokenizer_config_are_named_with_their_file(folder, said):
    with in_time(), pytest.raises(ValueError) as error:
        tokenizer_config(folder, **TOKENIZER[said])
    assert "tokenizer_config.json: " in str(error.value) and said in str(error.value)


def test_a_token_without_text_is_none_for_the_template(folder):
    assert tokenizer_config(folder, unk_token={"x": 1}).apply_chat_template([{"role": "user", "content": "a"}])


GENERATION = {
    "temperature='hot' must be a number from 0 to 100": {"temperature": "hot"},
    "max_new_tokens='a' must be a whole number from 1": {"max_new_tokens": "a"},
    "max_new_tokens=True must be a whole number": {"max_new_tokens": True},
    "max_new_tokens=1e+30 must be a whole number": {"max_new_tokens": 1e30},
    "repetition_penalty=[] must be a number": {"repetition_penalty": []},
    "eos_token_id=[[1]] must be a token id, from 0": {"eos_token_id": [[1]]},
    "eos_token_id='x' must be": {"eos_token_id": "x"},
    "eos_token_id=-5 must be": {"eos_token_id": -5},
    "eos_token_id=True must be": {"eos_token_id": True},
    "eos_token_id=1.5 must be": {"eos_token_id": 1.5},
    "eos_token_id=99999999999 must be": {"eos_token_id": 99999999999},
    "top_k=1.5 must be a whole number": {"top_k": 1.5},
    "top_p=0 must be a number above 0, up to 1": {"top_p": 0},
    "do_sample='yes' must be true or false": {"do_sample": "yes"},
}


@pytest.mark.parametrize("said", GENERATION)
def test_wrong_values_in_generation_config_are_named_with_their_file(said, tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(GENERATION[said]))
    with pytest.raises(ValueError) as error:
        defaults.read(tmp_path)
    assert str(error.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("key", ["num_attention_heads", "num_hidden_layers", "num_key_value_heads", "vocab_size", "head_dim"])
@pytest.mark.parametrize("value", [2**31, 2**62, 10**30])
def test_a_size_that_no_model_has_is_refused_at_once(key, value):
    config = json.loads((GOLDEN / "dense_tied" / "config.json").read_text())
    ours = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "num_key_value_heads": "num_kv_heads"}.get(key, key)
    with in_time(), pytest.raises(ValueError, match=f"config.json: {key}={value} must be a whole number from 1 to"):
        Qwen3Config.from_hf({**config, key: value})
    with in_time(), pytest.raises(ValueError, match=f"model config: {ours}={value} must be a whole number from 1 to"):
        DENSE.replace(**{ours: value})


def test_experts_of_all_layers_are_bounded_by_the_tensors_of_the_files(tmp_path):
    """Each of the two numbers alone may be as large as the number of tensors."""
    shutil.copytree(GOLDEN / "moe_norm", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for key in ("num_experts", "num_local_experts"):
        config.pop(key, None)
    path.write_text(json.dumps({**config, "num_experts": 20, "num_hidden_layers": 20, "layer_types": None}))
    with in_time(), pytest.raises(ValueError, match=r"config.json has num_experts=20 in \d+ layers, but there are \d+ tensors"):
        hf.load(tmp_path / "model")


def test_a_vocabulary_with_a_hole_up_to_a_huge_id_is_refused_at_once(folder, tmp_path):
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["zzzz"] = 2**32 - 2
    path.write_text(json.dumps(spec))
    with in_time(), pytest.raises(ValueError, match="tokenizer.json: the highest id is 4,294,967,294 of 275 tokens"):
        Tokenizer.load(tmp_path / "tokenizer")


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors")


def opened(folder):
    """What the mains open of a Hugging Face folder."""
    cfg, _ = hf.load(folder)
    tokenizer = Tokenizer.load(folder)
    hf_files.tokenizer_files(folder)
    return defaults.stop_ids(defaults.read(folder), cfg, tokenizer)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "loop", "device", "folder"])
def test_only_regular_files_are_opened(folder, tmp_path, name, kind):
    made = shutil.copytree(folder / "base", tmp_path / "model")
    path = made / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    said = {"loop": "cannot be opened|leads nowhere", "device": "is no regular file|leads outside"}.get(
        kind, "is no regular file|cannot be opened"
    )
    with in_time(), pytest.raises(ValueError, match=f"{name} ({said})"):
        opened(made)


def test_other_files_of_the_mains_are_regular_too(folder, tmp_path):
    for name in ("keys", "a.jsonl", "a.parquet"):
        os.mkfifo(tmp_path / name)
    with in_time(), pytest.raises(ValueError, match="keys is no regular file"):
        read_keys(str(tmp_path / "keys"))
    for name in ("a.jsonl", "a.parquet"):
        with in_time(), pytest.raises(ValueError, match=f"{name} is no regular file"):
            readers.find_files(tmp_path / name)
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    for name in (peft.CONFIG, peft.WEIGHTS):
        (tmp_path / "adapter" / name).unlink()
        os.mkfifo(tmp_path / "adapter" / name)
        with in_time(), pytest.raises(ValueError, match=f"{name} is no regular file"):
            peft.open_adapter(tmp_path / "adapter", DENSE)
        (tmp_path / "adapter" / name).unlink()
        shutil.copy(folder / "adapter" / name, tmp_path / "adapter")


def test_a_file_without_end_is_not_read_whole(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    with in_time(), pytest.raises(ValueError, match="config.json has 1,099,511,627,776 bytes, and such a file at most"):
        read_json(tmp_path / "config.json")


# The fuzz: one or two fields of a right input become something else.


def spoilt(value, rng):
    """A copy of a JSON value in which one or two fields, wherever they are, have an odd value, or are renamed or gone."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        holder = value
        while True:
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() < 0.3:
                break
            holder = holder[key]
        if rng.random() < 0.05:
            del holder[key]
            if not value:
                return value
        else:
            holder[key] = rng.choice(ODD)
    return value


def config_json(value, made, _):
    cfg = Qwen3Config.from_hf(value)
    assert 0 < cfg.num_layers <= 4096 and 0 < cfg.num_heads <= 2**14 and cfg == Qwen3Config.from_hf(cfg.to_hf())
    assert all(np.isfinite(found).all() for found in rope.inv_freq(cfg))


def generation_json(value, made, tokenizer):
    (made / "generation_config.json").write_text(json.dumps(value))
    found = defaults.read(made)
    options, cfg = defaults.for_requests(found), SimpleNamespace(eos_ids=(), vocab_size=290)
    assert all(type(option) in (int, float) for option in options.values())
    assert all(type(i) is int and 0 <= i < 290 for i in defaults.stop_ids(found, cfg, tokenizer))


def tokenizer_json(value, made, _):
    (made / "tokenizer_config.json").write_text(json.dumps(value))
    tokenizer = Tokenizer.load(made)
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}])


def adapter_json(value, made, _):
    (made / peft.CONFIG).write_text(json.dumps(value))
    found = peft.open_adapter(made, DENSE)
    assert found.lora.rank == 3 and found.lora.scale > 0 and isinstance(found.base, str)


def index_json(value, made, _):
    (made / hf_files.INDEX).write_text(json.dumps(value))
    (made / hf_files.WEIGHTS).unlink(missing_ok=True)
    hf_files.open_weights(made)


def tokenizer_file(value, made, _):
    before = (made / "tokenizer.json").read_text()
    (made / "tokenizer.json").write_text(json.dumps(value))
    try:
        tokenizer = Tokenizer.load(made)
    finally:
        (made / "tokenizer.json").write_text(before)
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    tokenizer.decode(tokenizer.encode("the fox"))


def header(value, made, _):
    """Of a safetensors file; its data stay as they are."""
    data = (made / "given.safetensors").read_bytes()
    text, length = json.dumps(value).encode(), int.from_bytes(data[:8], "little")
    (made / "one.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    file = hf_files.TensorFile(made / "one.safetensors")
    for name, entry in file.entries.items():
        assert entry.code not in hf_files.DTYPES or file.array(name).shape == entry.shape


def conversation(value, made, tokenizer):
    ids, mask = encode_chat(tokenizer, *openai(value))
    assert len(ids) == len(mask) and mask.any()


def request(kind):
    def check(value, made, tokenizer):
        try:
            asked = serve_requests.parse(json.dumps(value).encode(), kind, tokenizer, "m", 200, (7,), 10)
        except serve_requests.Refused as refused:
            assert refused.param is None or isinstance(refused.param, str)
            raise ValueError(str(refused)) from refused
        assert asked.prompts and 0 < asked.options["max_new_tokens"] < 200 and asked.n * len(asked.prompts) <= 10

    return check


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}]
MESSAGES = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": [{"type": "text", "text": "x"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "why", "weight": 1},
    {"role": "tool", "content": "3", "tool_call_id": "1"},
]
OPTIONS = {"model": "m", "n": 2, "seed": 1, "temperature": 1, "top_p": 0.9, "min_p": 0.1, "top_k": 5, "repetition_penalty": 1.1}
OPTIONS |= {"max_tokens": 9, "max_completion_tokens": None, "stop": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}
CHAT = {**OPTIONS, "messages": MESSAGES, "tools": TOOLS, "tool_choice": "auto", "logprobs": True, "top_logprobs": 2, "user": "u"}
ROPE = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "truncate": False}
ROPE |= {"beta_slow": 1, "attention_factor": 1.2, "mscale": 1.0, "mscale_all_dim": 0.5}


def inputs(made):
    """{name: (a right input, its reader)}."""
    given = (made / "adapter" / peft.WEIGHTS).read_bytes()
    files = {name: json.loads((made / "base" / name).read_text()) for name in ("config.json", "tokenizer_config.json")}
    moe = {**MOE.to_hf(), "rope_parameters": ROPE, "rope_scaling": None, "layer_types": ["full_attention"] * 2, "eos_token_id": [1, 2]}
    moe |= {"mlp_only_layers": [0], "router_bias": True, "quantization_config": None}
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0, "repetition_penalty": 1.1}
    tokens = {"added_tokens_decoder": {"271": {"content": "<|endoftext|>", "special": True}}, "pad_token": {"content": "<|endoftext|>"}}
    return {
        "config.json": ({**files["config.json"], "rope_scaling": {**ROPE, "type": "yarn"}}, config_json),
        "config.json, moe": (moe, config_json),
        "generation_config.json": ({**generation, "max_new_tokens": 9, "eos_token_id": [1, 2]}, generation_json),
        "tokenizer_config.json": ({**files["tokenizer_config.json"], **tokens}, tokenizer_json),
        "adapter_config.json": (json.loads((made / "adapter" / peft.CONFIG).read_text()), adapter_json),
        "tokenizer.json": (json.loads((made / "base" / "tokenizer.json").read_text()), tokenizer_file),
        "header": (json.loads(given[8 : 8 + int.from_bytes(given[:8], "little")]), header),
        "index": ({"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}, index_json),
        "conversation": ({"messages": [*MESSAGES, {"role": "assistant", "content": "y"}], "tools": TOOLS}, conversation),
        "chat": ({**CHAT, "chat_template_kwargs": {"enable_thinking": False}, "frequency_penalty": 0}, request("chat")),
        "completion": ({**OPTIONS, "prompt": [[1, 2], "x"], "logprobs": 2, "echo": False}, request("completion")),
    }


def fuzz(folder, tmp_path, count, seed):
    """Numbers of refused and accepted cases by kind of input."""
    rng, tokenizer, told = random.Random(seed), Tokenizer.load(folder / "base"), {}
    shutil.copytree(folder / "base", tmp_path / "base")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    shutil.copy(folder / "adapter" / peft.WEIGHTS, tmp_path / "base" / "given.safetensors")
    every = inputs(folder)
    for i in range(count):
        name = list(every)[i % len(every)]
        value, check = every[name]
        value = spoilt(value, rng)
        where = tmp_path / ("adapter" if name.startswith("adapter") else "base")
        try:
            with in_time():
                check(value, where, tokenizer)
        except (ValueError, FileNotFoundError) as error:
            assert 10 < len(str(error)) < 1000 and "Traceback" not in str(error), (name, value, str(error))
            told.setdefault(name, [0, 0])[0] += 1
        except BaseException as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}\n{str(value)[:3000]}") from error
        else:
            told.setdefault(name, [0, 0])[1] += 1
    return told


def check_fuzz(folder, tmp_path, count, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = fuzz(folder, tmp_path, count, seed)
    assert all(refused > 0.2 * sum((refused, fine)) and (fine or name == "index") for name, (refused, fine) in told.items()), told


def test_right_inputs_are_accepted(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    shutil.copy(folder / "adapter" / peft.WEIGHTS, tmp_path / "base" / "given.safetensors")
    tokenizer = Tokenizer.load(folder / "base")
    for name, (value, check) in inputs(folder).items():
        if name != "index":  # it names a file that is not there
            check(value, tmp_path / ("adapter" if name.startswith("adapter") else "base"), tokenizer)


def test_wrong_types_and_extremes_by_field_end_in_words_or_have_a_meaning(folder, tmp_path):
    check_fuzz(folder, tmp_path, CASES, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_more_wrong_types_and_extremes(folder, tmp_path, seed):
    check_fuzz(folder, tmp_path, SLOW_CASES, seed)
