"""The one place that turns text into ids and back.

A LLaMA's ids are SentencePiece's on each stretch of the text between literal special tokens (`<s>`, `</s>`, `<unk>`,
and what was added to the vocabulary), which become their own ids. Where a folder has tokenizer.model, SentencePiece
encodes; a folder with tokenizer.json alone is encoded by the tokenizers library as that file says.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.chunks import NO_PLACES, Counts, Encoded
from data_prep.encoders import Encoder, SentencePieceEncoder, TokenizersEncoder
from data_prep.encoding import encode_many, prefix_length
from data_prep.errors import DataError
from data_prep.templates import Part

PROBE = "  Two  spaces, 1234.5 and a tab\there;\nnaïve café, 東京, Ελλάδα, 🦙🏔️\r\n\n▁x</s>def f(x): return x<unk>"
"""A text on which encoders with the same pieces part company: spaces, digits, newlines, bytes, special tokens."""

_TRACKER = "latest_checkpointed_iteration.txt"
_FILES = ("tokenizer.model", "tokenizer.json")


class Tokenizer:
    """A tokenizer from a Hugging Face folder, a SentencePiece `.model`, or a tokenizer.json.

    Args:
        path: The folder or the file. A `.model` that is named itself stands alone: added tokens are those of a folder.
        special_tokens: Whether `</s>` and the like that stand in a text become special ids, or text as any other.

    Attributes:
        path: The file that encodes.
        encoder: The library that does it: "sentencepiece" or "tokenizers".
        bos_id: `<s>`.
        eos_id: `</s>`, or what tokenizer_config.json names as eos_token.
        vocab_size: The largest id plus one, added tokens included.

    Raises:
        DataError: There is none, or its file is broken.
    """

    def __init__(self, path: str | Path, *, special_tokens: bool = True) -> None:
        source = Path(path)
        self.path = _file_of(source)
        self._encoder: Encoder
        if self.path.suffix == ".json":
            self._encoder = TokenizersEncoder(self.path, special_tokens=special_tokens)
        else:
            folder = source if source.is_dir() else None
            self._encoder = SentencePieceEncoder(self.path, folder, special_tokens=special_tokens)
        self.encoder = self._encoder.name
        self.bos_id, self.eos_id = self._encoder.bos_id, self._encoder.eos_id
        self.vocab_size = len(self._encoder.pieces)

    @classmethod
    def find(cls, model: str | Path, tokenizer_name_or_path: str | Path | None = None) -> "Tokenizer":
        """The tokenizer of a MODEL folder (a run's or a Megatron checkpoint's too), or the one that is named.

        Raises:
            DataError: The folder holds none, and none is named.
        """
        if tokenizer_name_or_path is not None:
            return cls(tokenizer_name_or_path)
        for folder in _places(Path(model)):
            if any((folder / name).is_file() for name in _FILES):
                return cls(folder)
        raise DataError(f"{model} holds no tokenizer: give --tokenizer-name-or-path")

    @cached_property
    def vocab_sha256(self) -> str:
        """Fingerprint of the vocabulary: sha256 of the JSON list of all pieces in the order of their ids."""
        return fingerprint(self._encoder.pieces)

    @cached_property
    def probe_sha256(self) -> str:
        """Fingerprint of the segmentation: sha256 of the ids of `PROBE`, as little-endian int32."""
        return hashlib.sha256(np.array(self.encode(PROBE), "<i4").tobytes()).hexdigest()

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Ids of `text`, `<s>` before and `</s>` behind it where asked."""
        return [self.bos_id] * bos + self._encoder.encode(text) + [self.eos_id] * eos

    def encode_batch(self, texts: Iterable[str], *, bos: bool = True, eos: bool = False) -> list[list[int]]:
        """`encode` of each text."""
        ids, lengths = self.encode_flat(texts, bos=bos, eos=eos)
        ends = np.cumsum(lengths).tolist()
        return [ids[end - length : end].tolist() for end, length in zip(ends, lengths.tolist(), strict=True)]

    def encode_flat(
        self, texts: Iterable[str], *, bos: bool = True, eos: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode` of each text, one after another.

        Returns:
            ids [tokens] int32 of all texts, and lengths [texts] int32.
        """
        done = self.encode_column(pa.array(texts, pa.string()))
        return framed(done.ids, done.lengths, [self.bos_id] * bos, [self.eos_id] * eos)

    def encode_column(self, texts: pa.Array, places: np.ndarray = NO_PLACES) -> Encoded:
        """Ids of a column of texts, without `<s>` and `</s>`, each distinct chunk encoded once where that is exact.

        Args:
            texts: [texts] string, without nulls; together below 1 GiB.
            places: [texts] int64, a byte of each text; the tokens before it are counted: `len(encode(its prefix))`.
        """
        if not len(places) or (self._encoder.newline_id is not None and _behind_newlines(texts, places)):
            return encode_many(self._encoder, texts, places)
        done = encode_many(self._encoder, texts)
        prefixes = [text.as_py().encode()[:place].decode() for text, place in zip(texts, places.tolist(), strict=True)]
        return Encoded(done.ids, done.lengths, encode_many(self._encoder, pa.array(prefixes, pa.string())).lengths)

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Ids of the parts of a conversation, each encoded by itself, as training wrote them."""
        ids: list[int] = []
        for part in parts:
            ids += [self.bos_id] * part.bos + self._encoder.encode(part.text) + [self.eos_id] * part.eos
        return ids

    @property
    def counts(self) -> Counts | None:
        """How the cache of chunks does; None where this vocabulary's chunks depend on each other."""
        return self._encoder.chunks.counts if self._encoder.chunks else None

    def learnt(self, most: int) -> list[tuple[str, list[int]]]:
        """Some of the distinct words that were encoded, with their ids; none where there is no cache."""
        return self._encoder.chunks.learnt(most) if self._encoder.chunks else []

    def prefix_length(self, text: str, end: int, ids: Sequence[int] | np.ndarray) -> int:
        """`len(encode(text[:end]))`, read off the ids of the whole text where that is sure.

        Args:
            text: The whole text.
            end: Where the prefix ends, in characters.
            ids: `encode(text)`, with or without the `</s>`.
        """
        return 1 + prefix_length(self._encoder, text, end, ids[1:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens and ids that the vocabulary lacks are left out.

        Ids that begin with `<s>` are a text from its beginning. Others continue a text: a space before their first word
        is kept, so that the text of a prompt and the text of its continuation put together are the whole.
        """
        numbers = [int(id) for id in ids]
        kept = [id for id in numbers if 0 <= id < self.vocab_size and id not in self._encoder.special_ids]
        return self._encoder.decode(kept, continues=numbers[:1] != [self.bos_id])


def framed(
    ids: np.ndarray, lengths: np.ndarray, before: Sequence[int], behind: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of some texts with `before` and `behind` around those of each; ids and lengths [texts], both int32."""
    extra = len(before) + len(behind)
    wider = (lengths + extra).astype(np.int32)
    if not extra:
        return ids, wider
    ends = np.cumsum(wider, dtype=np.int64)
    out, own = np.empty(len(ids) + extra * len(lengths), np.int32), np.ones(len(ids) + extra * len(lengths), bool)
    places = [(ends - wider + at, id) for at, id in enumerate(before)]
    places += [(ends - len(behind) + at, id) for at, id in enumerate(behind)]
    for at, id in places:
        own[at], out[at] = False, id
    out[own] = ids
    return out, wider


def _behind_newlines(texts: pa.Array, places: np.ndarray) -> bool:
    """Whether each place is a byte right behind a newline of its text."""
    starts = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts)]
    if not (places > 0).all():
        return False
    return bool((np.frombuffer(texts.buffers()[2], np.uint8)[starts + places - 1] == ord("\n")).all())


def fingerprint(pieces: Sequence[str]) -> str:
    """sha256 of the UTF-8 bytes of the JSON list of `pieces`, without spaces, non-ASCII as it is."""
    return hashlib.sha256(json.dumps(pieces, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


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
