"""Reads prompts, from the command line or a file, and turns them into token ids."""

import os

import numpy as np

from parallel.json_text import loads
from qwen3 import answers
from qwen3.chat import prompt_text
from qwen3.messages import normal_tools


def check(text, path):
    """Raises ValueError unless one of --prompt and --prompts_file is given."""
    if (text is None) == (path is None):
        raise ValueError("give --prompt=TEXT or --prompts_file=FILE, exactly one of them")


def read(text=None, path=None):
    """Returns the prompts as a list; each is a text, or {"messages": [...], "tools": [...]}. text: a single prompt. path: a file with one
    prompt a line, without blank lines; in a .jsonl a line is a string, a list of messages, or an object with `prompt`, or with `messages`
    and `tools`. Raises ValueError that names the line."""
    check(text, path)
    if path is None:
        return [text]
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--prompts_file={path} is not a file; give the path of one")
    with open(path, encoding="utf-8") as file:
        try:
            lines = [(number, line.rstrip("\n")) for number, line in enumerate(file, 1) if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts_file={path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    if not lines:
        raise ValueError(f"--prompts_file={path} has no prompt; give one a line")
    return [_record(line, f"{path}, line {number}") if path.endswith(".jsonl") else line for number, line in lines]


def _record(line, where):
    try:
        found = loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("prompt"), str):
        return found["prompt"]
    if isinstance(found, list):
        found = {"messages": found}
    if isinstance(found, str):
        return found
    messages = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise ValueError(f'{where}: give a string, a list of messages with a role, or an object with "prompt" or "messages"')
    return {"messages": messages, "tools": found.get("tools")}


def encode(tokenizer, prompt, chat=False, enable_thinking=None):
    """Returns the token ids, int32 [n], of a prompt from read(). Messages, and with `chat` a text as a user's message, go through the chat
    template, up to the start of the assistant's turn; any other text is encoded without it. Raises ValueError for an empty prompt, or one
    that the template refuses."""
    if isinstance(prompt, str) and not chat:
        ids = tokenizer.encode(prompt)  # text that spells a special token stays text
    else:
        given = {"messages": [{"role": "user", "content": prompt}]} if isinstance(prompt, str) else prompt
        text = prompt_text(tokenizer, **given, enable_thinking=enable_thinking)
        ids = tokenizer.encode(text, allow_special=True)
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no tokens; give some text")
    return np.array(ids, np.int32)


def message(tokenizer, prompt, ids, text, forms):
    """The assistant's message that a text is, split by qwen3.answers into reasoning_content, content and tool_calls. prompt: from read().
    ids: its token ids. forms: a qwen3.answers.Forms."""
    tools = normal_tools(prompt.get("tools")) if isinstance(prompt, dict) else None
    thinking = answers.thinking_at(tokenizer.decode(ids)) if forms.thinks else "answer"
    answer = answers.Answer(forms.calls if tools else None, tools, thinking)
    return answers.message(answer.push(text) + answer.finish())


def encode_all(tokenizer, prompts, chat, enable_thinking):
    """Returns a list of token ids for each prompt. Raises ValueError as encode() does, and for enable_thinking where no prompt uses the
    template."""
    if enable_thinking is not None and not chat and all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"--enable_thinking={enable_thinking} is for the chat template, which plain text does not use; add --chat")
    return [encode(tokenizer, prompt, chat, enable_thinking).tolist() for prompt in prompts]
