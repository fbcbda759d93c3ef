"""What can be checked of the data before anything is built."""

from pathlib import Path

import numpy as np
from data_prep import IndexedDataset, read_manifest

from trainer.config import TrainConfig
from trainer.errors import ConfigError


def data_files(config: TrainConfig, kind: str) -> list[Path]:
    """The full prefixes that a run of `kind` ("pretrain" or "finetune") reads.

    Raises:
        ConfigError: One of their files is missing; the message names it and says how to make it. Or fine-tuning is to
            blend several data sets.
    """
    if kind == "finetune":
        if len(config.blend) > 1:
            raise ConfigError(f"--data-path names {len(config.blend)} data sets: fine-tuning reads one (merge them)")
        prefixes = list(instruction_files(config.blend[0][1]).values())
        fix = "data-prep run --handler-name GeneralInstructionHandler"
    else:
        prefixes, fix = [pretraining_prefix(prefix) for _, prefix in config.blend], "data-prep run"
    for prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if not (file := _file(prefix, suffix)).exists():
                raise ConfigError(f"no such data set: {file} (of --data-path; make it with `{fix}`)")
    return prefixes


def pretraining_prefix(path: Path) -> Path:
    """`P` means `P_text_document`, the data set of data-prep's default key."""
    full = path.with_name(f"{path.name}_text_document")
    return full if not _file(path, ".idx").exists() and _file(full, ".idx").exists() else path


def instruction_files(prefix: Path) -> dict[str, Path]:
    """The full prefix of each key of an instruction data set; `attention_mask` where it has one, or has to."""
    keys = {key: prefix.with_name(f"{prefix.name}_packed_{key}_document") for key in ("input_ids", "labels")}
    mask = prefix.with_name(f"{prefix.name}_packed_attention_mask_document")
    manifest = read_manifest(keys["input_ids"])
    is_packed = manifest is not None and "pack_length" in manifest.options
    return keys | ({"attention_mask": mask} if is_packed or _file(mask, ".idx").exists() else {})


def num_valid(config: TrainConfig) -> int:
    """Samples of a validation, the same ones each time; 0 where there is none."""
    has_share = float(config.split.split(",")[1]) > 0
    return config.eval_iters * config.global_batch_size if has_share else 0


def check_split(config: TrainConfig, prefix: Path) -> None:
    """Refuses a share of the text data set `prefix` without a token: megatron-core would count its epochs for ever.

    Raises:
        ConfigError: Training, or validation where it is asked for, would read such a share.
    """
    lengths = IndexedDataset(prefix).sequence_lengths
    shares = np.array(config.split.split(","), float)
    train, valid, _ = (round(border * len(lengths)) for border in np.cumsum(shares / shares.sum()))  # as megatron-core
    if not lengths[:train].any():
        kind, way_out = "training", "give it a larger share"
    elif num_valid(config) and not lengths[train:valid].any():
        kind, way_out = "validation", "give it a larger share, or 0 and no validation"
    else:
        return
    raise ConfigError(
        f"--split {config.split} leaves no text for {kind} of the {len(lengths)} documents of {prefix}: {way_out}"
    )


def check_vocabulary(prefix: Path, vocab_size: int, vocab_sha256: str | None) -> str | None:
    """Refuses a data set whose vocabulary differs from the model's; where one side names none, the warning to show.

    Raises:
        ConfigError: The fingerprints (`vocab_sha256` of data-prep's manifest) differ; both are named.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return f"{prefix} has no manifest (foreign data): its vocabulary cannot be compared with the model's"
    if vocab_sha256 is None:
        return f"the model has no tokenizer files: the vocabulary of {prefix} cannot be compared with the model's"
    if manifest.vocab_sha256 != vocab_sha256:
        raise ConfigError(
            f"the data set {prefix} was made with another vocabulary ({manifest.vocab_size} pieces, sha256 "
            f"{manifest.vocab_sha256[:12]}) than the model's ({vocab_size} rows, sha256 {vocab_sha256[:12]}): "
            "tokenize it with the model's own tokenizer"
        )
    return None


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
