"""/metrics of experiments.serve, as Prometheus' own parser reads it."""

import http.client
from functools import partial
from types import SimpleNamespace

import pytest

from qwen3.cache import Blocks
from qwen3.engine import Engine, Totals
from tests.experiments import scripted_engine
from tests.experiments.test_serve_parts import asks, listening, until

pytest.importorskip("aiohttp")
parser = pytest.importorskip("prometheus_client.parser")


def scraped(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain; version=")
    found = {}
    for family in parser.text_string_to_metric_families(answer.read().decode()):
        for sample in family.samples:
            found[(sample.name, *sorted(sample.labels.items()))] = sample.value
    connection.close()
    return found


@pytest.mark.extended
def test_requests_tokens_slots_and_times_are_counted():
    tokenizer = scripted_engine.tokenizer()
    text = "def f"
    count = len(tokenizer.encode(text)) + 1  # and the token that ends it
    with listening(tokenizer, make=lambda: scripted_engine.Scripted(tokenizer, [text], 0.01)) as (port, worker):
        before = scraped(port)
        ok = ("qwen3_requests_total", ("kind", "completion"), ("status", "200"))
        assert before[ok] == 0 and before[("qwen3_slots",)] == 2 and before[("qwen3_places",)] == 4
        assert before[("qwen3_texts_running",)] == before[("qwen3_texts_waiting",)] == 0
        for _ in range(2):
            assert asks(port, {"model": "m", "prompt": [1, 2, 3], "max_tokens": 50, "n": 2})[0] == 200
        assert asks(port, {"model": "m", "prompt": "a", "max_tokens": 1})[0] == 200
        assert asks(port, {"model": "m", "prompt": "a", "top_p": 5})[0] == 400
        after = scraped(port)
        assert after[ok] == 3 and after[("qwen3_requests_total", ("kind", "completion"), ("status", "400"))] == 1
        assert after[("qwen3_texts_total", ("reason", "stop"))] == 4 and after[("qwen3_texts_total", ("reason", "length"))] == 1
        assert after[("qwen3_new_tokens_total",)] == 4 * count + 1 and after[("qwen3_prompt_tokens_total",)] == 2 * 3 + len(
            tokenizer.encode("a")
        )
        assert after[("qwen3_time_to_first_token_seconds_count",)] == 5 and after[("qwen3_request_seconds_count",)] == 3
        assert after[("qwen3_time_per_token_seconds_count",)] == 4
        assert 0.005 < after[("qwen3_time_per_token_seconds_sum",)] / 4 < 5
        assert after[("qwen3_time_to_first_token_seconds_bucket", ("le", "+Inf"))] == 5
        until(lambda: scraped(port)[("qwen3_texts_running",)] == 0)


@pytest.mark.extended
def test_running_and_waiting_texts_are_told_apart():
    tokenizer = scripted_engine.tokenizer()
    with listening(tokenizer, make=lambda: scripted_engine.Scripted(tokenizer, ["word " * 4000], 0.01)) as (port, worker):
        worker.slots = 2
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        body = b'{"model": "m", "prompt": "a", "max_tokens": 5000, "n": 4, "stream": true}'
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        until(lambda: scraped(port)[("qwen3_texts_running",)] == 2)
        assert scraped(port)[("qwen3_texts_waiting",)] == 2
        connection.close()
        until(lambda: scraped(port).get(("qwen3_requests_total", ("kind", "completion"), ("status", "499"))) == 1)
        until(lambda: scraped(port)[("qwen3_texts_running",)] == 0)


def test_what_the_engine_counts_is_told():
    from experiments.serve.metrics import OfEngine

    cache = SimpleNamespace(blocks=Blocks(5), size=64)
    pages = cache.blocks.take(3)
    cache.blocks.release(pages[:1])
    totals = Totals(prefill_tokens=7, reused_tokens=640, preempted=2, guessed_tokens=9, right_tokens=4)
    engine = SimpleNamespace(cache=cache, totals=totals)
    engine.counts = partial(Engine.counts, engine)
    worker = SimpleNamespace(engine=engine)
    found = {sample.name: sample.value for family in OfEngine(worker).collect() for sample in family.samples}
    assert found["qwen3_prompt_tokens_read_total"] == 7 and found["qwen3_prompt_tokens_reused_total"] == 640
    assert found["qwen3_preemptions_total"] == 2 and found["qwen3_evicted_blocks_total"] == 0
    assert found["qwen3_guessed_tokens_total"] == 9 and found["qwen3_right_tokens_total"] == 4
    assert found["qwen3_cache_tokens"] == 320 and found["qwen3_cache_tokens_used"] == 128
    worker.engine = None
    assert list(OfEngine(worker).collect()) == []
