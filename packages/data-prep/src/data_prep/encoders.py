"""The two libraries behind `Tokenizer`: SentencePiece on a tokenizer.model, tokenizers on a tokenizer.json.

Neither file is ever made from the other here: converters get merges or normalisation wrong.
"""

import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.chunks import ChunkEncoder, OddChunkError, independent, space_inside
from data_prep.errors import DataError
from data_prep.hugging_face import HuggingFaceFiles
from data_prep.long_texts import LONG, pairs_of, segments


class Encoder(Protocol):
    """What `Tokenizer` asks of a library. Ids are those of the text alone: no `<s>`, no `</s>`."""

    name: str
    pieces: list[str]
    """Pieces by id, added tokens included; "" at an id that has none."""
    bos_id: int
    eos_id: int
    special_ids: frozenset[int]
    """Ids that stand for no text."""
    newline_id: int | None
    """The id that each newline is, by itself, wherever it stands; None where a piece may span one."""

    chunks: ChunkEncoder | None
    """Encodes each distinct chunk once; None where the vocabulary's chunks depend on each other."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, by the library."""

    def encode_rows(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """`encode` of each text."""

    def odd(self, texts: pa.Array) -> pa.Array:
        """[texts] bool: whether a text holds something that keeps `chunks` from encoding it."""

    @property
    def spaced_tokens(self) -> list[str]:
        """Special tokens that a cut could take apart."""

    def decode(self, ids: Sequence[int], *, continues: bool) -> str:
        """Text of ids of the vocabulary, none of them special.

        A piece at the beginning of a text carries a space that is no part of it; where the ids continue a text
        (`continues`), that space is kept.
        """


class SentencePieceEncoder:
    """SentencePiece, on each stretch of the text between literal special tokens.

    Special are the model's control and unknown pieces, and what the Hugging Face files beside it add to them: added
    tokens match literally, the longest first, before SentencePiece sees the text, as Hugging Face's tokenizers do it.
    Added tokens that the model has as pieces of its own (user-defined symbols) stay SentencePiece's.

    Args:
        file: tokenizer.model.
        folder: Where Hugging Face's files lie; None if the model stands by itself.
        special_tokens: Whether special tokens that stand in a text are tokens, or text as any other.

    Raises:
        DataError: The file is broken, no LLaMA tokenizer, or the folder's files are of another vocabulary.
    """

    name = "sentencepiece"

    def __init__(self, file: Path, folder: Path | None = None, *, special_tokens: bool = True) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{file} is no SentencePiece model: {_first_line(error)}") from None
        self._size: int = self._model.get_piece_size()
        self.pieces: list[str] = self._model.id_to_piece(list(range(self._size)))
        beside = HuggingFaceFiles(folder) if folder else None
        added = beside.added_tokens if beside else {}
        if beside:
            beside.check_vocabulary(self.pieces)
        self._added = {token: id for token, (id, _) in added.items() if id >= self._size}
        self.pieces += [""] * (max(self._added.values(), default=-1) + 1 - self._size)
        for token, id in self._added.items():
            self.pieces[id] = token
        controls = [i for i in range(self._size) if self._model.is_control(i) or self._model.is_unknown(i)]
        self.special_ids = frozenset([*controls, *(id for id, special in added.values() if special)])
        names = beside.special_names if beside else {}
        self.bos_id = _id_of(self.pieces, names.get("bos_token"), self._model.bos_id(), file)
        self.eos_id = _id_of(self.pieces, names.get("eos_token"), self._model.eos_id(), file)
        self._literal = {self.pieces[i]: i for i in controls} | self._added if special_tokens else {}
        self._split = _any_of(self._literal)
        self.newline_id = self._newline_id()
        self.chunks: ChunkEncoder | None = None
        if independent(self._model.serialized_model_proto(), self.pieces[: self._size]):
            self.chunks = ChunkEncoder(
                self._rows, self.pieces.index("▁"), self.newline_id is not None, ["▁", *self._literal]
            )

    def _newline_id(self) -> int | None:
        if any("\n" in piece and piece != "\n" for piece in self.pieces):
            return None
        id = self._model.encode("\n")[-1:]
        alone = id and self.pieces[id[0]] in ("\n", "<0x0A>")
        return int(id[0]) if alone and self._model.encode("a\n\nb").count(id[0]) == 2 else None

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        return _anchor(self.pieces, self._model.decode)

    def _rows(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        rows: Sequence[np.ndarray] = self._model.encode(texts, num_threads=1, return_type="numpy")
        return rows

    def encode_rows(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """`encode` of each text."""
        if max(map(len, texts), default=0) > LONG or (self._literal and any(map(self._split.search, texts))):
            return [self._array(text) for text in texts]
        return self._rows(texts)

    def _array(self, text: str) -> np.ndarray:
        """`encode`, as int32."""
        if len(text) <= LONG:
            return np.array(self.encode(text), np.int32)
        parts = [np.empty(0, np.int32)]
        for stretch in self._split.split(text):
            if stretch in self._literal:
                parts.append(np.array([self._literal[stretch]], np.int32))
            elif len(stretch) > LONG and self._may_be_cut:
                parts += (self._segment(segment)[drop:] for segment, drop in segments(stretch, self._pairs))
            elif stretch:
                parts += self._rows([stretch])
        return np.concatenate(parts)

    def _segment(self, segment: str) -> np.ndarray:
        """Ids of a stretch without special tokens."""
        assert self.chunks is not None
        try:
            done = self.chunks.encode(pa.array([segment], pa.string()))
        except OddChunkError:
            done = None
        return done.ids if done else self._rows([segment])[0]

    @property
    def _may_be_cut(self) -> bool:
        """Anywhere between neighbours that no piece holds: unknown characters are bytes, each by itself."""
        return self.chunks is not None and self.newline_id is not None and "<0x0A>" in self.pieces

    @cached_property
    def _pairs(self) -> frozenset[str]:
        return pairs_of(self.pieces)

    def odd(self, texts: pa.Array) -> pa.Array:
        """[texts] bool: special tokens, and `▁` itself, which is a space to the model."""
        return holds(texts, ["▁", *self._literal])

    @property
    def spaced_tokens(self) -> list[str]:
        """Special tokens that a cut could take apart."""
        return [token for token in self._literal if " " in token or "\n" in token]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        if len(text) > LONG:
            whole: list[int] = self._array(text).tolist()
            return whole
        ids: list[int] = []
        for stretch in self._split.split(text):
            if stretch in self._literal:
                ids.append(self._literal[stretch])
            elif stretch:
                ids += self._model.encode(stretch)
        return ids

    def decode(self, ids: Sequence[int], *, continues: bool) -> str:
        """Text of `ids`."""
        text = ""
        for own, run in groupby(ids, lambda id: id < self._size):
            if not own:  # the model has no such pieces: they are added tokens
                text += "".join(self.pieces[id] for id in run)
                continue
            before, skip = self._anchor if continues and not text else ([], "")
            text += self._model.decode([*before, *run])[len(skip) :]
        return text


class TokenizersEncoder:
    """The tokenizers library on a tokenizer.json, as the file says.

    Args:
        file: tokenizer.json.
        special_tokens: Whether special tokens that stand in a text are tokens, or text as any other.

    Raises:
        DataError: The file is broken, or no LLaMA tokenizer.
    """

    name = "tokenizers"
    newline_id: int | None = None  # its normalizers and pre-tokenizers may do anything

    def __init__(self, file: Path, *, special_tokens: bool = True) -> None:
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{file} is no tokenizer: {_first_line(error)}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not special_tokens
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
        for piece, id in vocabulary.items():
            self.pieces[id] = piece
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._literal = [token.content for token in added.values()]
        self.chunks: ChunkEncoder | None = None
        if "▁" in vocabulary and _is_llamas(json.loads(self._tokenizer.to_str()), self.pieces):
            self.chunks = ChunkEncoder(self.encode_rows, vocabulary["▁"], False, ["▁", *self._literal])
        names = HuggingFaceFiles(file.parent).special_names
        self.bos_id = _id_of(self.pieces, names.get("bos_token", "<s>"), -1, file)
        self.eos_id = _id_of(self.pieces, names.get("eos_token", "</s>"), -1, file)

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        return _anchor(self.pieces, self._tokenizer.decode)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_rows(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """`encode` of each text."""
        rows = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(row.ids, np.int32) for row in rows]

    def odd(self, texts: pa.Array) -> pa.Array:
        """[texts] bool: added tokens, and `▁` itself, which is a space to the model."""
        return holds(texts, ["▁", *self._literal])

    @property
    def spaced_tokens(self) -> list[str]:
        """Special tokens that a cut could take apart."""
        return [token for token in self._literal if " " in token or "\n" in token]

    def decode(self, ids: Sequence[int], *, continues: bool) -> str:
        """Text of `ids`."""
        before, skip = self._anchor if continues else ([], "")
        return str(self._tokenizer.decode([*before, *ids], skip_special_tokens=False))[len(skip) :]


def _is_llamas(content: dict[str, Any], pieces: Sequence[str]) -> bool:
    """Whether a tokenizer.json is SentencePiece's BPE once more, whose texts may be cut before each run of spaces."""
    steps = (content.get("normalizer") or {}).get("normalizers", [])
    prepend_and_replace = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    model = content["model"]
    plain = model.get("type") == "BPE" and not model.get("dropout") and not model.get("ignore_merges")
    whole = steps == prepend_and_replace and content.get("pre_tokenizer") is None
    return plain and whole and not space_inside(pieces)


def _id_of(pieces: Sequence[str], name: str | None, default: int, file: Path) -> int:
    """The id of the token called `name`, else the default one."""
    if name in pieces:
        return pieces.index(name)
    if default < 0:
        raise DataError(f"{file} has no <s> or no </s>: it is no LLaMA tokenizer")
    return default


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Finds each of `tokens`, the longest first; of none, nothing."""
    if not tokens:
        return re.compile("((?!))")
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def holds(texts: pa.Array, tokens: Sequence[str]) -> pa.Array:
    """[texts] bool: whether a text holds any of `tokens`. What none holds is looked for once, in all of them."""
    content = memoryview(texts.buffers()[2] or b"")
    there = [token for token in tokens if re.search(re.escape(token.encode()), content)]
    found = pa.array(np.zeros(len(texts), bool))
    for token in there:
        found = pc.or_(found, pc.match_substring(texts, token))
    return found


def _anchor(pieces: Sequence[str], decode: Any) -> tuple[list[int], str]:
    """A piece to put before ids that continue a text, and its own text: what follows it keeps its space."""
    for id, piece in enumerate(pieces):
        if piece.strip("▁").isalnum():
            return [id], str(decode([id]))
    return [], ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
