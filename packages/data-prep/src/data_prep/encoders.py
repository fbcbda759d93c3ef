"""The two libraries behind `Tokenizer`: SentencePiece on a tokenizer.model, tokenizers on a tokenizer.json.

Neither file is ever made from the other here: converters get merges or normalisation wrong.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from data_prep.errors import DataError


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

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""

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

    Raises:
        DataError: The file is broken, no LLaMA tokenizer, or the folder's files are of another vocabulary.
    """

    name = "sentencepiece"

    def __init__(self, file: Path, folder: Path | None = None) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{file} is no SentencePiece model: {_first_line(error)}") from None
        self._size: int = self._model.get_piece_size()
        self.pieces = [self._model.id_to_piece(i) for i in range(self._size)]
        beside = _HuggingFaceFiles(folder) if folder else None
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
        self._literal = {self.pieces[i]: i for i in controls} | self._added
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self._literal, key=len, reverse=True))) + ")")
        self.newline_id = self._newline_id()

    def _newline_id(self) -> int | None:
        if any("\n" in piece and piece != "\n" for piece in self.pieces):
            return None
        id = self._model.encode("\n")[-1:]
        alone = id and self.pieces[id[0]] in ("\n", "<0x0A>")
        return int(id[0]) if alone and self._model.encode("a\n\nb").count(id[0]) == 2 else None

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        return _anchor(self.pieces, self._model.decode)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
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

    Raises:
        DataError: The file is broken, or no LLaMA tokenizer.
    """

    name = "tokenizers"
    newline_id: int | None = None  # its normalizers and pre-tokenizers may do anything

    def __init__(self, file: Path) -> None:
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{file} is no tokenizer: {_first_line(error)}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
        for piece, id in vocabulary.items():
            self.pieces[id] = piece
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        names = _HuggingFaceFiles(file.parent).special_names
        self.bos_id = _id_of(self.pieces, names.get("bos_token", "<s>"), -1, file)
        self.eos_id = _id_of(self.pieces, names.get("eos_token", "</s>"), -1, file)

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        return _anchor(self.pieces, self._tokenizer.decode)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, continues: bool) -> str:
        """Text of `ids`."""
        before, skip = self._anchor if continues else ([], "")
        return str(self._tokenizer.decode([*before, *ids], skip_special_tokens=False))[len(skip) :]


@dataclass(frozen=True)
class _HuggingFaceFiles:
    """What the JSON files of a Hugging Face folder say besides the pieces."""

    folder: Path

    @cached_property
    def added_tokens(self) -> dict[str, tuple[int, bool]]:
        """Token to (id, whether it stands for no text), from whichever file names it."""
        return {token: (id, special) for token, id, special in self._added_tokens()}

    def _added_tokens(self) -> Iterator[tuple[str, int, bool]]:
        for token, id in self._read("added_tokens.json").items():
            yield token, int(id), False
        for id, entry in self._read("tokenizer_config.json").get("added_tokens_decoder", {}).items():
            yield entry["content"], int(id), bool(entry.get("special"))
        for entry in self._read("tokenizer.json").get("added_tokens", []):
            yield entry["content"], int(entry["id"]), bool(entry.get("special"))

    @cached_property
    def special_names(self) -> dict[str, str]:
        """The tokens that tokenizer_config.json names as bos_token and eos_token."""
        names = {}
        for role in ("bos_token", "eos_token"):
            token = self._read("tokenizer_config.json").get(role)
            if token:
                names[role] = token["content"] if isinstance(token, dict) else token
        return names

    def check_vocabulary(self, pieces: Sequence[str]) -> None:
        """Raises a DataError where these files give an id of the SentencePiece model to another piece."""
        claims = {token: id for token, (id, _) in self.added_tokens.items()}
        claims |= self._read("tokenizer.json").get("model", {}).get("vocab", {})
        known = dict(zip(pieces, range(len(pieces)), strict=True))
        for piece, id in claims.items():
            if (id < len(pieces) and pieces[id] != piece) or known.get(piece, id) != id:
                theirs = pieces[id] if id < len(pieces) else "none"
                raise DataError(
                    f"{self.folder}: tokenizer.model and the JSON files beside it are of two vocabularies: id {id} is "
                    f"{theirs!r} in the one and {piece!r} in the other; name the right file instead of the folder"
                )

    def _read(self, name: str) -> dict[str, Any]:
        if name not in self._contents:
            file = self.folder / name
            try:
                content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{file} is not JSON: {error}") from None
            self._contents[name] = content if isinstance(content, dict) else {}
        return self._contents[name]

    @cached_property
    def _contents(self) -> dict[str, dict[str, Any]]:
        return {}


def _id_of(pieces: Sequence[str], name: str | None, default: int, file: Path) -> int:
    """The id of the token called `name`, else the default one."""
    if name in pieces:
        return pieces.index(name)
    if default < 0:
        raise DataError(f"{file} has no <s> or no </s>: it is no LLaMA tokenizer")
    return default


def _anchor(pieces: Sequence[str], decode: Any) -> tuple[list[int], str]:
    """A piece to put before ids that continue a text, and its own text: what follows it keeps its space."""
    for id, piece in enumerate(pieces):
        if piece.strip("▁").isalnum():
            return [id], str(decode([id]))
    return [], ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
