"""Drafts of the next tokens by prompt lookup: what came after the last tokens where the text had them before.

Text that repeats its prompt, as an edited file does, is guessed well, and no second model is needed. Source: Saxena 2023, prompt lookup
decoding; HF's prompt_lookup_num_tokens.
"""

GRAMS = (4, 2)  # how many last tokens are looked for; the first that are found count


class Lookup:
    """The tokens of one text, and where each of their n-grams was seen last.

    most: the most tokens of a draft. After a draft of which some tokens were wrong, the next one is at most twice as long as what was right
    of it, plus one, so that a text that nothing predicts pays for few wrong tokens.
    """

    def __init__(self, tokens, most):
        self.tokens, self.most, self.next = [], most, most
        self._after = {}  # n-gram: the place of the token that came after it last
        for token in tokens:
            self.take(token)

    def take(self, token):
        """Adds a token to the text."""
        for size in GRAMS:
            if len(self.tokens) >= size:
                self._after[tuple(self.tokens[-size:])] = len(self.tokens)
        self.tokens.append(token)

    def draft(self, room):
        """Returns up to `room` tokens that may come next, a list; [] where nothing is found. A text that repeats itself goes on so."""
        for size in GRAMS:
            at = self._after.get(tuple(self.tokens[-size:]))
            if at is not None:
                period = len(self.tokens) - at
                return [self.tokens[at + i % period] for i in range(min(self.next, room))]
        return []

    def learn(self, drafted, right):
        """Notes how many tokens of a draft were right."""
        if drafted:
            self.next = self.most if right == drafted else min(self.most, 2 * right + 1)
