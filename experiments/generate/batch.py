"""Generates for many prompts, with one engine on each data parallel rank, and writes the results in the order of the prompts."""

import json
import os
import time
from dataclasses import asdict, dataclass, field

from experiments.generate import exchange
from parallel import collectives
from parallel.checkpoint.files import write_text
from qwen3.text_stream import TextStream

SHOWN = 8  # results that are printed
TOGETHER = ("pp", "tp")  # the axes whose ranks generate a text together
FIRST_LOOK_S, LAST_LOOK_S = 0.5, 4.0  # time between two checks for busy data ranks: it doubles from the first value up to the last


@dataclass
class Result:
    """One generated text. prompt: the number of its prompt. sample: its number among the samples of that prompt. tokens: without the stop
    id. finish_reason: "stop" (a stop id or string) or "length". queued_s: seconds from its submission to its first token; total_s: to its
    last. logprobs: [(logprob, top_logprobs)] of each token, or None. message: of a conversation, the text as the assistant's message."""

    prompt: int
    sample: int
    prompt_tokens: int
    text: str = ""
    tokens: list = field(default_factory=list)
    finish_reason: str = ""
    queued_s: float = 0.0
    total_s: float = 0.0
    logprobs: list | None = None
    message: dict | None = None


class _Open:
    """A request that the engine works on. stream: the TextStream of its text."""

    def __init__(self, result, stream):
        self.result, self.stream, self.began = result, stream, time.perf_counter()

    def take(self, event, shown):
        """Adds an event's token, and calls shown(new text). Returns whether the text has reached a stop string."""
        result, now = self.result, time.perf_counter() - self.began
        if not result.total_s:
            result.queued_s = now
        result.total_s, is_text = now, event.finish_reason != "stop"
        if is_text:
            result.tokens.append(event.token)
            self._add(self.stream.push(event.token), shown)
            if event.logprob is not None:
                result.logprobs = [*(result.logprobs or []), (event.logprob, event.top_logprobs)]
        if event.finish_reason and not self.stream.stopped:
            self._add(self.stream.finish(), shown)
        result.finish_reason = "stop" if self.stream.stopped else event.finish_reason or ""
        return self.stream.stopped

    def _add(self, text, shown):
        self.result.text += text
        if text:
            shown(text)


def run(engine, tokenizer, requests, goes_on=bool, shown=lambda text: None, most=None):
    """Runs requests, an iterable of (number of the prompt, Request, stop strings). Returns [Result] in the order in which they end.

    goes_on(busy) -> whether to take another step, see Together. shown(text): called with each new piece of text. most: the argument of
    Engine.step.
    """
    requests, done, running, left = iter(requests), [], {}, True
    options = {} if most is None else {"most": most}
    while goes_on(left or bool(running)):
        while left and len(running) < 2 * engine.slots:
            number, request, stop = next(requests, (None, None, None))
            left = request is not None
            if left:
                result = Result(number, request.sample, len(request.prompt))
                running[engine.submit(request)] = _Open(result, TextStream(tokenizer, stop))
        for event in engine.step(**options):
            one = running.get(event.id)
            if one is None:  # it reached a stop string earlier in this step
                continue
            if event.finish_reason == "error":
                name = f"prompt {one.result.prompt}, sample {one.result.sample}"
                raise ValueError(
                    f"{name}: the model's logits are NaN or infinite after {len(one.result.tokens)} new tokens; check its weights"
                )
            if one.take(event, shown):
                engine.cancel(event.id)
            if one.result.finish_reason:
                done.append(running.pop(event.id).result)
    return done


class Together:
    """Decides whether a rank takes another step: together(busy) is true until all data parallel ranks are done.

    A rank that ended early could not join the collectives of the others, nor wait for them, as a collective on CPU fails after 30 s. The
    ranks ask each other before each step where experts are sharded over them, else every FIRST_LOOK_S to LAST_LOOK_S seconds.
    """

    def __init__(self, sharding):
        self.mesh = sharding.mesh if sharding and sharding.mesh.dp > 1 else None
        self.each_step = bool(self.mesh) and sharding.shards("experts") > 1
        self.wait_s, self.next_s = FIRST_LOOK_S, time.monotonic() + FIRST_LOOK_S

    def __call__(self, busy):
        if self.mesh is None:
            return busy
        if self.each_step:
            return self._any(busy)
        if busy and not self._due():
            return True
        while True:
            if not busy:
                time.sleep(max(0.0, self.next_s - time.monotonic()))
            others = self._any(busy)
            self.wait_s = min(2 * self.wait_s, LAST_LOOK_S)
            self.next_s = time.monotonic() + self.wait_s
            if busy or not others:
                return busy

    def _due(self):
        """Returns whether the next check is due, by the clock of the first rank along TOGETHER, so that its ranks agree."""
        due = time.monotonic() >= self.next_s and self.mesh.index(TOGETHER) == 0
        return bool(collectives.host_sum(self.mesh, TOGETHER, [due])[0])

    def _any(self, busy):
        return bool(collectives.host_sum(self.mesh, tuple(self.mesh.sizes), [busy])[0])


def gathered(mesh, results, totals):
    """Gathers from all ranks. Returns ([Result] in the order of prompts and samples, [Totals as dict] of each data parallel rank). All
    ranks must call it."""
    own = mesh.index(TOGETHER) == 0
    found = exchange.gather(mesh, {"results": [asdict(r) for r in results], "totals": asdict(totals)} if own else None)
    found = [each for each in found if each]
    every = [Result(**r) for each in found for r in each["results"]]
    return sorted(every, key=lambda r: (r.prompt, r.sample)), [each["totals"] for each in found]


def line(result):
    """Returns a result's text on one line. Backslashes and characters that are not printable are escaped as in Python: \\\\, \\n, \\x1b."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in result.text)


def json_line(result):
    return json.dumps({key: value for key, value in asdict(result).items() if value is not None}, ensure_ascii=False)


def speeds(totals):
    """Returns (prefill tokens/s, decode tokens/s), summed over the data parallel ranks."""
    return tuple(sum(t[f"{phase}_tokens"] / t[f"{phase}_s"] for t in totals if t[f"{phase}_s"]) for phase in ("prefill", "decode"))


def write(results, totals, output, output_jsonl=None):
    """Writes the results, and prints the first ones. output: a folder, for its text_generation_result.txt, or a file that ends in .txt.
    output_jsonl: a file for one JSON object a line, or None."""
    path = output if output.endswith(".txt") else os.path.join(output, "text_generation_result.txt")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_text(path, "".join(f"{line(result)}\n" for result in results))
    if output_jsonl:
        write_text(output_jsonl, "".join(f"{json_line(result)}\n" for result in results))
    for result in results[:SHOWN]:
        print(f"result     {line(result)}")
    prefill, decode = speeds(totals)
    print(f"speed      prefill {prefill:,.1f} tokens/s, decode {decode:,.1f} tokens/s")
    print(f"saved      {path}: {len(results)} results", flush=True)
