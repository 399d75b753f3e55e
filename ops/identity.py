"""The identity, for places that need a function where there is nothing to do."""


def identity(x):
    return x
