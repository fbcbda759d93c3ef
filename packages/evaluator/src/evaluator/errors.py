"""The two kinds of mistake that the evaluator reports in one line."""


class EvaluationError(Exception):
    """The questions or the report's place are missing or broken, or the model cannot answer: exit code 1."""

    exit_code = 1


class UsageError(EvaluationError):
    """What was asked does not exist or contradicts itself: exit code 2."""

    exit_code = 2
