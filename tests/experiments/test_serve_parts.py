"""Parts of experiments.serve alone: templates, keys, and an engine that fails."""

import asyncio
import contextlib
import errno
import gzip
import http.client as http_client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from functools import partial
from types import SimpleNamespace

import pytest

from experiments.serve import requests as serve_requests
from experiments.serve.engine import CLIENTS, FAILURES, GUESTS, LATELY_S, STEP_S, STREAMED, Full, Job, Lately, Pace, Worker, _most_tokens
from experiments.serve.replies import Choice, Reply
from qwen3 import template
from qwen3.engine import Event, Request
from qwen3.generate import CHUNK
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


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(tokenizer, monkeypatch):
    from qwen3 import tokenizer as module

    read, encoded = [], module._encoded
    monkeypatch.setattr(module, "_encoded", lambda backend, pieces: read.append(sum(map(len, pieces))) or encoded(backend, pieces))
    for text in ("many words, " * 80_000, "x" * 900_000, "é" * 400_000):
        for body in ({"prompt": text}, {"messages": [{"role": "user", "content": text}]}):
            read.clear()
            kind = "completion" if "prompt" in body else "chat"
            with pytest.raises(serve_requests.Refused, match="more than 200 tokens, and a prompt and its answer have room for 200"):
                parse(tokenizer, kind, **body)
            assert sum(read) < 20_000


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

    return Job(Request(prompt), put), got, ended


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


class Slots(FakeEngine):
    """Says a token of each of the first 4 requests that it holds, as an engine of 4 slots."""

    def step(self, most):
        waiting, self.waiting = self.waiting, dict(list(self.waiting.items())[:4])
        events = super().step(most)
        self.waiting = {number: left for number, left in waiting.items() if left}
        return events


def order_of_ends(jobs):
    """The names of (name, client, group, number of tokens), submitted at the same time, in the order in which they end."""
    ended = []

    def put(name, event):
        if event.finish_reason:
            ended.append(name)
            worker.release([job for job in made if job.put.args[0] == name])
            if len(ended) == len(jobs):
                worker.stop()

    made = [Job(Request([1] * n), partial(put, name), client=client, group=group) for name, client, group, n in jobs]
    worker = Worker(Slots, 100, lambda function, argument: function(argument), slots=4)
    worker.submit(made)
    worker.run()
    assert not worker.held
    return ended


def test_a_short_request_does_not_wait_for_all_texts_of_large_ones(worker):
    """Slots are shared between clients, then between requests of a client, then by age."""
    large = [(f"large {i}", "a", "A", 10) for i in range(60)]
    assert order_of_ends([*large, ("short", "b", "B", 1)])[0] == "short"  # the last slot is never for the large one
    assert order_of_ends([*large, ("short", "a", "B", 1)])[0] == "short"
    two = [*large, *((f"other {i}", "b", "B", 10) for i in range(30)), ("short", "c", "C", 1)]
    assert order_of_ends(two)[0] == "short"
    many = [*((f"a {i}", "a", i, 10) for i in range(30)), *((f"b {i}", "b", 100 + i, 10) for i in range(4))]
    ends = order_of_ends(many)
    assert max(ends.index(f"b {i}") for i in range(4)) < 12  # of two clients each has half of the slots
    assert [name for name in ends if name[0] == "a"] == [f"a {i}" for i in range(30)]
    assert order_of_ends(large) == [name for name, *_ in large]  # one client alone is served to its end


def clients_of(worker, waiting, running=None):
    """Gives the waiting jobs their turns. Returns the clients of the running ones."""
    running = {} if running is None else running
    worker._start(waiting, running, {})
    return [job.client for job in running.values()]


def jobs_of(client, count):
    return [Job(Request([1] * 10), None, client=client, group=f"{client} {i}") for i in range(count)]


def test_slots_stay_free_for_other_clients_of_late():
    """Of several requests too. A client that is alone has all slots, and is not remembered for ever."""
    now, worker = [0.0], Worker(Slots, 100, lambda function, argument: function(argument), slots=4)
    worker.lately = Lately(lambda: now[0])
    assert clients_of(worker, jobs_of("a", 9)) == ["a"] * 5  # one more than there are slots
    worker.lately.see("b")
    running, waiting = {}, jobs_of("a", 9)
    assert clients_of(worker, waiting, running) == ["a"] * 3
    assert clients_of(worker, waiting + jobs_of("b", 2), running) == ["a", "a", "a", "b"]
    now[0] = LATELY_S + 1
    assert not worker.lately.clients() and clients_of(worker, jobs_of("a", 9)) == ["a"] * 5
    for number in range(CLIENTS + 5):
        worker.lately.see(number)
    assert len(worker.lately.seen) == CLIENTS and "b" not in worker.lately.seen and 4 not in worker.lately.seen


def test_of_three_clients_or_more_the_last_slot_is_for_one_that_has_none():
    worker = Worker(Slots, 100, lambda function, argument: function(argument), slots=8)
    running, waiting = {}, [*jobs_of("a", 9), *jobs_of("b", 9), *jobs_of("c", 2)]
    assert sorted(clients_of(worker, waiting, running)) == ["a"] * 3 + ["b"] * 2 + ["c"] * 2
    assert clients_of(worker, jobs_of("d", 3), running)[7:] == ["d"]
    assert clients_of(worker, [*jobs_of("d", 1), *jobs_of("e", 3)], running)[8:] == ["e"]  # the one that waits in the engine
    alone = {}
    assert clients_of(worker, jobs_of("a", 9), alone) == ["a"] * 4  # three others, of late


def test_a_step_takes_as_many_tokens_as_its_time_allows():
    """Few at first, so that no request waits long for what was not measured; fewer at once where a step was slow."""
    pace = Pace()
    assert pace.most() == STREAMED
    for _ in range(40):
        pace.note(STEP_S / 10, 10)
    assert pace.most() == CHUNK
    pace.note(STEP_S, 2)
    assert pace.most() == 2
    pace.note(5 * STEP_S, 1)
    assert pace.most() == 1
    for _ in range(5):
        pace.note(STEP_S / 8, 1)
    assert 1 <= pace.most() < 8


def test_a_client_that_has_no_place_has_one_where_others_have_taken_all():
    worker = Worker(Slots, 8, lambda function, argument: function(argument), slots=4)
    job = lambda client: Job(Request([1]), None, client=client)
    worker.submit([job("a") for _ in range(8)])
    for refused in ([job("a")], [job("b") for _ in range(5)]):
        with pytest.raises(Full):
            worker.submit(refused)
    worker.submit([job("b")])
    with pytest.raises(Full):
        worker.submit([job("b")])
    for number in range(GUESTS * 4 - 1):
        worker.submit([job(number)])
    with pytest.raises(Full):
        worker.submit([job("last")])


def test_rows_whose_tokens_the_host_chooses_make_one_in_a_step():
    """So that what comes waits for one token at most."""
    by_host, streamed = Job(Request([1], logprobs=2), None), Job(Request([1]), None, streamed=True)
    assert [_most_tokens(jobs) for jobs in ([], [streamed], [by_host, streamed])] == [CHUNK, STREAMED, 1]


def test_a_prompt_is_not_read_behind_all_long_ones():
    given, worker = [], Worker(Slots, 100, lambda function, argument: function(argument), slots=8)
    jobs = [Job(Request([1] * 1000), None, client="a", group=i) for i in range(16)]
    waiting, running, unread = list(jobs), {}, {}
    worker._start(waiting, running, unread)
    assert len(running) == 2  # two long prompts at a time, though eight slots are free
    short = Job(Request([1]), None, client="b", group="s")
    waiting.append(short)
    unread.pop(jobs[0].number)
    worker._start(waiting, running, unread)
    given = list(running.values())
    assert given[2] is short and len(given) == 4


def test_a_short_prompt_is_given_to_the_engine_beside_a_long_one_that_it_still_reads():
    """The engine reads it first."""
    worker = Worker(Slots, 100, lambda function, argument: function(argument), slots=8)
    long, other = (Job(Request([1] * 4000), None, client="a", group=i) for i in range(2))
    short, waiting, running = Job(Request([1] * 4), None, client="a", group="s"), [long, other], {}
    worker._start(waiting, running, {})
    waiting.append(short)
    worker._start(waiting, running, {number: 4000 for number in running})
    assert list(running.values()) == [long, short] and waiting == [other]


def test_the_end_of_a_job_of_an_engine_that_failed_does_not_touch_the_next_one(worker):
    job, _, ended = ask(worker.worker, [13])
    worker.worker.submit([job])
    assert ended.wait(10)
    slow, got, done = ask(worker.worker, [1] * 5000)  # it has the same number in the new engine
    worker.worker.submit([slow])
    until(lambda: got)
    worker.worker.release([job])
    assert done.wait(60) and len(got) == 5000


def replied(tokenizer, events, kind="completion", prompts=((1, 2, 3),), **asked):
    """The whole answer to a request whose choices have these events of the engine."""
    asked = serve_requests.Asked(
        list(prompts), **{"n": 1, "options": {}, "stop": (), "logprobs": None, **asked}, stream=False, include_usage=False
    )
    choices = [Choice(tokenizer, asked) for _ in events]
    for choice, of_choice in zip(choices, events):
        for event in of_choice:
            if choice.reason is None:
                choice.push(event)
    return Reply(kind, "m", asked).whole(choices)


def said(tokenizer, text, last="length", stop=None):
    """The engine's events of a text, one for each byte; stop: the id that ends it."""
    single = {tokenizer.bytes_of(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.bytes_of(i)) == 1}
    ids = [single[bytes([b])] for b in text.encode()] + ([] if stop is None else [stop])
    return [Event(0, i, -1.0, [(i, -1.0)], last if at == len(ids) - 1 else None) for at, i in enumerate(ids)]


def test_usage_counts_the_token_that_ends_a_text_and_each_prompt_once(tokenizer):
    """However many texts are asked for."""
    stopped = said(tokenizer, "ab", "stop", tokenizer.eos_id)
    usage = replied(tokenizer, [stopped] * 3, n=3)["usage"]
    assert usage == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    usage = replied(tokenizer, [stopped, said(tokenizer, "abc")], prompts=((1, 2, 3), (4,)))["usage"]
    assert usage == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    assert replied(tokenizer, [stopped])["choices"][0]["text"] == "ab"


def test_text_offset_is_the_place_in_the_text_in_characters(tokenizer):
    """A token that goes on with a character is at that character's place; what follows does not drift."""
    choice = replied(tokenizer, [said(tokenizer, "a\u00e9\U0001f642b")], logprobs=1)["choices"][0]
    assert choice["text"] == "a\u00e9\U0001f642b"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]
    special = [Event(0, tokenizer.eod_id, -1.0, []), *said(tokenizer, "xy")]  # a special token is no part of the text
    choice = replied(tokenizer, [special], logprobs=0)["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("xy", [0, 0, 1])
    chat = replied(tokenizer, [said(tokenizer, "\u00e9")], "chat", logprobs=1)["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in chat] == [[0xC3], [0xA9]] and "offset" not in chat[0]


def test_a_stop_text_is_the_reason_also_where_the_limit_comes_with_it(tokenizer):
    choice = replied(tokenizer, [said(tokenizer, "a END")], stop=("END",))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a ", "stop")
    choice = replied(tokenizer, [said(tokenizer, "a EN")], stop=("END",))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a EN", "length")


def test_without_a_limit_a_completion_has_16_tokens_and_a_chat_all_the_room(tokenizer):
    completion = parse(tokenizer, "completion", prompt=[1, 2, 3])
    assert completion.options["max_new_tokens"] == 16 and completion.prompt_tokens == 3
    assert parse(tokenizer, "completion", prompt=[1] * 190).options["max_new_tokens"] == 10
    chat = parse(tokenizer, messages=[{"role": "user", "content": "x"}])
    assert chat.options["max_new_tokens"] == 200 - len(chat.prompts[0]) > 16
    assert parse(tokenizer, "completion", prompt=[1, 2, 3], n=3).prompt_tokens == 3


class Talker:
    """An engine that says 20 tokens a step to each request until its limit, with much about each."""

    def __init__(self):
        self.left, self.next = {}, 0

    def submit(self, request):
        self.next += 1
        self.left[self.next] = request.max_new_tokens
        return self.next

    def cancel(self, number):
        self.left.pop(number, None)

    def step(self, most):
        time.sleep(0.002)
        events = []
        for number in list(self.left):
            count = min(20, self.left[number])
            self.left[number] -= count
            events += [Event(number, 65, -1.0, [(i, -1.0) for i in range(20)]) for _ in range(count)]
            if not self.left[number]:
                del self.left[number]
                events[-1] = Event(number, 65, -1.0, [], "length")
        return events


@contextlib.contextmanager
def listening(tokenizer, hosts=None, make=Talker, keys=(), **limits):
    """(port, the Worker) of a server with the engine of make(), in threads of their own."""
    pytest.importorskip("aiohttp")
    from experiments.serve import access, http

    sockets = access.bind("127.0.0.1", 0)
    loop, stop, ports, ready = asyncio.new_event_loop(), asyncio.Event(), [], threading.Event()
    worker = Worker(make, 4, loop.call_soon_threadsafe)
    server = http.Server(http.Settings("m", tokenizer, 1 << 20, (7,), 2, 1 << 20, keys, hosts), worker, **limits)

    def bound(port):
        ports.append(port)
        ready.set()

    threads = [
        threading.Thread(target=lambda: loop.run_until_complete(http.serve(server, sockets, bound, stop, 0.1))),
        threading.Thread(target=worker.run),
    ]
    for thread in threads:
        thread.start()
    try:
        assert ready.wait(10)
        yield ports[0], worker
    finally:
        loop.call_soon_threadsafe(stop.set)
        worker.stop()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)
        loop.close()


def asks(port, body=None, timeout_s=10):
    """The status and JSON of a request on a connection of its own."""
    connection = http_client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        if body is None:
            connection.request("GET", "/health", headers={"Connection": "close"})
        else:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json", "Connection": "close"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_connections_are_bounded_and_idle_ones_and_slow_heads_are_closed(tokenizer, capfd):
    """Others are served again as soon as some have gone; that the server is full is said once."""
    with listening(tokenizer, most_connections=6, idle_s=0.6) as (port, _):
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(12)]
        for number, one in enumerate(held):
            if number % 3:
                one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        end = time.monotonic() + 20

        def trickle():
            while time.monotonic() < end and not done.is_set():
                for one in held[1::3]:
                    with contextlib.suppress(OSError):
                        one.sendall(b"a")
                time.sleep(0.05)

        done = threading.Event()
        sender = threading.Thread(target=trickle)
        sender.start()
        assert asks(port, timeout_s=15)[0] == 200
        done.set()
        sender.join()
        for one in held:
            one.close()
        keep = http_client.HTTPConnection("127.0.0.1", port, timeout=5)  # one that asks now and then stays open
        for _ in range(8):
            keep.request("GET", "/health")
            assert keep.getresponse().read()
            time.sleep(0.2)
        keep.close()
    out, err = capfd.readouterr()
    assert 1 <= out.count("full       all 6 connections are in use; new ones wait until one closes") <= 3 and "Traceback" not in err


def test_at_the_limit_of_open_files_it_is_said_once_and_goes_on(tokenizer, capfd, monkeypatch):
    import asyncio.selector_events as events

    accept, tries = events.BaseSelectorEventLoop.sock_accept, []

    async def refused(self, sock):
        found = await accept(self, sock)
        tries.append(1)
        if len(tries) < 4:
            found[0].close()
            raise OSError(errno.EMFILE, "Too many open files")
        return found

    monkeypatch.setattr(events.BaseSelectorEventLoop, "sock_accept", refused)
    with listening(tokenizer) as (port, _):
        statuses = []
        while not statuses:
            with contextlib.suppress(OSError, http_client.HTTPException):
                statuses.append(asks(port)[0])
    out, err = capfd.readouterr()
    assert statuses == [200] and len(tries) >= 4 and out.count("no connection can be accepted (Too many open files)") == 1
    assert "Traceback" not in err and "Too many" not in err


def test_a_client_that_never_reads_its_stream_loses_its_place(tokenizer):
    asked = {"model": "m", "messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 500_000}
    body = json.dumps({**asked, "logprobs": True, "top_logprobs": 20}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with listening(tokenizer, idle_s=0.5) as (port, worker):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(head.encode() + body)
            end = time.monotonic() + 5
            while not worker.held and time.monotonic() < end:
                time.sleep(0.01)
            assert worker.held
            end = time.monotonic() + 30
            while worker.held:
                assert time.monotonic() < end, "its slot is never free"
                time.sleep(0.05)
        assert asks(port, {"model": "m", "prompt": "a", "max_tokens": 3})[1]["usage"]["completion_tokens"] == 3


def unread_stream(port, tokens):
    """A connection on which a stream of so many tokens was asked for, with few bytes of room for it."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": tokens}
    body = json.dumps({**asked, "logprobs": True, "top_logprobs": 20}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    client.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
    return client


def until(condition, most_s=30):
    end = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.01)


@pytest.mark.extended
def test_a_place_is_free_when_the_engine_is_done_and_the_text_can_still_be_read(tokenizer):
    with listening(tokenizer, idle_s=60) as (port, worker):
        with unread_stream(port, 8000) as client:
            until(lambda: worker.held)
            until(lambda: not worker.held)
            assert asks(port)[1]["requests"] == 0
            with client.makefile("rb") as answer:
                text = answer.read()
    assert text.count(b'"logprob"') > 8000 and b"data: [DONE]" in text


def test_a_stream_that_is_too_far_behind_is_cut_off(tokenizer, monkeypatch):
    from experiments.serve import http

    monkeypatch.setattr(http, "BEHIND", 2000)
    with listening(tokenizer, idle_s=60) as (port, worker):
        with unread_stream(port, 1_000_000) as client:
            until(lambda: worker.held)
            until(lambda: not worker.held, 20)
            text = b""
            with contextlib.suppress(ConnectionError):
                while found := client.recv(1 << 20):
                    text += found
            assert b"[DONE]" not in text


def raw(port, data):
    """(status, JSON) of the answer to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
        one.sendall(data)
        answer = http_client.HTTPResponse(one)
        answer.begin()
        return answer.status, json.loads(answer.read())


JSON_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
ODD = {
    "a false gzip": JSON_HEAD + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nabcde",
    "a cut gzip": JSON_HEAD + b"Content-Encoding: gzip\r\nContent-Length: 12\r\n\r\n" + gzip.compress(b"{}")[:12],
    "a false deflate": JSON_HEAD + b"Content-Encoding: deflate\r\nContent-Length: 5\r\n\r\nabcde",
    "an integer of 400 digits": JSON_HEAD
    + b"Content-Length: 440\r\n\r\n"
    + b'{"model":"m","prompt":"a","n":'
    + b"9" * 400
    + b" " * 9
    + b"}",
    "chunks that are none": JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc",
    "an open bracket as host": b"GET /v1/models HTTP/1.1\r\nHost: [::1\r\nConnection: close\r\n\r\n",
    "a port that is none": b"GET /v1/models HTTP/1.1\r\nHost: localhost:abc\r\nConnection: close\r\n\r\n",
    "a port that is too large": b"GET /v1/models HTTP/1.1\r\nHost: localhost:99999999\r\nConnection: close\r\n\r\n",
    "a host of odd bytes": b"GET /v1/models HTTP/1.1\r\nHost: \xff\xfe%%@/\\\r\nConnection: close\r\n\r\n",
    "a length that is none": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "a header without end": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    "an unknown expectation": JSON_HEAD + b"Expect: tea\r\nContent-Length: 2\r\n\r\n{}",
    "an encoding that is not installed": JSON_HEAD + b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\n{}",
    "another one": JSON_HEAD + b"Content-Encoding: zstd\r\nContent-Length: 2\r\n\r\n{}",
    "a path of odd bytes": b"GET /v1/models/%ff%00%zz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a path of another host": b"GET http://[::1/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a star": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a tunnel": b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "two slashes": b"GET //[ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "two lengths": JSON_HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "an unknown version": b"GET /health HTTP/9.x\r\nHost: localhost\r\n\r\n",
}


def test_what_is_no_proper_request_is_answered_as_an_error_of_the_client(tokenizer, capfd):
    """In OpenAI's JSON, also where it is no HTTP, and without a word in the log."""
    with listening(tokenizer, hosts=("localhost",)) as (port, _):
        kinds = "invalid_request_error", "not_found_error"
        for name, data in ODD.items():
            try:
                status, found = raw(port, data)
            except ValueError as error:
                raise AssertionError(name) from error
            assert 400 <= status < 500 and found["error"]["message"] and found["error"]["type"] in kinds, (
                name,
                status,
                found,
            )
        assert asks(port)[0] == 403  # it names 127.0.0.1
        with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
            body = b'{"model": "m", "prompt": "a", "max_tokens": 1}'
            one.sendall(JSON_HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
            assert one.recv(100).startswith(b"HTTP/1.1 100 Continue")
            one.sendall(body)
            assert one.recv(100).startswith(b"HTTP/1.1 200")
    out, err = capfd.readouterr()
    assert out == err == ""


def test_names_are_checked_on_every_address_of_the_loopback():
    pytest.importorskip("aiohttp")
    from experiments.serve.access import LOOPBACK, names

    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2", "127.1", "127.255.255.254"):
        assert set(LOOPBACK) <= set(names(host)), host
    assert "127.0.0.2" in names("127.0.0.2") and names("no.such.host.invalid") == LOOPBACK
    for host in ("0.0.0.0", "::", "192.0.2.7"):
        assert names(host) is None


def started(port, hf_dir):
    command = [sys.executable, "-m", "experiments.serve", f"--port={port}", f"--hf_dir={hf_dir}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_port_that_is_taken_is_named_before_the_model_is_loaded(tmp_path):
    pytest.importorskip("aiohttp")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = started(port, tmp_path / "nothing")
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and said.startswith(f"error: --host=127.0.0.1 --port={port}: Address already in use"), said


def test_a_signal_while_the_model_is_loaded_ends_the_server(tmp_path):
    """Its port is taken already, and a client that connects is refused instead of waiting."""
    pytest.importorskip("aiohttp")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = started(port, tmp_path)

    def bound():
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                return True
        assert process.poll() is None
        return False

    until(bound, 60)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


@pytest.mark.extended
def test_templates_without_end_of_one_client_do_not_keep_others_waiting(tokenizer):
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    looping = Tokenizer(
        tokenizer._backend, {**tokenizer._config, "chat_template": f"{{% if messages[0].content == 'loop' %}}{loop}{{% endif %}}a"}
    )
    template.end()
    with listening(looping) as (port, _), contextlib.ExitStack() as opened:
        for number in range(12):  # half of them go away, and their templates go on
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "loop"}]}).encode()
            client = opened.enter_context(socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)))
            client.sendall(JSON_HEAD.replace(b"completions", b"chat/completions") + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            if number % 2:
                client.close()
        until(lambda: template._all and not template._idle)
        start = time.monotonic()
        for path, asked in (("chat/completions", {"messages": [{"role": "user", "content": "x"}]}), ("completions", {"prompt": "a"})):
            other = http_client.HTTPConnection("127.0.0.1", port, timeout=30, source_address=("127.0.0.3", 0))
            opened.callback(other.close)
            other.request("POST", f"/v1/{path}", json.dumps({"model": "m", "max_tokens": 1, **asked}), {"Content-Type": "application/json"})
            assert other.getresponse().status == 200
        assert time.monotonic() - start < template.LIMIT_S / 2


def test_a_body_is_unpacked_up_to_the_limit_of_a_body_alone():
    web = pytest.importorskip("aiohttp").web
    from experiments.serve import http

    text = b'{"model": "m"}' * 9
    for encoding, data in (
        ("gzip", gzip.compress(text)),
        ("x-gzip", gzip.compress(text)),
        ("deflate", zlib.compress(text)),
        ("identity", text),
    ):
        assert http._unpacked(data, encoding, len(text)) == text
    bomb = gzip.compress(b" " * 100_000_000)
    tracemalloc.start()
    with pytest.raises(web.HTTPRequestEntityTooLarge):
        http._unpacked(bomb, "gzip", 1000)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    with pytest.raises(serve_requests.Refused, match="Content-Encoding: 'br' is not supported; use gzip, or none") as error:
        http._unpacked(b"", "br", 1)
    assert error.value.status == 415
    for cut in (gzip.compress(text)[:-3], gzip.compress(text) + b"x"):
        with pytest.raises(ValueError, match="breaks off, or goes on"):
            http._unpacked(cut, "gzip", 1000)


def test_a_template_without_end_does_not_keep_the_server(tokenizer):
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
    looping = Tokenizer(tokenizer._backend, {**tokenizer._config, "chat_template": endless})
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a"}]}).encode()
    template.end()
    with listening(looping) as (port, _):
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for client in clients:
            client.sendall(JSON_HEAD.replace(b"completions", b"chat/completions") + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: len(template._all) == 1 and not template._idle)  # of one client one at a time
        assert asks(port)[0] == 200
        began = time.monotonic()
    until(lambda: not any(thread.name.startswith(("parse", "chat")) for thread in threading.enumerate()))
    assert time.monotonic() - began < template.LIMIT_S / 2
    for client in clients:
        client.close()


def test_connections_leave_files_for_the_rest(monkeypatch):
    pytest.importorskip("aiohttp")
    from experiments.serve import access

    for files, asked, most in ((1024, 5000, 960), (1024, 10, 10), (access.resource.RLIM_INFINITY, 5000, 5000)):
        monkeypatch.setattr(access.resource, "getrlimit", lambda _, files=files: (files, files))
        assert access.connection_limit(asked) == most
    monkeypatch.setattr(access.resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(ValueError, match="the limit of open files, 64, leaves no room for connections"):
        access.connection_limit(5)


def test_a_server_with_keys_wants_one_of_them(tokenizer, tmp_path):
    pytest.importorskip("aiohttp")
    from aiohttp.test_utils import TestClient, TestServer

    from experiments.serve.access import read_keys
    from experiments.serve.http import Server, Settings

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
