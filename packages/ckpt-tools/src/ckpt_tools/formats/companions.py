"""The files beside the weights, which travel with a model whatever its format, and where they are looked for."""

from pathlib import Path

from ckpt_tools.config import LlamaConfig

TRACKER = "latest_checkpointed_iteration.txt"
"""The file of a Megatron folder that names its latest checkpoint."""

LATEST = "latest"
"""The like of a DeepSpeed folder."""

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def homes(folder: Path) -> tuple[Path, ...]:
    """Where the files that belong to `folder`'s weights may lie: there, or beside the tracker that names it."""
    parent = folder.absolute().parent
    tracked = any((parent / tracker).is_file() for tracker in (TRACKER, LATEST))
    return (folder, parent) if tracked else (folder,)


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer's files, from the first home that has any."""
    for home in homes(folder):
        found = tuple(home / name for name in TOKENIZER_FILES if (home / name).is_file())
        if found:
            return found
    return ()


def generation_config(folder: Path) -> tuple[Path, ...]:
    """The settings for generation, if there are any: none or one file."""
    return tuple(home / GENERATION_CONFIG for home in homes(folder) if (home / GENERATION_CONFIG).is_file())[:1]


def stated_config(folder: Path) -> LlamaConfig | None:
    """The architecture that a config.json beside the weights states, if there is one."""
    for home in homes(folder):
        if (home / CONFIG).is_file():
            return LlamaConfig.from_hf(home)
    return None
