"""experiments.serve on several ranks: the official client's answers are those of one process, and a rank that is lost ends the job.

What ranks say to each other is tried in one process, with threads in place of ranks."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from experiments.serve import ranks
from experiments.serve.__main__ import named_adapters
from experiments.train import adapter
from parallel.mesh import Mesh
from parallel.trees import tree_paths
from qwen3 import hf, peft
from qwen3.config import Lora
from qwen3.engine import Event, Request
from qwen3.generate import generate
from qwen3.guide import Plan
from tests.experiments import scoring_worker
from tests.experiments.scripted_engine import Scripted
from tests.tiny import DENSE, MOE, random_params

ROOT = Path(__file__).parents[2]
SECRET = "5e" * 32


class Counting(Scripted):
    """A scripted engine with the counts and the check of a real one."""

    slots = 2

    def checked(self, request):
        if not request.prompt:
            raise ValueError("prompt is empty")

    def counts(self):
        return {"prefill_tokens": sum(len(request.prompt) for request in self.asked)}


def connected():
    """The two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return socket.create_connection(listener.getsockname()), listener.accept()[0]


def followed(*arguments):
    with contextlib.suppress(ranks.Lost):
        ranks.follow(*arguments)


def a_job(mesh, texts):
    """(Leader, engines, threads): of a job whose other ranks are threads. texts: {rank: what its engine says}."""
    tokenizer = scoring_worker.tokenizer()
    engines = {rank: Counting(tokenizer, said) for rank, said in texts.items()}
    pairs = {rank: connected() for rank in texts if rank}
    ends = {rank: ranks.Connection(pair[1], "rank 0") for rank, pair in pairs.items()}
    given = {rank: (engines[rank], Mesh(**mesh, rank=rank), tokenizer, None, end) for rank, end in ends.items()}
    threads = [threading.Thread(target=followed, args=arguments, daemon=True) for arguments in given.values()]
    for thread in threads:
        thread.start()
    leader = ranks.Leader(engines[0], Mesh(**mesh), {rank: ranks.Connection(pair[0], f"rank {rank}") for rank, pair in pairs.items()})
    return leader, engines, threads


def said(leader, tokenizer):
    """The texts of all requests."""
    texts = {}
    while leader.busy():
        for event in leader.step(4):
            texts.setdefault(event.id, [])
            if event.finish_reason != "stop":
                texts[event.id].append(event.token)
    return {number: tokenizer.decode(tokens) for number, tokens in texts.items()}


def test_requests_go_to_the_data_rank_with_the_fewest_and_all_its_ranks_hear_of_them():
    leader, engines, threads = a_job(dict(dp=2, tp=2), {0: ["a", "bb"], 1: ["a", "bb"], 2: ["ccc", "d"], 3: ["ccc", "d"]})
    numbers = [leader.submit(Request(prompt=[i + 1])) for i in range(4)]
    assert said(leader, engines[0].tokenizer) == dict(zip(numbers, ["a", "ccc", "bb", "d"]))
    assert [[request.prompt for request in engine.asked] for engine in engines.values()] == [[[1], [3]]] * 2 + [[[2], [4]]] * 2
    assert leader.counts() == {"prefill_tokens": 4}
    leader.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_cancelled_request_leaves_its_data_rank_and_a_wrong_one_reaches_none():
    leader, engines, _ = a_job(dict(dp=2), {0: ["a" * 50], 1: ["b" * 50]})
    with pytest.raises(ValueError, match="prompt is empty"):
        leader.submit(Request(prompt=[]))
    first, second = leader.submit(Request(prompt=[1])), leader.submit(Request(prompt=[2]))
    assert {event.id for event in leader.step(1)} == {first, second}
    leader.cancel(second)
    assert {event.id for event in leader.step(1)} == {first} and not engines[1].left
    third = leader.submit(Request(prompt=[3]))
    assert engines[0].asked[-1].prompt == [1] and {event.id for event in leader.step(1)} == {first, third}
    leader.cancel(first)
    leader.cancel(first)
    assert {event.id for event in leader.step(1)} == {third}
    leader.close()


def test_a_rank_that_goes_away_is_named():
    leader, _, _ = a_job(dict(dp=2), {0: ["a" * 50], 1: ["b" * 50]})
    leader.submit(Request(prompt=[1]))
    leader.step(1)
    leader.connections[1].sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ranks.Lost, match="rank 1 has gone"):
        leader.step(1)


def test_a_request_is_the_same_after_its_way_to_another_rank():
    drawn = {"temperature": 0.7, "top_p": 1 / 3, "logit_bias": ((5, 0.1), (6, -3.0)), "seed": 2**31}
    request = Request(prompt=[3, 4], max_new_tokens=7, stop_ids=(1, 2), logprobs=2, **drawn)
    assert ranks.unpacked(json.loads(json.dumps(ranks.packed(request))), None, None) == request
    pytest.importorskip("llguidance")
    from qwen3.grammars import Grammars

    tokenizer = scoring_worker.tokenizer()
    compiler, other = (Grammars(tokenizer, tokenizer.vocab_size) for _ in range(2))
    plan = Plan(tokenizer, compiler.json({"type": "boolean"}), "before", 5, (1,))
    found = ranks.unpacked(json.loads(json.dumps(ranks.packed(Request(prompt=[1], guide=plan)))), tokenizer, other).guide
    assert (found.thinking, found.budget, found.stop_ids) == ("before", 5, (1,))
    masks = [grammar.start().allowed(tokenizer.vocab_size) for grammar in (plan.grammar, found.grammar)]
    assert (masks[0] == masks[1]).all() and masks[0].any()


def test_only_ranks_with_the_secret_are_connected():
    listener = socket.create_server(("127.0.0.1", 0))
    address, given = listener.getsockname(), {"rank": 1, "secret": SECRET}
    wrong = [framed(value) for value in ({**given, "secret": "5e"}, {**given, "rank": 2}, [1], 5)]
    wrong += [b"GET / HTTP/1.1\r\n\r\n", b"", ranks.LENGTH.pack(1 << 31)]

    def others():
        for data in wrong:
            with socket.create_connection(address) as sock:
                sock.sendall(data)
        keep.append(socket.create_connection(address))
        keep[0].sendall(framed(given))

    keep = []
    thread = threading.Thread(target=others)
    thread.start()
    with listener:
        found = ranks.accept(listener, 2, SECRET, 20)
    thread.join()
    assert list(found) == [1] and found[1].sock.getpeername() == keep[0].getsockname()
    keep[0].close()


def framed(value):
    data = json.dumps(value).encode()
    return ranks.LENGTH.pack(len(data)) + data


def test_ranks_that_do_not_connect_are_named():
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ValueError, match=r"ranks \[1, 2\] did not connect to rank 0"):
        ranks.accept(listener, 3, SECRET, 0.1)


POET = Lora(4, 8.0, ("q", "v", "down"))
MODELS = {"dense": DENSE, "moe": MOE.replace(max_position=DENSE.max_position)}
LAYOUTS = [
    ("dense", {"tp": 2}),
    pytest.param(("dense", {"dp": 2}), marks=pytest.mark.slow),
    pytest.param(("dense", {"pp": 2}), marks=pytest.mark.slow),
    pytest.param(("moe", {"dp": 2, "ep": 2}), marks=pytest.mark.slow),
    pytest.param(("dense", {"dp": 2, "tp": 2}), marks=pytest.mark.slow),
]


class Job:
    """A server under the launcher."""

    def __init__(self, folder, name, sizes):
        pytest.importorskip("aiohttp")
        self.openai, self.tokenizer = pytest.importorskip("openai"), scoring_worker.tokenizer()
        self.cfg = MODELS[name].replace(vocab_size=self.tokenizer.vocab_size, max_position=1024, eos_id=self.tokenizer.eos_id)
        self.params, self.logs = random_params(self.cfg), folder / "logs"
        self.tokenizer.save(folder / "tokenizer")
        hf.save(folder / "tiny", self.cfg, self.params, tokenizer_dir=folder / "tokenizer")
        self.merged = self._with_adapter(folder) if self.cfg.num_experts == 0 else None
        more = [f"--adapter=poet={folder}/adapter"] if self.merged else []
        nproc = sizes.get("dp", 1) * sizes.get("tp", 1) * sizes.get("pp", 1)
        launch = [sys.executable, "-m", "experiments.launch", f"--nproc={nproc}", f"--log_dir={self.logs}", "--", "experiments.serve"]
        axes = [f"--{axis}={size}" for axis, size in sizes.items()]
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen(
                [*launch, f"--hf_dir={folder}/tiny", "--port=0", "--slots=4", "--length=512", *axes, *more],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        text, end = "", time.monotonic() + 240
        while "serving " not in text:
            text = (folder / "log").read_text()
            assert self.process.poll() is None and time.monotonic() < end, text
            time.sleep(0.1)
        self.log, self.url = folder / "log", text.partition("serving ")[2].partition(" on ")[2].partition("/v1")[0]

    def _with_adapter(self, folder):
        """Saves an adapter with random values. Returns (cfg, params) of the model with it merged."""
        cfg = self.cfg.replace(lora=POET)
        leaves = {path: leaf.asnumpy() for path, leaf in tree_paths(random_params(cfg, 5))}
        base = dict(tree_paths(self.params))
        mark = adapter.fingerprint(cfg, lambda path, slices: base[path].asnumpy()[slices])
        peft.save(folder / "adapter", cfg, {path: leaves[path] for path in peft.adapters(cfg)}, str(folder / "tiny"), mark)
        return adapter.with_adapter(*hf.load(folder / "tiny"), folder / "adapter")

    def client(self):
        return self.openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)

    def get(self, path):
        with urllib.request.urlopen(self.url + path) as found:
            return found.read().decode()

    def greedy(self, prompts, count, model=None):
        ids = [self.tokenizer.encode(prompt, allow_special=True) for prompt in prompts]
        stop, (cfg, params) = [self.tokenizer.eos_id, self.tokenizer.eod_id], model or (self.cfg, self.params)
        made = generate(params, ids, cfg, count, stop_ids=stop)
        return [self.tokenizer.decode(new, skip_special=True) for new in made]

    def end(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def job(request, tmp_path_factory):
    found = Job(tmp_path_factory.mktemp("ranks"), *request.param)
    found.sizes = request.param[1]
    try:
        yield found
    finally:
        found.end()


@pytest.mark.extended
def test_many_requests_at_once_are_answered_as_by_one_process(job):
    prompts = [scoring_worker.TEXT[7 * i : 7 * i + 3 + 2 * i] for i in range(20)]
    want = job.greedy(prompts, 10)

    async def one(client, i):
        asked = {"model": "tiny", "prompt": prompts[i], "max_tokens": 10, "temperature": 0}
        if i % 3:
            return (await client.completions.create(**asked)).choices[0].text
        return "".join([part.choices[0].text async for part in await client.completions.create(**asked, stream=True)])

    async def go():
        client = job.client()
        texts = await asyncio.gather(*(one(client, i) for i in range(20)))
        leaves = await client.completions.create(model="tiny", prompt="def f", max_tokens=400, stream=True, n=3)
        async for _ in leaves:
            break
        await leaves.close()
        drawn = [await client.completions.create(model="tiny", prompt="x", max_tokens=8, seed=3, n=3) for _ in range(2)]
        return texts, *[[choice.text for choice in each.choices] for each in drawn]

    texts, first, second = asyncio.run(go())
    assert texts == want and len(set(want)) > 5
    assert first == second and len(set(first)) > 1
    end = time.monotonic() + 20
    while json.loads(job.get("/health"))["requests"]:
        assert time.monotonic() < end, "a request that was dropped keeps its place"
        time.sleep(0.05)
    assert json.loads(job.get("/health"))["slots"] == 4 * job.sizes.get("dp", 1)
    read = float(re.search(r"^qwen3_prompt_tokens_read_total (\S+)", job.get("/metrics"), re.MULTILINE)[1])
    assert read >= sum(len(job.tokenizer.encode(prompt)) for prompt in prompts) / 2


@pytest.mark.extended
def test_requests_choose_an_adapter_by_the_name_of_the_model(job):
    """In one batch with requests of the base."""
    if job.merged is None:
        pytest.skip("the adapter is of the dense model")
    prompts = [scoring_worker.TEXT[5 * i : 5 * i + 8] for i in range(8)]

    async def go():
        client = job.client()
        asked = [
            client.completions.create(model=name, prompt=prompt, max_tokens=10, temperature=0)
            for prompt in prompts
            for name in ("tiny", "poet")
        ]
        with pytest.raises(job.openai.NotFoundError) as wrong:
            await client.completions.create(model="coder", prompt="x")
        return await asyncio.gather(*asked), [model.id for model in (await client.models.list()).data], str(wrong.value)

    found, models, wrong = asyncio.run(go())
    assert models == ["tiny", "poet"] and "use 'tiny' or 'poet'" in wrong
    assert [each.model for each in found[:2]] == ["tiny", "poet"]
    assert [each.choices[0].text for each in found[::2]] == job.greedy(prompts, 10)
    assert [each.choices[0].text for each in found[1::2]] == job.greedy(prompts, 10, job.merged) != job.greedy(prompts, 10)


@pytest.mark.extended
def test_an_answer_follows_a_schema_and_a_wrong_request_is_refused(job):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}

    async def go():
        client, messages = job.client(), [{"role": "user", "content": "x"}]
        asked = {"model": "tiny", "messages": messages, "response_format": form, "max_tokens": 200}
        found = await asyncio.gather(*(client.chat.completions.create(**asked, seed=seed) for seed in range(3)))
        with pytest.raises(job.openai.BadRequestError):
            await client.completions.create(model="tiny", prompt="x" * 3000)
        return [each.choices[0].message.content for each in found]

    assert all(0 <= json.loads(text)["n"] <= 99 for text in asyncio.run(go()))


@pytest.mark.extended
def test_sigterm_lets_what_is_at_work_end_on_all_ranks(job):
    """The last test of each job: it is gone then."""

    async def go():
        stream = await job.client().completions.create(model="tiny", prompt="def f", max_tokens=100, temperature=0, stream=True)
        text = ""
        async for part in stream:
            if not text:
                os.kill(job.process.pid, signal.SIGTERM)
            text += part.choices[0].text
        return text

    assert asyncio.run(go()) == job.greedy(["def f"], 100)[0]
    job.process.wait(timeout=60)
    logs = [path.read_text() for path in sorted(job.logs.glob("rank_*.log"))]
    assert len(logs) >= 2 and not any("Traceback" in log or "error" in log.lower() for log in logs), logs


@pytest.mark.slow
def test_a_lost_rank_ends_the_job_with_its_cause(tmp_path):
    job = Job(tmp_path, "dense", {"tp": 2})
    try:
        found = subprocess.run(["pgrep", "-f", f"experiments.serve.*{tmp_path}"], capture_output=True, text=True).stdout.split()
        of_rank = {}
        for pid in found:
            env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            of_rank.update({int(item[8:]): int(pid) for item in env if item.startswith(b"RANK_ID=") and b"MS_ROLE=MS_WORKER" in env})

        async def go():
            stream = await job.client().completions.create(model="tiny", prompt="def f", max_tokens=400, stream=True)
            async for _ in stream:
                os.kill(of_rank[1], signal.SIGKILL)
                break
            return job.process.wait(timeout=60)

        assert asyncio.run(go()) != 0
        assert "rank 1" in job.log.read_text() and "SIGKILL" in job.log.read_text(), job.log.read_text()
    finally:
        job.end()


def test_adapters_are_named_once():
    assert named_adapters(["poet=a", "coder=b=c"], "tiny") == {"poet": "a", "coder": "b=c"}
    for wrong, words in (("poet", "give NAME=FOLDER"), ("=a", "give NAME=FOLDER"), ("tiny=a", "the name tiny is taken")):
        with pytest.raises(ValueError, match=words):
            named_adapters([wrong], "tiny")
    with pytest.raises(ValueError, match="the name poet is taken"):
        named_adapters(["poet=a", "poet=b"], "tiny")


def test_events_are_the_same_after_their_way_to_rank_0():
    events = [Event(3, 5), Event(4, 6, -0.1, [(1, -2.5), (2, float("-inf"))], "stop")]
    back = [ranks.received(json.loads(json.dumps(ranks.sent(event)))) for event in events]
    assert back == events and isinstance(back[1].top_logprobs[0], tuple)
