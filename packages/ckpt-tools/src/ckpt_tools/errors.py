"""What goes wrong with a checkpoint, in one line that says what, where and how to mend it."""


class CheckpointError(Exception):
    """Files are missing, broken, or not what they should be."""

    exit_code = 1


class UsageError(CheckpointError):
    """What was asked for cannot be done with these files, or the files do not say enough: the caller must choose."""

    exit_code = 2
