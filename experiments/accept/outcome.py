"""How a check ends: it returns a dict of facts and passes, or raises one of these. Any other exception is a failure too."""

PASS, FAIL, NOT_HERE, NOT_RUN = "pass", "fail", "not possible here", "not run"


class NotHere(Exception):
    """The check is not possible on this machine or in this job. The text says why."""


class Failed(Exception):
    """The check has found something wrong. facts: as a check that passes returns them."""

    def __init__(self, text, facts=None):
        super().__init__(text)
        self.facts = facts or {}
