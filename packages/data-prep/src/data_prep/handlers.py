"""From a record to the documents that are written, key by key."""

import difflib
from collections.abc import Callable
from typing import Any

import numpy as np

from data_prep import templates
from data_prep.errors import DataError, UsageError
from data_prep.sources import Record
from data_prep.tokenizing import Tokenizer

IGNORED = -100
"""The label of a token that carries no loss."""

Documents = dict[str, np.ndarray]
"""Output key to ids; empty where a record gives nothing."""


class GeneralPretrainHandler:
    """Each of the named columns as one document; empty texts are skipped."""

    def __init__(self, tokenizer: Tokenizer, json_keys: list[str], append_eod: bool) -> None:
        self._tokenizer, self._keys, self._eod = tokenizer, json_keys, append_eod
        self.outputs = [f"_{key}_document" for key in json_keys]

    def __call__(self, record: Record, where: str) -> Documents:
        """The documents of one record."""
        documents = {}
        for key in self._keys:
            text = self._text(record, key, where)
            if text:
                documents[f"_{key}_document"] = np.array(self._tokenizer.encode(text, eos=self._eod), np.int32)
        return documents

    def _text(self, record: Record, key: str, where: str) -> str:
        return text_of(record, key, where)


class AlpacaPretrainHandler(GeneralPretrainHandler):
    """Alpaca's columns as one conversation under the key `text`."""

    def __init__(self, tokenizer: Tokenizer, json_keys: list[str], append_eod: bool) -> None:
        super().__init__(tokenizer, ["text"], append_eod)

    def _text(self, record: Record, key: str, where: str) -> str:
        given = record.get("input")
        section = f" Input:\n{given}" if given else "None"
        return (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions.USER: Below is an instruction that describes a "
            "task. Write a response that appropriately completes the request.\n\n### Instruction:\n"
            f"{record.get('instruction')}\n\n###{section}\n\n### Response: ASSISTANT: {record.get('output')}"
        )


class GeneralInstructionHandler:
    """Alpaca's columns as prompt and response; labels carry the response only. Source: AscendSpeed's handler."""

    outputs = tuple(f"_packed_{key}_document" for key in ("input_ids", "attention_mask", "labels"))

    def __init__(self, tokenizer: Tokenizer, json_keys: list[str], append_eod: bool) -> None:
        self._tokenizer, self._eod = tokenizer, append_eod

    def __call__(self, record: Record, where: str) -> Documents:
        """Ids, mask and labels of one record."""
        template = templates.GENERAL_INSTRUCTION
        given = text_of(record, "input", where) if "input" in record else ""
        instruction, output = text_of(record, "instruction", where), text_of(record, "output", where)
        text = template.prompt(instruction, given) + template.response(output)
        ids = np.array(self._tokenizer.encode(text, eos=self._eod), np.int32)
        marker = "### Response:\n"
        prompt = self._tokenizer.encode(text[: text.rindex(marker) + len(marker)])
        labels = ids.copy()
        labels[: len(prompt)] = IGNORED
        return dict(zip(self.outputs, (ids, np.ones_like(ids), labels), strict=True))


def text_of(record: Record, key: str, where: str) -> str:
    """A column's text.

    Raises:
        DataError: The column is missing, empty of a value, or no text; the record is named.
    """
    if key not in record:
        raise DataError(f"{where} has no column {key!r}: it has {', '.join(map(str, record)) or 'none'}")
    value: Any = record[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {'null' if value is None else type(value).__name__}, not text")
    return value


Handler = Callable[[Record, str], Documents]
HANDLERS: dict[str, Any] = {
    kind.__name__: kind for kind in (GeneralPretrainHandler, AlpacaPretrainHandler, GeneralInstructionHandler)
}


def handler_class(name: str) -> Any:
    """The handler of that name.

    Raises:
        UsageError: There is none; the nearest name is in the message.
    """
    if name in HANDLERS:
        return HANDLERS[name]
    near = difflib.get_close_matches(name, HANDLERS, 1, cutoff=0.4)
    raise UsageError(f"unknown handler {name!r}" + (f"; perhaps you meant {near[0]!r}" if near else ""))
