"""Many prompts through an engine, and through those of several data ranks at once: results in the order of the prompts."""

import json
import os
import time
from dataclasses import asdict, dataclass, field

from experiments.generate import exchange
from parallel import collectives
from parallel.checkpoint.files import write_text
from qwen3.text_stream import TextStream

SHOWN = 8  # results that are printed
TOGETHER = ("pp", "tp")  # the axes whose ranks make one text
FIRST_LOOK_S, LAST_LOOK_S = 0.5, 4.0  # between two looks of data ranks at each other: doubled from the first to the last


@dataclass
class Result:
    """What came of sample `sample` of prompt number `prompt`. tokens: without the stop id. finish_reason: "stop" (a stop id or string) or
    "length". queued_s: from its submission to its first token; total_s: to its last. logprobs: [(logprob, top_logprobs)], if asked for."""

    prompt: int
    sample: int
    prompt_tokens: int
    text: str = ""
    tokens: list = field(default_factory=list)
    finish_reason: str = ""
    queued_s: float = 0.0
    total_s: float = 0.0
    logprobs: list | None = None


class _Open:
    """A request that is with the engine."""

    def __init__(self, result, stream):
        self.result, self.stream, self.began = result, stream, time.perf_counter()

    def take(self, event, shown):
        """Adds a token; returns whether a stop string is complete."""
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
    """[Result] of (number of the prompt, Request, texts to stop at), as they end. goes_on(busy) -> whether to go on, see Together. shown:
    is given each piece of text; most: as of Engine.step."""
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
            if one is None:  # it has stopped at a string, within this step
                continue
            if one.take(event, shown):
                engine.cancel(event.id)
            if one.result.finish_reason:
                done.append(running.pop(event.id).result)
    return done


class Together:
    """Until when a rank goes on: until all data ranks are done, as one that ends early could neither do its share of what the others
    compute with it, nor wait for them (a collective on CPU fails after 30 s). Where experts are spread over them they ask each other
    before each step, else now and then."""

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
        """Of the first of the ranks that work together, so that all of them find the same."""
        due = time.monotonic() >= self.next_s and self.mesh.index(TOGETHER) == 0
        return bool(collectives.host_sum(self.mesh, TOGETHER, [due])[0])

    def _any(self, busy):
        return bool(collectives.host_sum(self.mesh, tuple(self.mesh.sizes), [busy])[0])


def gathered(mesh, results, totals):
    """([Result] of all ranks in the order of prompts and samples, [Totals as dict] of the data ranks). All ranks call it."""
    own = mesh.index(TOGETHER) == 0
    found = exchange.gather(mesh, {"results": [asdict(r) for r in results], "totals": asdict(totals)} if own else None)
    found = [each for each in found if each]
    every = [Result(**r) for each in found for r in each["results"]]
    return sorted(every, key=lambda r: (r.prompt, r.sample)), [each["totals"] for each in found]


def line(result):
    """A result's text on one line: a newline as \\n, a backslash as two, and what else is not printable as Python writes it, too."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in result.text)


def json_line(result):
    return json.dumps({key: value for key, value in asdict(result).items() if value is not None}, ensure_ascii=False)


def speeds(totals):
    """(prefill tokens/s, decode tokens/s), of data ranks that work side by side."""
    return tuple(sum(t[f"{what}_tokens"] / t[f"{what}_s"] for t in totals if t[f"{what}_s"]) for what in ("prefill", "decode"))


def write(results, totals, output, output_jsonl=None):
    """text_generation_result.txt in the folder `output`, or that file itself if it ends in .txt, and output_jsonl; and what is printed."""
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
