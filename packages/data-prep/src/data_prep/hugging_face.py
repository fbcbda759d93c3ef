"""What the JSON files of a Hugging Face folder say of its tokenizer, besides the pieces of a tokenizer.model."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.errors import DataError


@dataclass(frozen=True)
class HuggingFaceFiles:
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
