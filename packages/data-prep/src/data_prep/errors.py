"""The two kinds of mistake that data-prep reports in one line."""


class DataError(Exception):
    """Data or a tokenizer is missing or broken: exit code 1."""

    exit_code = 1


class UsageError(DataError):
    """What was asked does not exist or contradicts itself: exit code 2."""

    exit_code = 2
