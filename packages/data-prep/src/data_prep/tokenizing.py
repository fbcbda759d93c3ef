"""The one place that turns text into ids and back.

A LLaMA's ids are SentencePiece's: where a folder has tokenizer.model, that is what encodes, on each stretch of the text
between literal special tokens (`<s>`, `</s>`, `<unk>`), which become their own ids as Hugging Face's tokenizers have
it. A folder with tokenizer.json alone is encoded by the tokenizers library. Neither file is ever made from the other
here: converters get merges or normalisation wrong.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from data_prep.errors import DataError

_TRACKER = "latest_checkpointed_iteration.txt"
_FILES = ("tokenizer.model", "tokenizer.json")


class _Encoder(Protocol):
    bos_id: int
    eos_id: int
    vocab_size: int
    name: str

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def pieces(self) -> list[str]: ...


class Tokenizer:
    """A tokenizer from a Hugging Face folder, a SentencePiece `.model`, or a tokenizer.json.

    Raises:
        DataError: There is none, or its file is broken.
    """

    def __init__(self, path: str | Path) -> None:
        file = _file_of(Path(path))
        self.path = file
        self._encoder: _Encoder = _SentencePiece(file) if file.suffix == ".model" else _TokenizersJson(file)
        self.encoder = self._encoder.name
        self.bos_id, self.eos_id = self._encoder.bos_id, self._encoder.eos_id
        self.vocab_size = self._encoder.vocab_size

    @classmethod
    def find(cls, model: str | Path, tokenizer_name_or_path: str | Path | None = None) -> "Tokenizer":
        """The tokenizer of a MODEL folder (a run's or a Megatron checkpoint's too), or the one that is named.

        Raises:
            DataError: The folder holds none, and none is named.
        """
        if tokenizer_name_or_path is not None:
            return cls(tokenizer_name_or_path)
        for folder in _places(Path(model)):
            if any((folder / name).exists() for name in _FILES):
                return cls(folder)
        raise DataError(f"{model} holds no tokenizer: give --tokenizer-name-or-path")

    @property
    def vocab_sha256(self) -> str:
        """Fingerprint of the vocabulary: sha256 of the JSON list of all pieces in the order of their ids."""
        text = json.dumps(self._encoder.pieces(), ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Ids of `text`, `<s>` before and `</s>` behind it where asked."""
        return [self.bos_id] * bos + self._encoder.encode(text) + [self.eos_id] * eos

    def encode_batch(self, texts: Iterable[str], *, bos: bool = True, eos: bool = False) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text, bos=bos, eos=eos) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self._encoder.decode(ids)


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    if not path.exists():
        raise DataError(f"no such tokenizer: {path}")
    raise DataError(f"{path} holds no tokenizer: neither tokenizer.model nor tokenizer.json")


def _places(model: Path) -> list[Path]:
    """Where a MODEL's tokenizer may lie: in it, in its latest checkpoint, or beside a checkpoint of it."""
    places = [model]
    for root in (model / "checkpoints", model):
        if (root / _TRACKER).is_file():
            name = (root / _TRACKER).read_text("utf-8").strip()
            places.append(root / (f"iter_{int(name):07d}" if name.isdigit() else "release"))
    return [*places, model.parent] if model.name.startswith(("iter_", "release")) else places


class _SentencePiece:
    """SentencePiece's own encoder, and the literal special tokens that Hugging Face's tokenizers add to it."""

    name = "sentencepiece"

    def __init__(self, file: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{file} is no SentencePiece model: {str(error).splitlines()[0][:120]}") from None
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(f"{file} has no <s> or no </s>: it is no LLaMA tokenizer")
        self.vocab_size = self._model.get_piece_size()
        special = [i for i in range(self.vocab_size) if self._model.is_control(i) or self._model.is_unknown(i)]
        self._special = {self._model.id_to_piece(i): i for i in special}
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    def encode(self, text: str) -> list[int]:
        if "<" not in text:
            return list(self._model.encode(text))
        ids: list[int] = []
        for stretch in self._split.split(text):
            if stretch in self._special:
                ids.append(self._special[stretch])
            elif stretch:
                ids += self._model.encode(stretch)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self._special.values())
        return str(self._model.decode([int(i) for i in ids if int(i) not in special and 0 <= int(i) < self.vocab_size]))

    def pieces(self) -> list[str]:
        return [self._model.id_to_piece(i) for i in range(self.vocab_size)]


class _TokenizersJson:
    """The tokenizers library on a tokenizer.json."""

    name = "tokenizers"

    def __init__(self, file: Path) -> None:
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{file} is no tokenizer: {str(error).splitlines()[0][:120]}") from None
        bos, eos = (self._tokenizer.token_to_id(name) for name in ("<s>", "</s>"))
        if bos is None or eos is None:
            raise DataError(f"{file} has no <s> or no </s>: it is no LLaMA tokenizer")
        self.bos_id, self.eos_id = bos, eos
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def pieces(self) -> list[str]:
        return [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
