"""The files beside the weights: the tokenizer's, which travel with a model whatever its format."""

from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
GENERATION_CONFIG = "generation_config.json"


def tokenizer_files(*folders: Path) -> tuple[Path, ...]:
    """The tokenizer's files in the first of the folders that has any."""
    for folder in folders:
        found = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
        if found:
            return found
    return ()
