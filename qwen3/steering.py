"""Changes the logits of one request before the host chooses its next token: penalties, biases, least lengths, and a guide.

They come in this order: the repetition penalty, the presence and frequency penalties, the biases, the least number of tokens, the guide.
"""

import numpy as np


class GuideError(RuntimeError):
    """The guide of a request cannot say how its text goes on."""


def steered(request):
    """Whether the logits of a qwen3.engine.Request are changed at all."""
    r = request
    return bool(r.repetition_penalty != 1 or r.presence_penalty or r.frequency_penalty or r.logit_bias or r.min_tokens or r.guide)


class Steering:
    """The state of one request that is steered.

    Sources: Keskar et al. 2019 and HF's RepetitionPenaltyLogitsProcessor, for tokens of the prompt and of the answer; OpenAI's API for the
    presence and frequency penalties, which count tokens of the answer alone, and for the biases.
    """

    def __init__(self, request, vocab_size):
        self.request = request
        self._seen = None
        if request.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, bool)
            self._seen[np.asarray(request.prompt)] = True
        self._counts = np.zeros(vocab_size, np.float32) if request.presence_penalty or request.frequency_penalty else None
        self._bias = np.array([i for i, _ in request.logit_bias], int), np.array([x for _, x in request.logit_bias], np.float32)
        self._guide = request.guide.start() if request.guide else None

    def adjust(self, logits, count):
        """Returns the logits_V (numpy float32) from which the next token is chosen, after `count` tokens of the answer. Raises
        GuideError."""
        r, x = self.request, logits
        if self._seen is not None:
            penalty = np.float32(r.repetition_penalty)
            x = np.where(self._seen, np.where(x > 0, x / penalty, x * penalty), x)
        if self._counts is not None:
            x = x - np.float32(r.presence_penalty) * (self._counts > 0) - np.float32(r.frequency_penalty) * self._counts
        if r.logit_bias:
            x = x.copy()
            x[self._bias[0]] += self._bias[1]
        if count < r.min_tokens:
            x = x.copy()
            x[list(r.stop_ids)] = -np.inf
        allowed = self._guide.allowed(len(x)) if self._guide else None
        if allowed is not None:
            x = np.where(allowed, x, np.float32(-np.inf))
            if not np.isfinite(x.max()):
                raise GuideError("no token is allowed")
        return x

    def take(self, token):
        """Notes the token that was chosen. Raises GuideError."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        if self._guide is not None and token not in self.request.stop_ids:
            self._guide.take(token)
