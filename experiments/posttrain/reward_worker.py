"""A process that computes rewards: `python -m experiments.posttrain.reward_worker MODULE:FUNCTION SECONDS`, started by reward_pool.py.

It reads one JSON list [prompt, text, record] a line, and answers each with a line: {"reward": number} or {"reason": text}. Its first line
says whether the function was found. What the function prints goes to the standard error.
"""

import importlib
import json
import math
import os
import signal
import sys


def main(name, most_s):
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        module, _, function = name.partition(":")
        reward = getattr(importlib.import_module(module), function)
        found = {} if callable(reward) else {"reason": f"{function!r} is {type(reward).__name__}, not a function"}
    except Exception as error:
        found = {"reason": _text(error)}
    print(json.dumps(found), file=answers, flush=True)
    for line in sys.stdin if not found else ():
        # The one who asked kills a process that takes too long. This ends it where that one was killed itself.
        signal.setitimer(signal.ITIMER_REAL, 2 * most_s + 1)
        print(json.dumps(_answer(reward, *json.loads(line))), file=answers, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(reward, prompt, text, record):
    try:
        value = float(reward(prompt, text, record))
    except Exception as error:
        return {"reason": f"the reward raised {_text(error)}"}
    return {"reward": value} if math.isfinite(value) else {"reason": f"the reward is {value}"}


def _text(error):
    return f"{type(error).__name__}: {str(error)[:200]}"


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
