"""An engine that says given texts, and a tokenizer for it whose template has tools, calls and reasoning."""

import time

from qwen3.engine import Event
from qwen3.tokenizer import Tokenizer, train_bpe

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}<tool_call>{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}"
    "{{ m.tool_call_id or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tokenizer():
    made = train_bpe(["def f(x): return {}\n" * 20], 300)
    return Tokenizer(made._backend, {**made._config, "chat_template": TEMPLATE})


class Scripted:
    """Says the texts one after another, a token a step; the last one again and again. asked: the requests."""

    def __init__(self, tokenizer, texts, pause_s=0.0):
        self.tokenizer, self.texts, self.pause_s, self.asked, self.left = tokenizer, list(texts), pause_s, [], {}

    def submit(self, request):
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        tokens = self.tokenizer.encode(text, allow_special=True) + [self.tokenizer.eos_id]
        self.left[len(self.asked)] = tokens[: request.max_new_tokens]
        self.asked.append(request)
        return len(self.asked) - 1

    def cancel(self, number):
        self.left.pop(number, None)

    def step(self, most):
        time.sleep(self.pause_s)
        events = []
        for number, tokens in list(self.left.items()):
            token = tokens.pop(0)
            reason = "stop" if token == self.tokenizer.eos_id else None if tokens else "length"
            events.append(Event(number, token, finish_reason=reason))
            if reason:
                del self.left[number]
        return events
