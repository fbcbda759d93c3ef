"""The tokenizer of a model, checked against it; no torch."""

from pathlib import Path

from ckpt_tools import open_checkpoint
from data_prep import Tokenizer

from llama_model.errors import ModelError


def load_tokenizer(path: str | Path, tokenizer_name_or_path: str | Path | None = None) -> Tokenizer:
    """The tokenizer in the folder of the model at `path`, or the named one where it has the model's vocabulary.

    Args:
        path: A Hugging Face folder, a Megatron checkpoint, or a training run (its latest checkpoint).
        tokenizer_name_or_path: A tokenizer's folder or file; the model's own unless given.

    Raises:
        CheckpointError: There is no checkpoint at `path`.
        DataError: There is no tokenizer, or a broken one.
        ModelError: The tokenizer is another model's: it has more pieces than the model has rows, or another vocabulary
            than the model's own.
    """
    with open_checkpoint(path) as checkpoint:
        rows, has_own = checkpoint.config.vocab_size, bool(checkpoint.tokenizer_files)
    tokenizer = Tokenizer.find(path, tokenizer_name_or_path)
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, {path} only {rows}: it is not its tokenizer"
        )
    if tokenizer_name_or_path is not None and has_own:
        own = Tokenizer.find(path)
        if own.vocab_sha256 != tokenizer.vocab_sha256:
            raise ModelError(
                f"{tokenizer.path} has another vocabulary (sha256 {tokenizer.vocab_sha256[:12]}) than the tokenizer in "
                f"{path} ({own.vocab_sha256[:12]}): leave --tokenizer-name-or-path out"
            )
    return tokenizer
