"""Settings files: flat YAML, `key: value` a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import check_depth

CONFIG_NAME = "config.yaml"  # of a run
HEADER = """\
# Settings of this run, resolved. The same command with `--config` and this file goes on with the run, or
# repeats it elsewhere with another `--output`. Relative paths start at the working directory.
"""


def read_yaml(path: str | Path) -> list[tuple[str, Any]]:
    """Keys and values of a YAML file, in order.

    Raises:
        InputError: it cannot be read, is no YAML, or no mapping of names.
    """
    where = f"settings file {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8")
        keys = _keys(yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
        check_depth(content)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where} is no YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return []
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{where}: expected `key: value` a line, such as `lr: 1e-3`")
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise InputError(f"{where}: {twice} is set twice")
    return list(content.items())


def _keys(node: yaml.Node | None) -> list[Any]:
    """As they stand there: loading keeps the last one of those that come twice."""
    return [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []


def write_settings(folder: Path, values: dict[str, Any]) -> None:
    """Write settings (of `Settings.resolved`) as a run's file for `--config`; none, no file."""
    if not values:
        return
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)
    write_atomically(folder / CONFIG_NAME, lambda file: file.write(HEADER + text), binary=False)
