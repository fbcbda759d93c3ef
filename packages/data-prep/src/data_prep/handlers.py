"""From records to the documents that are written, key by key: the handlers, and those for pretraining."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.errors import UsageError
from data_prep.indexed_writer import Block
from data_prep.rows import Rows
from data_prep.tokenizer import Tokenizer, framed

DEFAULT_KEYS = ("text",)


class Handler(Protocol):
    """Turns records into blocks of documents, the same for any cut into batches."""

    columns: tuple[str, ...]
    """What it asks of a record."""
    optional: tuple[str, ...]
    """What it reads where it is there."""
    outputs: tuple[str, ...]
    """What it writes: suffixes of the output prefix."""
    appends_eod: bool
    """Whether it heeds `HandlerOptions.append_eod`."""

    def __call__(self, rows: Rows) -> dict[str, Block]:
        """A block for each of `outputs`; a record may give no document.

        Raises:
            BadRecordsError: Records lack a column, or hold no text there; they are named.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerOptions:
    """What a handler is told."""

    json_keys: tuple[str, ...] = DEFAULT_KEYS
    append_eod: bool = False
    prompt_type: str | None = None
    map_keys: Mapping[str, Any] = field(default_factory=dict)
    """Role to column; see `columns_of`."""


class GeneralPretrainHandler:
    """Each of the named columns as one document; empty texts are skipped, and so columns may differ in number."""

    optional: tuple[str, ...] = ()
    appends_eod: bool = True

    def __init__(self, tokenizer: Tokenizer, options: HandlerOptions) -> None:
        self._tokenizer, self._eod = tokenizer, options.append_eod
        self.columns: tuple[str, ...] = options.json_keys
        self.outputs: tuple[str, ...] = tuple(f"_{key}_document" for key in options.json_keys)

    def __call__(self, rows: Rows) -> dict[str, Block]:
        """Each column's texts."""
        columns = {key: rows.texts(key) for key in self.columns}
        return {output: self._block(columns[key]) for key, output in zip(self.columns, self.outputs, strict=True)}

    def _block(self, texts: pa.Array) -> Block:
        if pc.any(empty := pc.equal(pc.binary_length(texts), 0)).as_py():
            texts = texts.filter(pc.invert(empty))
        tokenizer = self._tokenizer
        done = tokenizer.encode_column(texts)
        return one_each(*framed(done.ids, done.lengths, [tokenizer.bos_id], [tokenizer.eos_id] * self._eod))


class AlpacaPretrainHandler(GeneralPretrainHandler):
    """Alpaca's columns as one conversation under the key `text`. Source: AscendSpeed's handler."""

    optional = ("input",)

    def __init__(self, tokenizer: Tokenizer, options: HandlerOptions) -> None:
        super().__init__(tokenizer, HandlerOptions(append_eod=options.append_eod))
        self.columns = ("instruction", "output")

    def __call__(self, rows: Rows) -> dict[str, Block]:
        """The conversations."""
        rows.need(*self.columns)  # null ones become the word None, as upstream writes them
        columns = (rows.values(name) for name in ("instruction", "input", "output"))
        texts = [_alpacas_conversation(*record) for record in zip(*columns, strict=True)]
        return {self.outputs[0]: self._block(rows.column("instruction, input or output", texts))}


def _alpacas_conversation(instruction: Any, given: Any, output: Any) -> str:
    section = f" Input:\n{given}" if given else "None"
    return (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.USER: Below is an instruction that describes a "
        "task. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        f"{instruction}\n\n###{section}\n\n### Response: ASSISTANT: {output}"
    )


def one_each(ids: np.ndarray, lengths: np.ndarray) -> Block:
    """A block in which each sequence is a document."""
    return Block(ids, lengths, np.ones(len(lengths), np.int64))


def kinds() -> dict[str, Any]:
    """The handlers by name."""
    from data_prep import conversations, instruction

    return {
        kind.__name__: kind
        for kind in (
            GeneralPretrainHandler,
            AlpacaPretrainHandler,
            instruction.GeneralInstructionHandler,
            instruction.MOSSInstructionHandler,
            conversations.AlpacaStyleInstructionHandler,
            conversations.SharegptStyleInstructionHandler,
            conversations.OpenAIInstructionHandler,
        )
    }


def make_handler(name: str, tokenizer: Tokenizer, options: HandlerOptions) -> Handler:
    """The handler of that name, as `check_handler` has allowed it."""
    made: Handler = kinds()[name](tokenizer, options)
    return made


def check_handler(name: str, options: HandlerOptions) -> None:
    """Sees to it that there is such a handler, and that it takes these options.

    Raises:
        UsageError: It is not so; the nearest handler is named.
    """
    known, keys = kinds(), options.json_keys
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.4)
        advice = f"perhaps you meant {near[0]!r}" if near else f"there are {', '.join(known)}"
        raise UsageError(f"unknown handler {name!r}: {advice}")
    if known[name] is not GeneralPretrainHandler and keys != DEFAULT_KEYS:
        raise UsageError(f"{name} reads columns of its own: --json-keys is GeneralPretrainHandler's")
    if not keys or len(set(keys)) < len(keys):
        raise UsageError("--json-keys names no column, or one twice")
    if odd := [key for key in keys if "/" in key]:
        raise UsageError(f"--json-keys {odd[0]}: it becomes part of a file's name, and may hold no slash")
    chats = hasattr(known[name], "check_options")
    if chats:
        known[name].check_options(options)
    elif options.prompt_type or options.map_keys:
        flag = "--prompt-type" if options.prompt_type else "--map-keys"
        raise UsageError(
            f"{name} has a prompt and columns of its own: {flag} is for those with Style or OpenAI in them"
        )


def parse_map_keys(text: str) -> dict[str, Any]:
    """--map-keys, as MindSpeed-LLM takes it: a JSON object of role to column.

    Raises:
        UsageError: It is none.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--map-keys {text!r} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f'--map-keys {text!r} is no object: give {{"prompt": "my_column", ...}}')
    return content
