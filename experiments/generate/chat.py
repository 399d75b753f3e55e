"""A conversation on the terminal: what the model says is shown as it comes."""

import sys

from experiments.generate.batch import run
from experiments.generate.prompts import encode

MOST = 4  # tokens between two looks
HELP = "Type, and end with a newline. /reset begins anew; /exit, or the end of the input, ends."


def chat(engine, model, enable_thinking=None, stop=(), lines=sys.stdin, out=sys.stdout):
    """Reads a user's turns from `lines` and writes the model's to `out`, until the former end."""
    messages = []

    def show(text):
        out.write("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))  # no text of a model's moves the cursor
        out.flush()

    show(f"{HELP}\n\n> ")
    for line in lines:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            messages = []
        elif text:
            messages.append({"role": "user", "content": text})
            messages = _turn(engine, model, messages, enable_thinking, stop, show)
        show("\n> ")
    show("\n")


def _turn(engine, model, messages, enable_thinking, stop, show):
    """The messages with the model's answer; without the last one, where they do not fit."""
    try:
        request = model.request(encode(model.tokenizer, {"messages": messages}, enable_thinking=enable_thinking))
        (result,) = run(engine, model.tokenizer, [(0, request, stop)], shown=show, most=MOST)
    except ValueError as error:
        show(f"({error})\n")
        return messages[:-1]
    show("\n" if result.finish_reason == "stop" else f"\n(cut at {len(result.tokens)} new tokens)\n")
    return [*messages, {"role": "assistant", "content": result.text}]
