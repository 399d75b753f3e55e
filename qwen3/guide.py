"""Decides which tokens may come next in one request's text: its reasoning may have a limit, and its answer a grammar.

    Request(prompt, guide=Plan(tokenizer, grammar=grammar, thinking="before", budget=500))

Until the block of reasoning ends, tokens are free; then the grammar holds. What begins and ends the block is looked for in the text, so it
does not matter which tokens spell it.
"""

from dataclasses import dataclass

import numpy as np

from qwen3.answers import THINK, THINK_END
from qwen3.steering import GuideError

# The words with which Qwen's own budget of reasoning ends a block. Source: Qwen3 Technical Report, section 4.3.
ENOUGH = "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n</think>\n\n"
AT_ONCE = "\n\n</think>\n\n"  # with a budget of no tokens


@dataclass(frozen=True)
class Plan:
    """The guide of a request. grammar: a qwen3.grammars.Grammar, or None. thinking: where the answer begins, as answers.thinking_at says.
    budget: the most tokens of reasoning, or None. stop_ids: of the request; they may not end the reasoning before a grammar."""

    tokenizer: object
    grammar: object = None
    thinking: str = "answer"
    budget: int | None = None
    stop_ids: tuple = ()

    def start(self):
        return Guide(self)


class Guide:
    """The state of one text."""

    def __init__(self, plan):
        self.plan, self._state, self._thought, self._forced, self._tail = plan, plan.thinking, 0, [], ""
        self._matcher = plan.grammar.start() if plan.grammar else None
        begins = plan.tokenizer.encode(THINK, allow_special=True) if plan.thinking == "before" else []
        self._begins = begins[0] if len(begins) == 1 else None  # with a grammar, a block can only be begun by a token of its own

    def allowed(self, size):
        """Returns bool [size], the tokens that may come next, or None for all. Raises GuideError."""
        plan = self.plan
        if self._state == "inside" and not self._forced and plan.budget is not None and self._thought >= plan.budget:
            self._forced = plan.tokenizer.encode(ENOUGH if plan.budget else AT_ONCE, allow_special=True)
        if self._forced:
            return np.arange(size) == self._forced[0]
        if self._matcher is None:
            return None
        if self._state == "inside":
            return ~np.isin(np.arange(size), plan.stop_ids)
        found = self._matcher.allowed(size)
        if self._state == "before" and self._begins is not None:
            found[self._begins] = True
        return found

    def take(self, token):
        """Notes the next token. Raises GuideError for one that the grammar does not have."""
        forced = bool(self._forced)
        if forced:
            self._forced.pop(0)
        if self._state == "before":
            self._before(token)
        elif self._state == "inside":
            self._inside(token)
        elif self._matcher is not None and not forced:
            self._matcher.take(token)

    def _text(self, token):
        return self.plan.tokenizer.bytes_of(token).decode("utf-8", "replace")

    def _before(self, token):
        if self._matcher is not None and token != self._begins:
            self._state = "answer"
            self._matcher.take(token)
            return
        self._tail += self._text(token)
        rest = self._tail.lstrip()
        if rest.startswith(THINK):
            self._state, self._tail = "inside", ""
        elif not THINK.startswith(rest):
            self._state = "answer"

    def _inside(self, token):
        self._thought += 1
        self._tail = self._tail[-len(THINK_END) :] + self._text(token)
        end = self._tail.find(THINK_END)
        if end >= 0:
            self._state = "answer"
            if self._matcher is not None and self._tail[end + len(THINK_END) :].strip():
                raise GuideError("one token ends the reasoning and begins the answer")
