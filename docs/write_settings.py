"""Writes docs/settings.md, the table of all settings of training, from the fields that hold them."""

from __future__ import annotations

import importlib
from pathlib import Path

from vmae.cli import SETTINGS
from vmae.flags import Key

PAGE = Path(__file__).with_name("settings.md")
HEAD = """\
# Settings of training

Made by `python docs/write_settings.py` from the fields of the configurations; do not edit it.

A setting is a flag (`--image-size 224`) and a key of a settings file (`image_size: 224`). Every training
command and `plan` read such a file, flat YAML:

<!-- run -->
```bash
python -m vmae plan --config recipes/pretrain_vitb.yaml --gpus 1 --memory 24GiB
```

Later layers win: defaults, then the model's preset or the checkpoint, then the file, then flags. Keys are
the flags' names with `_` for `-`; the published code's names, in the last column, work as well. Relative
paths start at the working directory, in a file too.

A run writes its settings, resolved, to `config.yaml` in its folder. `vmae pretrain --config
runs/b/config.yaml` goes on with that run; with `--output runs/c` it repeats it, loss by loss.
`effective_batch` stands there instead of `accumulate`, so the same file serves any number of GPUs that
divide it.
"""


def page() -> str:
    """The page, in Markdown."""
    commands = {name: importlib.import_module(module).SETTINGS.keys for name, module in SETTINGS.items()}
    found: dict[str, dict[tuple[str, str | None], dict[str, Key]]] = {}
    for command, keys in commands.items():
        for key in keys.values():
            if not key.about.hidden:  # one row for the same words
                found.setdefault(key.group, {}).setdefault((key.name, key.about.help), {})[command] = key
    lines = [HEAD]
    for group, settings in found.items():
        lines += [f"## {group[0].upper()}{group[1:]}", ""]
        lines += ["| key | what it is | default | values | of | other names |", "|---|---|---|---|---|---|"]
        lines += [_row(of, len(commands)) for of in settings.values()]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _row(of: dict[str, Key], commands: int) -> str:
    """One setting, in the commands that have it."""
    key = next(iter(of.values()))
    defaults: dict[str, list[str]] = {}
    for command, own in of.items():
        defaults.setdefault(own.shown_default or "-", []).append(command)
    default = "; ".join(f"{', '.join(names)}: {words}" for words, names in defaults.items())
    if len(defaults) == 1:
        default = next(iter(defaults))
    values = str(key.type or ("true, false" if key.is_switch else "text"))
    others = [flag for flag in key.about.aliases if flag.strip("-") != key.name]
    others += [flag for flags, _, _ in key.about.constants for flag in flags]
    where = "all" if len(of) == commands else ", ".join(of)
    shown = [f"`{key.name}`", key.about.help or "", default, values, where]
    return f"| {' | '.join([*shown, ', '.join(f'`{flag}`' for flag in others)])} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
