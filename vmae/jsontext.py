"""JSON and YAML that others wrote: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100  # the parsers, `repr` and `==` all recurse; what this project reads is at most 6 deep


def parse_json(text: str) -> Any:
    """`json.loads`; raises ValueError also for lists in lists in lists."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raises ValueError where containers are nested more than `MAX_DEPTH` deep, or contain themselves."""
    level = [value]
    for _ in range(MAX_DEPTH):
        seen: dict[int, Any] = {}  # each container once a level: YAML's aliases can name one a billion times
        for one in level:
            if isinstance(one, (dict, list)):
                seen[id(one)] = one
        if not seen:
            return
        level = [part for one in seen.values() for part in (one.values() if isinstance(one, dict) else one)]
    raise ValueError("it is nested too deeply")
