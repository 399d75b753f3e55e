"""The identity, for code that needs a function where nothing is to be done."""


def identity(x):
    return x
