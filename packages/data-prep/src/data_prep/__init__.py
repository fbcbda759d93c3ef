"""Text and ids: tokenizer, prompt templates, and Megatron indexed datasets, without torch.

Public names, imported on first use: `Tokenizer` (the one place that turns text into ids and back), `templates` (the one
place for prompts), `prepare` (raw files to a data set), `merge` (several to one), `IndexedDataset`, `read_manifest` and
`Manifest`, `DataError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep import templates as templates
    from data_prep.errors import DataError as DataError
    from data_prep.indexed_dataset import IndexedDataset as IndexedDataset
    from data_prep.manifest import Manifest as Manifest
    from data_prep.manifest import read_manifest as read_manifest
    from data_prep.merging import merge as merge
    from data_prep.preparation import prepare as prepare
    from data_prep.tokenizer import Tokenizer as Tokenizer

_HOME = {
    "DataError": "errors",
    "IndexedDataset": "indexed_dataset",
    "Manifest": "manifest",
    "Tokenizer": "tokenizer",
    "merge": "merging",
    "prepare": "preparation",
    "read_manifest": "manifest",
}
__all__ = ["DataError", "IndexedDataset", "Manifest", "Tokenizer", "merge", "prepare", "read_manifest", "templates"]


def __getattr__(name: str) -> Any:
    if name == "templates":
        return import_module("data_prep.templates")
    if name not in _HOME:
        raise AttributeError(f"module 'data_prep' has no attribute {name!r}")
    return getattr(import_module(f"data_prep.{_HOME[name]}"), name)
