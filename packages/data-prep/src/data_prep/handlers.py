"""From records to the documents that are written, key by key."""

import difflib
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np

from data_prep import templates
from data_prep.errors import DataError, UsageError
from data_prep.indexed_dataset import Block
from data_prep.sources import Located, Record, no_column
from data_prep.tokenizer import Tokenizer

IGNORED = -100
"""The label of a token that carries no loss."""

DEFAULT_KEYS = ("text",)


class Handler(Protocol):
    """Turns a batch of records into blocks of documents, the same for any cut into batches."""

    columns: tuple[str, ...]
    """What it asks of a record."""
    outputs: tuple[str, ...]
    """What it writes: suffixes of the output prefix."""

    def __call__(self, batch: Sequence[Located]) -> dict[str, Block]:
        """A block for each of `outputs`; a record may give no document.

        Raises:
            DataError: A record lacks a column, or holds no text there; it is named.
        """


class GeneralPretrainHandler:
    """Each of the named columns as one document; empty texts are skipped, and so columns may differ in number."""

    def __init__(self, tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool) -> None:
        self._tokenizer, self._eod = tokenizer, append_eod
        self.columns: tuple[str, ...] = tuple(json_keys)
        self.outputs: tuple[str, ...] = tuple(f"_{key}_document" for key in json_keys)

    def __call__(self, batch: Sequence[Located]) -> dict[str, Block]:
        """Each column's texts."""
        return {
            output: self._block([text for where, record in batch if (text := text_of(record, key, where))])
            for key, output in zip(self.columns, self.outputs, strict=True)
        }

    def _block(self, texts: Sequence[str]) -> Block:
        ids, lengths = self._tokenizer.encode_flat(texts, eos=self._eod)
        return _one_sequence_each(ids, lengths)


class AlpacaPretrainHandler(GeneralPretrainHandler):
    """Alpaca's columns as one conversation under the key `text`. Source: AscendSpeed's handler."""

    def __init__(self, tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool) -> None:
        super().__init__(tokenizer, DEFAULT_KEYS, append_eod)
        self.columns = ("instruction", "input", "output")

    def __call__(self, batch: Sequence[Located]) -> dict[str, Block]:
        """The conversations."""
        return {self.outputs[0]: self._block([self._conversation(*located) for located in batch])}

    def _conversation(self, where: str, record: Record) -> str:
        for name in ("instruction", "output"):  # null ones become the word None, as upstream writes them
            if name not in record:
                raise no_column(where, name, record)
        given = record.get("input")
        section = f" Input:\n{given}" if given else "None"
        return (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions.USER: Below is an instruction that describes a "
            "task. Write a response that appropriately completes the request.\n\n### Instruction:\n"
            f"{record['instruction']}\n\n###{section}\n\n### Response: ASSISTANT: {record['output']}"
        )


class GeneralInstructionHandler:
    """Alpaca's columns as prompt and response; labels carry the response only. Source: AscendSpeed's handler."""

    columns: tuple[str, ...] = ("instruction", "input", "output")
    outputs: tuple[str, ...] = tuple(f"_packed_{key}_document" for key in ("input_ids", "attention_mask", "labels"))
    _template: ClassVar = templates.GENERAL_INSTRUCTION
    _marker: ClassVar = "### Response:\n"

    def __init__(self, tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool) -> None:
        self._tokenizer, self._eod = tokenizer, append_eod

    def __call__(self, batch: Sequence[Located]) -> dict[str, Block]:
        """Ids, mask and labels."""
        texts = [self._text(*located) for located in batch]
        ids, lengths = self._tokenizer.encode_flat(texts, eos=self._eod)
        labels, begin = ids.copy(), 0
        for text, length in zip(texts, lengths.tolist(), strict=True):
            answer = text.rindex(self._marker) + len(self._marker)  # the last one, as upstream: answers may hold it
            prompt = self._tokenizer.prefix_length(text, answer, ids[begin : begin + length])
            labels[begin : begin + min(prompt, length)] = IGNORED
            begin += length
        blocks = (_one_sequence_each(row, lengths) for row in (ids, np.ones_like(ids), labels))
        return dict(zip(self.outputs, blocks, strict=True))

    def _text(self, where: str, record: Record) -> str:
        given = text_of(record, "input", where) if "input" in record else ""
        prompt = self._template.prompt(text_of(record, "instruction", where), given)
        return prompt + self._template.response(text_of(record, "output", where))


def _one_sequence_each(ids: np.ndarray, lengths: np.ndarray) -> Block:
    return Block(ids, lengths, np.ones(len(lengths), np.int64))


def text_of(record: Record, key: str, where: str) -> str:
    """A column's text.

    Raises:
        DataError: The column is missing, null, no text, or text that UTF-8 cannot hold; the record is named.
    """
    if key not in record:
        raise no_column(where, key, record)
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {'null' if value is None else type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON's escapes can spell it: "\ud800"
            raise DataError(f"{where}: {key!r} holds half of a surrogate pair, which is no text") from None
    return value


HANDLERS: dict[str, type[GeneralPretrainHandler | GeneralInstructionHandler]] = {
    kind.__name__: kind for kind in (GeneralPretrainHandler, AlpacaPretrainHandler, GeneralInstructionHandler)
}


def make_handler(name: str, tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool) -> Handler:
    """The handler of that name, as `check_handler` has allowed it."""
    return HANDLERS[name](tokenizer, json_keys, append_eod)


def check_handler(name: str, json_keys: Sequence[str]) -> None:
    """Sees to it that there is such a handler, and that it reads the named columns.

    Raises:
        UsageError: It is not so; the nearest handler is named.
    """
    if name not in HANDLERS:
        near = difflib.get_close_matches(name, HANDLERS, 1, cutoff=0.4)
        advice = f"perhaps you meant {near[0]!r}" if near else f"there are {', '.join(HANDLERS)}"
        raise UsageError(f"unknown handler {name!r}: {advice}")
    if HANDLERS[name] is not GeneralPretrainHandler and tuple(json_keys) != DEFAULT_KEYS:
        raise UsageError(f"{name} reads columns of its own: --json-keys is GeneralPretrainHandler's")
    if not json_keys or len(set(json_keys)) < len(json_keys):
        raise UsageError("--json-keys names no column, or one twice")
    if odd := [key for key in json_keys if "/" in key]:
        raise UsageError(f"--json-keys {odd[0]}: it becomes part of a file's name, and may hold no slash")
