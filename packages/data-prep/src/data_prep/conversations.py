"""Conversations as users keep them: Alpaca's columns, ShareGPT's turns, OpenAI's messages, around a prompt type.

The ids are those of MindSpeed-LLM's handlers of the same names: each part of the prompt is encoded by itself, the loss
falls on the answers and their `</s>` only.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_prep.errors import UsageError
from data_prep.handlers import HandlerOptions
from data_prep.indexed_writer import Block
from data_prep.instruction import OUTPUTS, blocks
from data_prep.rows import Rows, text_complaint
from data_prep.templates import Part, Turn, get_chat
from data_prep.tokenizer import Tokenizer

Conversation = tuple[list[Turn], str]
"""The turns, and the system's text."""


class _ConversationHandler:
    """What the three have in common.

    `roles` names the columns by what they are for, as --map-keys does; a role whose column is "" is not read.
    """

    roles: ClassVar[Mapping[str, str]]
    tags: ClassVar[Mapping[str, str]] = {}
    needed: ClassVar[tuple[str, ...]]
    outputs: tuple[str, ...] = OUTPUTS
    appends_eod: bool = True

    def __init__(self, tokenizer: Tokenizer, options: HandlerOptions) -> None:
        assert options.prompt_type is not None
        self._tokenizer, self._eod = tokenizer, options.append_eod
        self._template = get_chat(options.prompt_type)
        given = dict(options.map_keys)
        self._tags = {**self.tags, **given.pop("tags", {})}
        self._column = {**self.roles, **given}
        self.columns: tuple[str, ...] = tuple(self._column[role] for role in self.needed)
        others = (column for role, column in self._column.items() if role not in self.needed)
        self.optional: tuple[str, ...] = tuple(filter(None, others))

    @classmethod
    def check_options(cls, options: HandlerOptions) -> None:
        """Raises a UsageError where the prompt type or a mapped role does not exist."""
        if options.prompt_type is None:
            raise UsageError(f"{cls.__name__} needs a --prompt-type: alpaca, llama2, default or empty")
        get_chat(options.prompt_type)
        known = [*cls.roles, *(["tags"] if cls.tags else [])]
        for role, column in options.map_keys.items():
            if role not in known:
                raise UsageError(f"--map-keys: {cls.__name__} knows no {role!r}, but {', '.join(known)}")
            if role == "tags":
                _check_tags(column, cls.tags)
            elif not isinstance(column, str) or (not column and role in cls.needed):
                raise UsageError(f"--map-keys: the column for {role!r} is {column!r}, not a name")

    def __call__(self, rows: Rows) -> dict[str, Block]:
        """Ids, mask and labels."""
        rows.need(*self.columns)
        names = list(self._column)
        columns = [rows.values(column) if column else [None] * len(rows) for column in self._column.values()]
        found = [self._conversation(dict(zip(names, record, strict=True))) for record in zip(*columns, strict=True)]
        rows.check(found, lambda each: f": {each}" if isinstance(each, str) else None)
        parts = [self._parts(*each) for each in found if not isinstance(each, str)]
        return encoded_parts(self._tokenizer, parts)

    def _conversation(self, record: Mapping[str, Any]) -> Conversation | str:
        """The conversation of a record; what is wrong with it, as words."""
        raise NotImplementedError

    def _parts(self, turns: Sequence[Turn], system: str) -> list[Part]:
        parts = self._template.parts(turns, system)
        if self._eod:  # one more, as upstream: behind the one that ends the answer
            last = parts[-1]
            parts[-1] = Part(last.text, last.loss, last.bos, last.eos + 1)
        return parts

    def _messages(self, messages: Any, system: Any) -> Conversation | str:
        """Turns with tags, the system's perhaps the first of them."""
        said = _said(messages, self._tags["role_tag"], self._tags["content_tag"])
        if isinstance(said, str):
            return said
        if said and said[0][0] == self._tags["system_tag"]:
            system, said = said[0][1], said[1:]
        if system and (wrong := text_complaint("system", system)):
            return wrong.removeprefix(": ")
        if not said or len(said) % 2:
            return f"{len(said)} messages, which are no pairs of question and answer"
        order = (self._tags["user_tag"], self._tags["assistant_tag"])
        for number, (who, _) in enumerate(said):
            if who != order[number % 2]:
                return f"message {number + 1} is from {who!r} where {order[number % 2]!r} was expected"
        return [Turn(("user", "assistant")[at % 2], text) for at, (_, text) in enumerate(said)], system or ""


def _check_tags(tags: Any, known: Mapping[str, str]) -> None:
    odd = [tag for tag in tags if tag not in known] if isinstance(tags, dict) else [tags]
    if odd:
        raise UsageError(f"--map-keys: tags has {odd[0]!r}, but knows {', '.join(known)}")
    for tag, value in tags.items():
        if not isinstance(value, str):
            raise UsageError(f"--map-keys: the tag {tag!r} is {value!r}, not a text")


def _said(messages: Any, who: str, what: str) -> list[tuple[str, str]] | str:
    """(who, text) of each message; the words that say what is wrong with them."""
    if not isinstance(messages, list):
        return f"the messages are {'null' if messages is None else type(messages).__name__}, not a list"
    said = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get(who), str):
            return f"message {number} has no {who!r}"
        if wrong := text_complaint(what, message.get(what)):
            return f"message {number}{wrong}"
        said.append((message[who], message[what]))
    return said


class AlpacaStyleInstructionHandler(_ConversationHandler):
    """Instruction, input and output, perhaps with a history of pairs and a system's text."""

    roles: ClassVar[Mapping[str, str]] = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "",
        "system": "",
    }
    needed: ClassVar[tuple[str, ...]] = ("prompt", "response")

    def _conversation(self, record: Mapping[str, Any]) -> Conversation | str:
        turns: list[Turn] = []
        for number, pair in enumerate(record["history"] or [], 1):
            if not isinstance(pair, list) or len(pair) != 2:
                return f"item {number} of the history is no pair of question and answer"
            turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
        asked = [record[role] for role in ("prompt", "query") if record[role]]
        if odd := [each for each in asked if not isinstance(each, str)]:
            return f"the prompt is {type(odd[0]).__name__}, not text"
        turns += [Turn("user", "\n".join(asked)), Turn("assistant", record["response"])]
        checked = [(self._column["response" if at % 2 else "prompt"], turn.content) for at, turn in enumerate(turns)]
        checked += [(self._column["system"], record["system"])] if record["system"] else []
        for name, text in checked:
            if wrong := text_complaint(name, text):
                return wrong.removeprefix(": ")
        return turns, record["system"] or ""


class SharegptStyleInstructionHandler(_ConversationHandler):
    """A list of turns from "human" and "gpt"."""

    roles: ClassVar[Mapping[str, str]] = {"messages": "conversations", "system": ""}
    needed: ClassVar[tuple[str, ...]] = ("messages",)
    tags: ClassVar[Mapping[str, str]] = {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "system_tag": "system",
    }

    def _conversation(self, record: Mapping[str, Any]) -> Conversation | str:
        return self._messages(record["messages"], record["system"])


class OpenAIInstructionHandler(SharegptStyleInstructionHandler):
    """A list of messages of the roles "user" and "assistant"."""

    roles: ClassVar[Mapping[str, str]] = {"messages": "messages", "system": ""}
    tags: ClassVar[Mapping[str, str]] = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }


def encoded_parts(tokenizer: Tokenizer, conversations: Sequence[Sequence[Part]]) -> dict[str, Block]:
    """Blocks of conversations, each a sequence and a document."""
    parts = list(chain.from_iterable(conversations))
    done = tokenizer.encode_column(pa.array([part.text for part in parts], pa.string()))
    bos, eos = (np.array([getattr(part, name) for part in parts], np.int64) for name in ("bos", "eos"))
    loss = np.array([part.loss for part in parts], bool)
    wide = done.lengths + bos + eos
    ends = np.cumsum(wide)
    total = int(wide.sum())
    ids, own = np.empty(total, np.int32), np.ones(total, bool)
    for id, count, places in ((tokenizer.bos_id, bos, ends - wide), (tokenizer.eos_id, eos, ends - eos)):
        for number in range(int(count.max(initial=0))):
            at = (places + number)[count > number]
            ids[at], own[at] = id, False
    ids[own] = done.ids
    counts = np.array([len(each) for each in conversations], np.int64)
    sums = np.concatenate(([0], ends))[np.concatenate(([0], np.cumsum(counts)))]
    return blocks(ids, np.diff(sums).astype(np.int32), np.repeat(~loss, wide))
