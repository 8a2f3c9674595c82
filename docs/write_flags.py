"""Writes the table of published flags in docs/compatibility.md, from the settings and the other flags."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from vmae.cli import SETTINGS
from vmae.flags import Settings
from vmae.train.published_flags import WORDS

PAGE = Path(__file__).with_name("compatibility.md")
FACTS = Path(__file__).parents[1] / "tests" / "data" / "published_flags.json"
BEGIN, END = "<!-- flags: made by docs/write_flags.py -->\n", "<!-- end of flags -->\n"
COMMAND_OF = {"run_mae_pretraining.py": "pretrain", "run_class_finetuning.py": "finetune"}


def table() -> str:
    """One row for each flag of the programs: the commands that take it, and what it does."""
    settings = {name: importlib.import_module(SETTINGS[name]).SETTINGS for name in COMMAND_OF.values()}
    rows: dict[str, dict[str, str]] = {}
    for program, facts in json.loads(FACTS.read_text(encoding="utf-8")).items():
        commands = [command for name, command in COMMAND_OF.items() if name in program] or list(settings)
        for flag in (*facts["values"], *facts["switches"]):
            for command in commands:
                rows.setdefault(flag, {})[command] = does(flag, settings[command])
    lines = ["| flag | command | what it does |", "|---|---|---|"]
    for flag, told in sorted(rows.items()):
        for text in dict.fromkeys(told.values()):
            own = ", ".join(command for command, other in told.items() if other == text)
            lines.append(f"| `{flag}` | {own} | {text} |")
    return "\n".join(lines) + "\n"


def does(flag: str, settings: Settings) -> str:
    """What a flag does in a command."""
    if flag in settings.others:
        return WORDS.get(flag, settings.others[flag].does)
    for key in settings.keys.values():
        if flag in key.flags:
            own = "" if key.flags[0] == flag else f"`{key.flags[0]}`: "
            return own + (key.about.help or "").replace("|", "or")
        for flags, value, _ in key.about.constants:
            if flag in flags:
                return f"`{key.flags[0]} {value}`" if value is not None else f"`{flags[0]}`"
    return "not accepted yet"


def page() -> str:
    """docs/compatibility.md with the table as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
