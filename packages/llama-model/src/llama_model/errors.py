"""What can go wrong with a model, in one line that says what and how to mend it."""


class ModelError(Exception):
    """Weights and network do not fit, or the engine cannot be used as it is: exit code 1."""

    exit_code = 1


class RequestError(ModelError, ValueError):
    """The caller asked for something that cannot be: exit code 2."""

    exit_code = 2
