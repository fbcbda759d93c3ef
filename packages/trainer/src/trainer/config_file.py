"""Options in YAML: read, checked and written. A flag wins over the file of `--config`, the file over the default.

The resolved configuration is written into the run's folder and is itself a valid `--config`.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from trainer.config import PTD_ONLY, ZERO_ONLY, TrainConfig, flag
from trainer.errors import ConfigError
from trainer.run import locate

ONCE = ("overwrite", "override_opt_param_scheduler")
"""Options that allow something once, and are not written into a run's config.yaml."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The options that a YAML file gives, each of its field's type. A file may give some and leave others to flags.

    Raises:
        ConfigError: No such file, no mapping, an unknown key (with the nearest known one), or a value of another type.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{error.strerror}: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of option names to values, not a {type(content).__name__}")
    types = get_type_hints(TrainConfig)
    options = {}
    for key, value in content.items():
        name = _known(str(key), path)
        try:
            options[name] = _structured(name, value, types[name])
        except Exception as error:
            raise ConfigError(f"{path}: {key}: {value!r} does not fit: {_reason(error)}") from None
    return options


def _structured(name: str, value: Any, kind: Any) -> Any:
    """A value of YAML as the field's type."""
    import cattrs

    if name == "data_path":
        parts = value if isinstance(value, list) else [value]
        return tuple(float(part) if isinstance(part, int | float) else Path(part) for part in parts)
    converter = cattrs.Converter()
    converter.register_structure_hook(bool, _strict_bool)
    converter.register_structure_hook(int, _strict_int)
    return converter.structure(value, kind)


def _strict_bool(value: Any, _: Any) -> bool:
    if not isinstance(value, bool):  # bool("no") would be True
        raise ValueError("expected true or false")
    return value


def _strict_int(value: Any, _: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):  # int(1.5) would be 1
        raise ValueError("expected a whole number")
    return int(value)


def _reason(error: Exception) -> str:
    nested = getattr(error, "exceptions", None)
    return _reason(nested[0]) if nested else str(error)


def _known(key: str, path: Path) -> str:
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    name = key.replace("-", "_")
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1)
    raise ConfigError(f"{path}: unknown option {key!r}" + (f"; perhaps you meant {near[0]!r}" if near else ""))


def write_yaml(config: TrainConfig, path: Path, began: Mapping[str, Any] | None = None) -> None:
    """Writes `config` so that `read_yaml` gives it back, paths made absolute and the schedule's length stated.

    `began` are options to be written instead of its own: what the run began from, where it is gone on with.
    """
    import yaml

    options = dataclasses.asdict(config) | {"lr_decay_iters": config.decay_iters} | dict(began or {})
    plain = {name: _plain(value) for name, value in options.items() if value is not None and name not in ONCE}
    path.write_text(yaml.safe_dump(plain, sort_keys=False), "utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def options_of_run(resume: Path, mode: str | None = None) -> dict[str, Any]:
    """What the run to be resumed was given, in its own folder: what options default to without `--config`.

    Args:
        resume: RUN, or one of its `iter_…` folders.
        mode: The mode to go on in; options that only another one has are left out. None: the run's own.

    Raises:
        TrainerError: There is no run.
        ConfigError: Its config.yaml is missing, damaged, or of another version.
    """
    run, _ = locate(resume)
    options = read_yaml(run.config_file) | {"output_dir": run.path}
    not_here = {"ptd": ZERO_ONLY, "zero": PTD_ONLY}.get(mode or "", ())
    return {name: value for name, value in options.items() if name not in not_here}


def without_restated_flags(arguments: Sequence[str], default: TrainConfig) -> list[str]:
    """The arguments without switches that say what `default` says: the parser knows only the one that changes it."""
    restated = set()
    for field in dataclasses.fields(TrainConfig):
        value = getattr(default, field.name)
        if isinstance(value, bool):
            restated.add(flag(field.name if value else f"no_{field.name}"))
    return [argument for argument in arguments if flag(argument.removeprefix("--")) not in restated]


def partial_default(options: Mapping[str, Any]) -> TrainConfig:
    """A default for the command line in which `options` hold and every field without a value is still to be given.

    It is no valid configuration: `__post_init__` runs on the one that the parser makes from it.
    """
    default = object.__new__(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        fallback = tyro.MISSING if field.default is dataclasses.MISSING else field.default
        object.__setattr__(default, field.name, options.get(field.name, fallback))
    return default


Options = Annotated[TrainConfig, tyro.conf.arg(name="")]
"""`TrainConfig` as a parameter of a command: its fields become flags without a prefix."""
