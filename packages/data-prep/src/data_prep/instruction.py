"""Instruction data in AscendSpeed's own form: one text around a record, labels for its last answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.handlers import HandlerOptions, one_each
from data_prep.indexed_writer import Block
from data_prep.rows import Rows
from data_prep.templates import GENERAL_INSTRUCTION
from data_prep.tokenizer import Tokenizer, framed

IGNORED = -100
"""The label of a token that carries no loss."""
KEYS = ("input_ids", "attention_mask", "labels")
OUTPUTS = tuple(f"_packed_{key}_document" for key in KEYS)
"""What every handler of instruction data writes: "packed" is upstream's mark for it, nothing more."""


class GeneralInstructionHandler:
    """Alpaca's columns as prompt and response; labels carry the response only. Source: AscendSpeed's handler."""

    columns: tuple[str, ...] = ("instruction", "output")
    optional: tuple[str, ...] = ("input",)
    outputs: tuple[str, ...] = OUTPUTS
    appends_eod: bool = True

    def __init__(self, tokenizer: Tokenizer, options: HandlerOptions) -> None:
        self._tokenizer, self._eod = tokenizer, options.append_eod

    def __call__(self, rows: Rows) -> dict[str, Block]:
        """Ids, mask and labels."""
        before, between, behind, end = (pa.scalar(piece) for piece in GENERAL_INSTRUCTION.pieces)
        instruction, given = rows.texts("instruction"), rows.texts("input", default="")
        output = rows.texts("output")
        nothing = pa.scalar("")
        prompts = pc.binary_join_element_wise(before, instruction, between, given, behind, nothing)
        texts = pc.binary_join_element_wise(prompts, output, end, nothing)
        prefixes = pc.binary_length(prompts).to_numpy().astype(np.int64)
        return labelled(self._tokenizer, texts, prefixes, output, eod=self._eod)


class MOSSInstructionHandler:
    """A conversation as a document: for each turn a sequence of all so far, its last answer labelled.

    Source: AscendSpeed's handler, which reads `chat` alone, and appends no `</s>` even where it is told to.
    """

    columns: tuple[str, ...] = ("chat",)
    optional: tuple[str, ...] = ()
    appends_eod: bool = False
    outputs: tuple[str, ...] = OUTPUTS

    def __init__(self, tokenizer: Tokenizer, options: HandlerOptions) -> None:
        self._tokenizer = tokenizer

    def __call__(self, rows: Rows) -> dict[str, Block]:
        """Ids, mask and labels."""
        rows.need("chat")
        chats = rows.values("chat")
        rows.check(chats, _complaint)
        texts: list[str] = []
        prefixes: list[int] = []
        answers: list[str] = []
        turns: list[int] = []
        for chat in chats:
            said = [turn for turn in chat.values() if turn]
            text = GENERAL_INSTRUCTION.pieces[0].partition("### Instruction:\n")[0]
            for turn in said:
                answer = turn["MOSS"].replace("<|MOSS|>:", "").replace("<eom>", "").strip()
                text += GENERAL_INSTRUCTION.turn(turn["Human"].replace("<eoh>", "").replace("<|Human|>: ", "").strip())
                prefixes.append(len(text.encode()))
                text += GENERAL_INSTRUCTION.response(answer)
                texts.append(text)
                answers.append(answer)
            turns.append(len(said))
        column = pa.array(texts, pa.string())
        made = labelled(
            self._tokenizer, column, np.array(prefixes, np.int64), pa.array(answers, pa.string()), eod=False
        )
        documents = np.array([each for each in turns if each], np.int64)
        return {output: Block(block.ids, block.lengths, documents) for output, block in made.items()}


def _complaint(chat: Any) -> str | None:
    """What is wrong with a MOSS conversation."""
    if not isinstance(chat, dict):
        return f": 'chat' is {'null' if chat is None else type(chat).__name__}, not an object of turns"
    for name, turn in chat.items():
        for who in ("Human", "MOSS") if turn else ():
            if not isinstance(turn, dict) or not isinstance(turn.get(who), str):
                return f": {name!r} of 'chat' has no text {who!r}"
            try:
                turn[who].encode()
            except UnicodeEncodeError:
                return f": {name!r} of 'chat' holds half of a surrogate pair, which is no text"
    return None


def labelled(
    tokenizer: Tokenizer, texts: pa.Array, prefixes: np.ndarray, answers: pa.Array, *, eod: bool
) -> dict[str, Block]:
    """Blocks of texts whose loss begins behind a prefix.

    As upstream counts it, the prefix ends with the last `### Response:` of the text and a newline, whether the text has
    one there or not: an answer may hold the words, too.

    Args:
        tokenizer: Makes the ids.
        texts: [texts] string.
        prefixes: [texts] int64, the bytes of each that come before its answer.
        answers: [texts] string: the answers.
        eod: Whether `</s>` ends each text, with a label.
    """
    done = tokenizer.encode_column(texts, prefixes)
    ids, lengths = framed(done.ids, done.lengths, [tokenizer.bos_id], [tokenizer.eos_id] * eod)
    before = done.before + 1
    marker = GENERAL_INSTRUCTION.marker
    for at in np.flatnonzero(pc.match_substring(answers, marker).to_numpy(zero_copy_only=False)):
        text = texts[int(at)].as_py()
        before[at] = len(tokenizer.encode(text[: text.rindex(marker)] + marker + "\n"))
    return blocks(ids, lengths, unlabelled(lengths, before))


def unlabelled(lengths: np.ndarray, before: np.ndarray) -> np.ndarray:
    """[tokens] bool: whether a token is among the first `before` ones of its sequence."""
    first = np.minimum(before, lengths)
    runs = np.stack((first, lengths - first), 1).ravel()
    return np.repeat(np.tile([True, False], len(lengths)), runs)


def blocks(ids: np.ndarray, lengths: np.ndarray, without_loss: np.ndarray) -> dict[str, Block]:
    """Ids, mask and labels of sequences, each a document.

    Args:
        ids: [tokens] int32.
        lengths: [sequences] int32.
        without_loss: [tokens] bool.
    """
    labels = ids.copy()
    labels[without_loss] = IGNORED
    columns: Sequence[np.ndarray] = (ids, np.ones_like(ids), labels)
    return dict(zip(OUTPUTS, (one_each(each, lengths) for each in columns), strict=True))
