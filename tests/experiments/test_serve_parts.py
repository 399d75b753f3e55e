"""Parts of experiments.serve alone: templates, keys, and an engine that fails."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest

from experiments.serve import requests as serve_requests
from experiments.serve.engine import FAILURES, Full, Job, Worker
from qwen3.engine import Event
from qwen3.tokenizer import Tokenizer
from tests.experiments import scoring_worker

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>"
    "{% endfor %}{% if enable_thinking is defined and not enable_thinking %}quiet{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = scoring_worker.tokenizer()
    return Tokenizer(made._backend, {**made._config, "chat_template": TEMPLATE})


def parse(tokenizer, kind="chat", **body):
    data = json.dumps({"model": "m", **body}).encode()
    return serve_requests.parse(data, kind, tokenizer, "m", 200, (7,), 10)


def test_tools_thinking_and_parts_of_text_reach_the_template(tokenizer):
    tool = {"type": "function", "function": {"name": "f"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    asked = parse(tokenizer, messages=messages, tools=[tool], chat_template_kwargs={"enable_thinking": False}, max_tokens=5)
    text = json.dumps(tool) + "<|im_start|>user:ab<|im_end|>quiet"
    assert asked.prompts == [tokenizer.encode(text, allow_special=True)]
    assert asked.options["max_new_tokens"] == 5 and asked.options["stop_ids"] == (7,)
    plain = parse(tokenizer, messages=messages, tools=[tool], tool_choice="none")
    assert plain.prompts == [tokenizer.encode("<|im_start|>user:ab<|im_end|>", allow_special=True)]
    assert plain.options["max_new_tokens"] == 200 - len(plain.prompts[0])


def test_a_template_cannot_leave_its_sandbox(tokenizer):
    evil = Tokenizer(tokenizer._backend, {**tokenizer._config, "chat_template": "{{ messages.__class__.__mro__ }}"})
    with pytest.raises(serve_requests.Refused, match="chat template"):
        parse(evil, messages=[{"role": "user", "content": "x"}])


class FakeEngine:
    """Says the prompt again; its step fails where a prompt has 13, and its submit refuses one of 99."""

    def __init__(self):
        self.waiting, self.next = {}, 0

    def submit(self, request):
        if 99 in request.prompt:
            raise ValueError("no 99")
        self.waiting[self.next] = list(request.prompt)
        self.next += 1
        return self.next - 1

    def cancel(self, number):
        self.waiting.pop(number, None)

    def step(self, most):
        if any(13 in left for left in self.waiting.values()):
            raise RuntimeError("".join(["sec", "ret"]))  # what a client sent may be in the words of an error
        events = []
        for number, left in list(self.waiting.items()):
            token = left.pop(0)
            events.append(Event(number, token, finish_reason=None if left else "length"))
            if not left:
                del self.waiting[number]
        return events


@pytest.fixture
def worker():
    """A Worker in a thread of its own, whose events come at once."""
    made = Worker(FakeEngine, 3, lambda function, argument: function(argument))
    errors = []

    def run():
        try:
            made.run()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield SimpleNamespace(worker=made, thread=thread, errors=errors)
    made.stop()
    thread.join(10)
    assert not thread.is_alive()


def ask(worker, prompt):
    """(job, what it is given, an event that is set when it has ended)."""
    got, ended = [], threading.Event()

    def put(event):
        got.append(event)
        if isinstance(event, Exception) or event.finish_reason:
            ended.set()

    return Job(SimpleNamespace(prompt=prompt), put), got, ended


def finished(worker, prompt):
    job, got, ended = ask(worker, prompt)
    worker.submit([job])
    assert ended.wait(10)
    worker.release([job])
    return got


def test_an_engine_that_fails_goes_on_with_the_next_request(worker, capsys):
    assert [event.token for event in finished(worker.worker, [1, 2])] == [1, 2]
    assert isinstance(finished(worker.worker, [99])[0], ValueError)  # refused alone
    assert isinstance(finished(worker.worker, [13])[0], RuntimeError)
    assert [event.token for event in finished(worker.worker, [3])] == [3]
    said = capsys.readouterr().err
    assert "RuntimeError at" in said and "test_serve_parts.py" in said and "secret" not in said
    for _ in range(FAILURES):
        finished(worker.worker, [13])
    worker.thread.join(10)
    assert len(worker.errors) == 1  # and gives up in the end


def test_no_more_jobs_are_held_than_may_be(worker):
    jobs = [ask(worker.worker, [1] * 5)[0] for _ in range(3)]
    worker.worker.submit(jobs)
    with pytest.raises(Full):
        worker.worker.submit([ask(worker.worker, [1])[0]])
    worker.worker.release(jobs)
    assert [event.token for event in finished(worker.worker, [4])] == [4]


def test_a_server_with_keys_wants_one_of_them(tokenizer, tmp_path):
    pytest.importorskip("aiohttp")
    from aiohttp.test_utils import TestClient, TestServer

    from experiments.serve.http import Server
    from experiments.serve.run import Settings, read_keys

    (tmp_path / "keys").write_text("a" * 16 + "\n\n" + "b" * 20 + "\n")
    (tmp_path / "short").write_text("abc\n")
    with pytest.raises(ValueError, match="give keys of 16 characters or more"):
        read_keys(str(tmp_path / "short"))
    assert read_keys(None) == ()
    settings = Settings("m", tokenizer, 200, (7,), 2, 1000, read_keys(str(tmp_path / "keys")))

    async def go():
        server = Server(settings, SimpleNamespace(held=set(), most=2))
        async with TestClient(TestServer(server.app())) as client:
            statuses = []
            for key in (None, "Bearer x", "Bearer " + "a" * 16, "Bearer " + "b" * 20, "é"):
                answer = await client.get("/v1/models", headers={"Authorization": key} if key else {})
                statuses.append(answer.status)
            return statuses, (await client.get("/health")).status

    assert asyncio.run(go()) == ([401, 401, 200, 200, 401], 200)
