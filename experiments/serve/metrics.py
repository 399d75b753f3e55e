"""What the server tells a Prometheus that asks for /metrics: counts of requests and tokens, what waits and runs, and times.

The numbers are of the whole server; nothing in them is a client's. Source of the names and units: Prometheus' naming practices.
"""

import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
KINDS = ("chat", "completion")


class Metrics:
    """The metrics of one server. worker: its experiments.serve.engine.Worker. slots: rows of the engine."""

    def __init__(self, worker, slots):
        self.registry = registry = CollectorRegistry()
        more = {"registry": registry}
        self.requests = Counter(
            "qwen3_requests", "requests for texts that were answered, by kind and HTTP status", ["kind", "status"], **more
        )
        self.finished = Counter("qwen3_texts", "texts that ended, by the reason", ["reason"], **more)
        self.prompt_tokens = Counter("qwen3_prompt_tokens", "tokens of the prompts of accepted requests", **more)
        self.new_tokens = Counter("qwen3_new_tokens", "tokens that the model made", **more)
        self.first = Histogram(
            "qwen3_time_to_first_token_seconds", "from a request's arrival to a text's first token", buckets=FIRST_S, **more
        )
        self.next = Histogram("qwen3_time_per_token_seconds", "between the tokens of a text, its mean", buckets=NEXT_S, **more)
        self.whole = Histogram("qwen3_request_seconds", "from a request's arrival to its last token", buckets=WHOLE_S, **more)
        gauges = {
            "qwen3_texts_running": ("texts that have a slot", lambda: min(len(worker.held), worker.running)),
            "qwen3_texts_waiting": ("texts that wait for a slot", lambda: max(0, len(worker.held) - worker.running)),
            "qwen3_slots": ("texts that can run at the same time", lambda: slots),
            "qwen3_places": ("texts that can run and wait together", lambda: worker.most),
        }
        for name, (words, value) in gauges.items():
            Gauge(name, words, **more).set_function(value)
        registry.register(OfEngine(worker))
        for kind in KINDS:  # a counter that is there from the start has a rate from the start
            self.requests.labels(kind, 200)

    def text(self):
        """Returns (the metrics in Prometheus' text format, as bytes, their content type)."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class OfEngine:
    """Collects what the worker's engine counts, on several ranks the sums over data ranks; its counters begin anew with a new engine."""

    def __init__(self, worker):
        self.worker = worker

    def collect(self):
        engine = self.worker.engine
        if engine is None or not hasattr(engine, "counts"):  # between two engines; or one of a test, which has none
            return
        found = engine.counts()
        counts = {
            "qwen3_prompt_tokens_read": ("tokens of prompts that were computed", found["prefill_tokens"]),
            "qwen3_prompt_tokens_reused": ("tokens of prompts whose keys and values were in the cache", found["reused_tokens"]),
            "qwen3_preemptions": ("texts that gave their part of the cache back and were read again", found["preempted"]),
            "qwen3_guessed_tokens": ("tokens that speculation guessed", found["guessed_tokens"]),
            "qwen3_right_tokens": ("tokens that speculation guessed and the model chose", found["right_tokens"]),
            "qwen3_evicted_blocks": ("blocks of earlier prompts whose place was needed", found["evicted_blocks"]),
        }
        for name, (words, value) in counts.items():
            yield CounterMetricFamily(name, words, value=value)
        yield GaugeMetricFamily("qwen3_cache_tokens", "tokens that the cache has room for", value=found["cache_tokens"])
        yield GaugeMetricFamily("qwen3_cache_tokens_used", "of these, in the blocks of running texts", value=found["cache_tokens_used"])


class Timer:
    """The times of one request, from its arrival on."""

    def __init__(self, metrics, clock=time.monotonic):
        self.metrics, self.clock, self.began, self.seen = metrics, clock, clock(), {}

    def token(self, index, reason):
        """Notes a token of text `index`, and where it is the last one the reason."""
        now, (first, count) = self.clock(), self.seen.get(index, (None, 0))
        if first is None:
            self.metrics.first.observe(now - self.began)
        self.seen[index] = (now if first is None else first, count + 1)
        self.metrics.new_tokens.inc()
        if reason:
            self.metrics.finished.labels(reason).inc()
            if count:
                self.metrics.next.observe((now - first) / count)

    def end(self):
        self.metrics.whole.observe(self.clock() - self.began)
