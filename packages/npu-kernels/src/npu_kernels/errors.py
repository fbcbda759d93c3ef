"""What a user of the ops can get wrong, in one line."""


class KernelError(Exception):
    """A device that is not there, or a setting that does not exist: exit code 2."""

    exit_code = 2
