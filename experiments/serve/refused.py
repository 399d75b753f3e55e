"""The error of a request that cannot be honoured."""


class Refused(Exception):
    """Raised for a request that is answered with an error. param: the wrong field. code: OpenAI's error code."""

    def __init__(self, message, param=None, status=400, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
