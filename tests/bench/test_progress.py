"""A benchmark shows its progress at least every half a minute; here the minute is short."""

import os
import re
import select
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = [*(ROOT / "bench").glob("*.py"), *(ROOT / "experiments").glob("*.py")]
SCRIPTS = sorted(path for path in PLACES if '__name__ == "__main__"' in path.read_text())


@pytest.fixture
def progress(benches, monkeypatch):
    module = benches("progress")
    monkeypatch.setattr(module, "EVERY_S", 0.1)
    return module


def test_the_real_interval_leaves_time_for_a_line(benches):
    assert benches("progress").EVERY_S <= 28


def test_a_long_step_is_told_again_and_again(progress, capsys):
    with progress.telling():
        time.sleep(0.25)
        progress.at("round 1 of 2")
        time.sleep(0.35)
        progress.at("round 2 of 2")
        for _ in range(8):  # nothing is said beside other lines
            progress.said()
            time.sleep(0.03)
    told = capsys.readouterr().err.splitlines()
    assert set(told) == {"  0.0 min: starting", "  0.0 min: round 1 of 2"} and 3 <= len(told) <= 6
    time.sleep(0.25)
    assert not capsys.readouterr().err  # it is over


def test_nothing_goes_on_after_an_error(progress, capsys):
    with pytest.raises(ValueError), progress.telling(), progress.telling():
        raise ValueError
    time.sleep(0.2)
    assert not capsys.readouterr().err
    with progress.telling():
        time.sleep(0.15)
    assert "starting" in capsys.readouterr().err


def test_on_a_terminal_one_line_is_rewritten(progress, monkeypatch):
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with progress.telling():
            progress.at("round 1 of 2")
            time.sleep(0.25)
            progress.at("round 2 of 2")
        shown = ""
        while select.select([ours], [], [], 0.2)[0]:
            shown += os.read(ours, 4096).decode()
    os.close(ours)
    assert re.fullmatch(r"\r  round 1 of 2\x1b\[K\r\r  round 2 of 2\x1b\[K\r\x1b\[K", shown)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_tells(script):
    text = script.read_text()
    if script.stem == "readme":  # it reads files, in no time
        return
    assert "exit_code(" in text or "with telling()" in text
    stages = ("temporal", "stage2")  # their stages tell
    assert script.stem in stages or "at(" in text or "make_world(" in text


@pytest.mark.parametrize(
    ("script", "flags", "place"),
    [
        ("dual_vs_encoder", ["--count", "--model", "vit_tiny", "--variants", "torch"], "counting torch"),
        ("loop", ["--model", "vit_tiny", "--batch", "2", "--steps", "2", "--warmup", "1"], r"pair \d of 3"),
    ],
)
def test_a_benchmark_without_a_terminal(benches, progress, monkeypatch, capsys, script, flags, place):
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    assert benches(script).main(flags) == 0
    assert re.search(rf"^  \d+\.\d min: {place}", capsys.readouterr().err, re.MULTILINE)


def test_other_packages_bars_stay_out(benches, capsys):
    pytest.importorskip("transformers")
    from vmae import ModelConfig

    config = ModelConfig.preset("vit_tiny", img_size=32, patch_size=8, num_frames=4)
    benches("variants").HuggingFace(config)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_command_explains_itself(script, benches, monkeypatch, capsys):
    module = benches(script.stem)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "usage:" in out and module.__doc__.split()[0] in out
