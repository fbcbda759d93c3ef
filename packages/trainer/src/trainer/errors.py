"""The two kinds of mistake that the trainer reports in one line: a failed run, and a request that cannot be run."""


class TrainerError(Exception):
    """Something that the run met is broken or missing: exit code 1."""

    exit_code = 1


class ConfigError(TrainerError):
    """The options contradict each other, or what they name: exit code 2. Raised before anything is written."""

    exit_code = 2


class TerminatedError(TrainerError):
    """SIGTERM arrived, and the run was saved before it ended: exit code 143, as for any process that it ends."""

    exit_code = 143
