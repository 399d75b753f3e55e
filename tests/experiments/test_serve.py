"""experiments.serve as the official client sees it: one server process for all tests of this file, the last of which ends it."""

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from experiments.evaluate import scoring
from qwen3 import hf
from qwen3.generate import generate
from tests.experiments import scoring_worker
from tests.tiny import DENSE, random_params

openai = pytest.importorskip("openai")
pytest.importorskip("aiohttp")
ROOT = Path(__file__).parents[2]
MOST, SECRET = 64, "xyzzy plugh"  # texts at a time; words that no log may have


@pytest.fixture(scope="module")
def model():
    tokenizer = scoring_worker.tokenizer()
    cfg = DENSE.replace(vocab_size=tokenizer.vocab_size, max_position=1024, eos_id=tokenizer.eos_id)
    return cfg, random_params(cfg), tokenizer


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """{url, process, log} of a server with 4 slots and room for 60 that wait."""
    cfg, params, tokenizer = model
    folder = tmp_path_factory.mktemp("serve")
    tokenizer.save(folder / "tokenizer")
    hf.save(folder / "tiny", cfg, params, tokenizer_dir=folder / "tokenizer")
    command = [sys.executable, "-m", "experiments.serve", f"--hf_dir={folder}/tiny", "--port=0", "--slots=4", f"--max_waiting={MOST - 4}"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*command, "--length=512", "--max_body=100000"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        text, end = "", time.monotonic() + 120
        while "serving" not in text:
            text = (folder / "log").read_text()
            assert process.poll() is None and time.monotonic() < end, text
            time.sleep(0.1)
        url = text.partition(" on ")[2].partition("/v1")[0]
        yield {"url": url, "process": process, "log": folder / "log"}
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server["url"] + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def many(server):
    return openai.AsyncOpenAI(base_url=server["url"] + "/v1", api_key="none", max_retries=0)


def health(server):
    with urllib.request.urlopen(server["url"] + "/health") as found:
        return json.load(found)


def until_idle(server, most_s=10):
    end = time.monotonic() + most_s
    while health(server)["requests"]:
        assert time.monotonic() < end, "a request that was dropped keeps its place"
        time.sleep(0.02)


def post(server, data, path="/v1/completions", content_type="application/json", **headers):
    """(status, body) of a raw request."""
    headers = {"Content-Type": content_type, **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(server["url"] + path, data, headers)) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def greedy(model, prompts, count):
    cfg, params, tokenizer = model
    ids = [tokenizer.encode(prompt, allow_special=True) for prompt in prompts]
    stop = [tokenizer.eos_id, tokenizer.eod_id]
    return [tokenizer.decode(new, skip_special=True) for new in generate(params, ids, cfg, count, stop_ids=stop)]


@pytest.fixture(scope="module")
def ids(model):
    """The 150 ids that follow "def f" greedily."""
    cfg, params, tokenizer = model
    return generate(params, [tokenizer.encode("def f")], cfg, 150, stop_ids=[tokenizer.eos_id, tokenizer.eod_id])[0]


def test_a_chat_is_what_the_model_says_whole_and_streamed(client, model):
    messages = [{"role": "user", "content": "def f"}]
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    prompt = model[2].apply_chat_template(messages, add_generation_prompt=True)
    assert whole.choices[0].message.content == greedy(model, [prompt], 12)[0] and whole.choices[0].finish_reason == "length"
    size = len(model[2].encode(prompt, allow_special=True))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (size, 12, size + 12)
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.delta.content or "" for part in parts for c in part.choices) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert [c.finish_reason for part in parts for c in part.choices if c.finish_reason] == ["length"]
    assert [m.id for m in client.models.list()] == [client.models.retrieve("tiny").id] == ["tiny"]


def test_fifty_requests_at_once_are_each_answered_as_alone(many, model, server):
    prompts = [scoring_worker.TEXT[7 * i : 7 * i + 3 + i] for i in range(50)]
    want = greedy(model, prompts, 10)

    async def one(i):
        asked = {"model": "tiny", "prompt": prompts[i], "max_tokens": 10, "temperature": 0}
        if i % 3:
            return (await many.completions.create(**asked)).choices[0].text
        return "".join([part.choices[0].text async for part in await many.completions.create(**asked, stream=True)])

    async def all_of_them():
        return await asyncio.gather(*map(one, range(50)))

    assert asyncio.run(all_of_them()) == want and len(set(want)) > 20
    until_idle(server)


def test_a_client_that_goes_away_frees_its_place_and_harms_no_other(many, server, model, ids):
    asked = {"model": "tiny", "prompt": "def f", "temperature": 0}

    async def go():
        other = asyncio.create_task(many.completions.create(**asked, max_tokens=100))
        stream = await many.completions.create(**asked, max_tokens=400, stream=True, n=5)
        async for _ in stream:
            break
        assert health(server)["requests"] == 6
        await stream.close()
        waits = asyncio.create_task(many.completions.create(**asked, max_tokens=400))
        await asyncio.sleep(0.1)
        waits.cancel()
        return (await other).choices[0].text

    assert asyncio.run(go()) == model[2].decode(ids[:100], skip_special=True)
    until_idle(server)


def test_more_than_may_wait_is_told_to_come_again(many, server):
    async def go():
        stream = await many.completions.create(model="tiny", prompt="x", n=MOST, max_tokens=400, stream=True)
        with pytest.raises(openai.RateLimitError) as found:
            await many.completions.create(model="tiny", prompt="x", max_tokens=1)
        await stream.close()
        return found.value

    error = asyncio.run(go())
    assert error.code == "queue_full" and error.response.headers["Retry-After"] == "1"
    until_idle(server)


def test_a_short_request_passes_a_large_one(many, server, model):
    """It has the next slot, whatever waits before it, and the text that it has alone."""
    want = greedy(model, ["def f"], 4)[0]

    async def go():
        large = asyncio.create_task(many.completions.create(model="tiny", prompt="x", n=MOST - 1, max_tokens=200, extra_body={"top_k": 5}))
        while not health(server)["requests"]:
            await asyncio.sleep(0.01)
        short = await many.completions.create(model="tiny", prompt="def f", max_tokens=4, temperature=0)
        left = health(server)["requests"]
        large.cancel()
        return short.choices[0].text, left

    text, left = asyncio.run(go())
    assert text == want and left > MOST // 2, left
    until_idle(server)


def test_samples_seeds_stops_and_log_probabilities(client, model, ids):
    cfg, params, tokenizer = model
    asked = {
        "model": "tiny",
        "prompt": "def f",
        "max_tokens": 8,
        "seed": 5,
        "extra_body": {"top_k": 50, "min_p": 0.001, "repetition_penalty": 1.1},
    }
    one, two = (client.completions.create(**asked, n=3) for _ in range(2))
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in two.choices] and len(set(texts)) > 1
    free = client.completions.create(model="tiny", prompt="def f", max_tokens=8, temperature=0, logprobs=2).choices[0]
    stop = free.text[2:4]
    cut = client.completions.create(model="tiny", prompt="def f", max_tokens=8, temperature=0, stop=[stop]).choices[0]
    assert cut.text == free.text[: free.text.find(stop)] and cut.finish_reason == "stop"
    scorer, prompt, new = scoring.build(params, cfg, tokenizer), tokenizer.encode("def f"), ids[:8]
    want = [scoring.loglikelihood_ids(scorer, [(prompt + new[:i], [new[i]])])[0][0] for i in range(8)]
    np.testing.assert_allclose(free.logprobs.token_logprobs, want, rtol=1e-5)
    assert all(max(top.values()) == pytest.approx(x, rel=1e-5) for top, x in zip(free.logprobs.top_logprobs, want))
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=3, logprobs=True, top_logprobs=1, temperature=0
    )
    assert all(entry.logprob == entry.top_logprobs[0].logprob and entry.bytes for entry in said.choices[0].logprobs.content)
    by_ids = client.completions.create(model="tiny", prompt=[prompt, prompt], max_tokens=8, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [free.text] * 2


def test_an_answer_follows_a_schema_beside_one_that_follows_none(many, model):
    """Whole and streamed; the schema that cannot be is refused by its place, the penalties and biases have their effect."""
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    asked = {"model": "tiny", "messages": [{"role": "developer", "content": "x"}], "response_format": form, "max_tokens": 200, "seed": 1}
    free = {"model": "tiny", "prompt": "def f", "max_tokens": 20, "temperature": 0}
    (want,) = greedy(model, ["def f"], 20)

    async def streamed():
        parts = [part async for part in await many.chat.completions.create(**asked, stream=True)]
        return "".join(choice.delta.content or "" for part in parts for choice in part.choices)

    async def go():
        whole = many.chat.completions.create(**asked)
        return *await asyncio.gather(whole, streamed(), many.completions.create(**free)), *await refused()

    wrong = {**form, "json_schema": {"name": "x", "schema": {"type": "array", "items": {"type": "strin"}}}}

    async def refused():
        with pytest.raises(openai.BadRequestError) as error:
            await many.chat.completions.create(**{**asked, "response_format": wrong})
        biased = await many.completions.create(**free, logit_bias={"70": 100}, echo=True, extra_body={"ignore_eos": True})
        return error.value, biased.choices[0].text

    whole, text, other, error, biased = asyncio.run(go())
    assert whole.choices[0].message.content == text and 0 <= json.loads(text)["n"] <= 99 and whole.choices[0].finish_reason == "stop"
    assert other.choices[0].text == want
    assert error.param == "response_format" and "response_format.json_schema.schema.items: Invalid type: strin" in str(error)
    assert biased == "def f" + model[2].decode([70]) * 20


GOOD = {"model": "tiny", "prompt": "x", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
BAD = [
    ({**GOOD, "model": "other"}, 404, "model"),
    ({"prompt": "x"}, 404, "model"),
    ({**GOOD, "prompt": ""}, 400, "prompt"),
    ({**GOOD, "prompt": []}, 400, "prompt"),
    ({**GOOD, "prompt": [1, "x"]}, 400, "prompt"),
    ({**GOOD, "prompt": [True]}, 400, "prompt"),
    ({**GOOD, "prompt": [10**6]}, 400, "prompt"),
    ({**GOOD, "prompt": [-1]}, 400, "prompt"),
    ({**GOOD, "prompt": "\ud800"}, 400, "prompt"),
    ({**GOOD, "prompt": "x" * 5000}, 400, "prompt"),
    ({**GOOD, "max_tokens": 0}, 400, "max_tokens"),
    ({**GOOD, "max_tokens": 512}, 400, "max_tokens"),
    ({**GOOD, "max_tokens": "5"}, 400, "max_tokens"),
    ({**GOOD, "max_tokens": True}, 400, "max_tokens"),
    ({**GOOD, "temperature": -1}, 400, "temperature"),
    ({**GOOD, "temperature": float("nan")}, 400, "temperature"),
    ({**GOOD, "top_p": 0}, 400, "top_p"),
    ({**GOOD, "top_k": 1.5}, 400, "top_k"),
    ({**GOOD, "min_p": 2}, 400, "min_p"),
    ({**GOOD, "repetition_penalty": 0}, 400, "repetition_penalty"),
    ({**GOOD, "seed": 2**64}, 400, "seed"),
    ({**GOOD, "n": 0}, 400, "n"),
    ({**GOOD, "n": MOST + 1}, 400, "n"),
    ({**GOOD, "stop": [""]}, 400, "stop"),
    ({**GOOD, "stop": ["x"] * 17}, 400, "stop"),
    ({**GOOD, "logprobs": 21}, 400, "logprobs"),
    ({**GOOD, "stream": "yes"}, 400, "stream"),
    ({**GOOD, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({**GOOD, "logit_bias": {"1": 500}}, 400, "logit_bias"),
    ({**GOOD, "frequency_penalty": 2.5}, 400, "frequency_penalty"),
    ({**GOOD, "min_tokens": 2}, 400, "min_tokens"),
    ({**GOOD, "best_of": 2}, 400, "best_of"),
    ({**CHAT, "echo": True}, 400, "echo"),
    ({**CHAT, "response_format": {"type": "xml"}}, 400, "response_format"),
    ({**CHAT, "thinking_budget": 5}, 400, "thinking_budget"),  # this tokenizer's template has no reasoning
    ({**GOOD, "nonsense": 1}, 400, "nonsense"),
    ({**CHAT, "messages": []}, 400, "messages"),
    ({**CHAT, "messages": "[]"}, 400, "messages"),
    ({**CHAT, "messages": [1]}, 400, "messages"),
    ({**CHAT, "messages": [{"role": "boss", "content": "x"}]}, 400, "messages"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ({**CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
    ({**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "messages"),  # this tokenizer's template has none
    ({**CHAT, "tool_choice": "required"}, 400, "tool_choice"),
    ({**CHAT, "chat_template_kwargs": {"x": 1}}, 400, "chat_template_kwargs"),
    ({**CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
    ({**CHAT, "prompt": "x"}, 400, "prompt"),
]


def test_what_cannot_be_honoured_is_refused_by_name(server):
    for body, status, param in BAD:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        got, found = post(server, json.dumps(body).encode(), path)
        assert (got, found["error"]["param"]) == (status, param) and found["error"]["message"], (body, got, found)
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "echo": False, "user": "me", "top_k": -1}
    assert post(server, json.dumps({**GOOD, **neutral}).encode())[0] == 200


def test_bodies_that_are_no_requests_are_refused(server):
    for data in (b"", b"{", b"[]", b"\xff\xfe", b"1" * 5000, b"[" * 90000, b'{"model": "tiny", "prompt": "' + b"\xff" * 9 + b'"}'):
        status, found = post(server, data)
        assert status == 400 and found["error"]["type"] == "invalid_request_error", data[:20]
    assert post(server, json.dumps({**GOOD, "prompt": "x" * 200_000}).encode())[0] == 413
    assert post(server, json.dumps(GOOD).encode(), content_type="text/plain")[0] == 415
    assert post(server, json.dumps(GOOD).encode(), "/v1/embeddings")[0] == 404
    assert post(server, json.dumps(GOOD).encode(), Host="rebound.example")[0] == 403  # a page whose name was made to lead here
    assert post(server, gzip.compress(b" " * 50_000_000), **{"Content-Encoding": "gzip"})[0] == 413
    assert post(server, b"{}", "/health")[0] == 405
    assert health(server) == {"status": "ok", "requests": 0, "slots": 4, "most": MOST}


@pytest.mark.extended
def test_sigterm_lets_what_is_at_work_end(many, server, model, ids):
    """The last test of this file: the server is gone then. Its log has no word of what clients sent."""

    async def go():
        await many.completions.create(model="tiny", prompt=SECRET, max_tokens=2)
        stream = await many.completions.create(model="tiny", prompt="def f", max_tokens=150, temperature=0, stream=True)
        text = ""
        async for part in stream:
            if not text:
                os.kill(server["process"].pid, signal.SIGTERM)
            text += part.choices[0].text
            if len(text) < 20:
                with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
                    while True:
                        await many.completions.create(model="tiny", prompt="x", max_tokens=1)
        return text

    assert asyncio.run(go()) == model[2].decode(ids, skip_special=True)
    assert server["process"].wait(timeout=20) == 0
    log = server["log"].read_text()
    assert SECRET.split()[0] not in log and "Traceback" not in log and "error" not in log, log
