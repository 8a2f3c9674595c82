"""Retired words do not come back: each has a plain replacement (see also docs/glossary.md)."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".py", ".md", ".sh", ".html")
# Regular expression (case-insensitive): its replacement, a text that it must find, and one that it must not.
RETIRED = {
    r"\bover(see|sees|seer|seers|seeing|saw|seen)\b": ("supervise", "an Overseer", "sent overseas"),
    r"\bdoom(s|ed)?\b": ("stale", "a doomed file", "in the dome"),
    r"\bvouch(es|ed|ing)?\b": ("validate", "a hash vouches for it", "a voucher"),
    r"\bheard\b": ("captured", "what it heard", "a herd, hear"),
    r"\bears?\b": ("name what listens or captures", "all ears", "years, bears, an earlier one"),
    r"\bconspirac(y|ies)\b": ("name the condition", "but by a conspiracy", "conspicuous"),
    r"\bto[ _-]and[ _-]fro\b": ("ping-pong", "played to and fro", "weights to and from a folder"),
    r"('s|s') business\b": ("name who does it", "a batch's business", "business hours"),
}
_ANY = re.compile("|".join(RETIRED), re.IGNORECASE)


def find_retired(text: str) -> list[str]:
    """`line: word (write REPLACEMENT)` of each retired word."""
    found: list[str] = []
    if not _ANY.search(text):
        return found
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, (replacement, *_) in RETIRED.items():
            for match in re.finditer(pattern, line, re.IGNORECASE):
                found.append(f"{number}: {match.group()} (write: {replacement})")
    return found


def test_no_tracked_file_has_a_retired_word():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name.endswith(SUFFIXES)]
    paths = [path for path in paths if path.is_file() and path != Path(__file__).resolve()]
    assert len(paths) > 200
    found = []
    for path in paths:
        for line in find_retired(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(ROOT)}:{line}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("pattern", RETIRED)
def test_each_pattern_finds_its_word_and_no_other(pattern):
    _, retired, allowed = RETIRED[pattern]
    assert len(find_retired(retired)) == 1 and re.search(pattern, retired, re.IGNORECASE)
    assert find_retired(allowed) == []
