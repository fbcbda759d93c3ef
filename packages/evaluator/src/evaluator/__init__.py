"""Asks a LLaMA model questions: MMLU by letters or by the likelihood of the answers' texts.

Public names, imported on first use: `evaluate`, `Report`, `EvaluationError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluator.errors import EvaluationError as EvaluationError
    from evaluator.evaluation import evaluate as evaluate
    from evaluator.reports import Report as Report

_HOME = {"EvaluationError": "errors", "Report": "reports", "evaluate": "evaluation"}
__all__ = ["EvaluationError", "Report", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'evaluator' has no attribute {name!r}")
    return getattr(import_module(f"evaluator.{_HOME[name]}"), name)
