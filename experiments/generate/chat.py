"""Chat on the terminal, which shows the model's answer while it is generated."""

import sys

from experiments.generate.batch import run
from experiments.generate.prompts import encode
from qwen3.text_stream import printable

MOST = 4  # tokens of one engine step, after which the new text is shown
HELP = "Type a message, and end it with a newline. /reset starts a new conversation; /exit, or the end of the input, ends."


def chat(engine, model, enable_thinking=None, stop=(), lines=sys.stdin, out=sys.stdout):
    """Reads the user's messages from `lines` and writes the model's answers to `out`, until `lines` end."""
    messages = []

    def show(text):
        out.write(printable(text))
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
    """Returns the messages with the model's answer added; where they do not fit, without their last one, and shows the error."""
    try:
        request = model.request(encode(model.tokenizer, {"messages": messages}, enable_thinking=enable_thinking))
        (result,) = run(engine, model.tokenizer, [(0, request, stop)], shown=show, most=MOST)
    except ValueError as error:
        show(f"({error})\n")
        return messages[:-1]
    show("\n" if result.finish_reason == "stop" else f"\n(stopped at the limit of {len(result.tokens)} new tokens)\n")
    return [*messages, {"role": "assistant", "content": result.text}]
