"""What all commands share: counts of zero are refused before anything is made; Ctrl-C is a line."""

import pytest

SEEDS = ("dual_question", "mask_ablation", "optimizers", "progressive", "stage2")
FLAGS = [
    *((name, "--seeds") for name in SEEDS),
    ("operations", "--rounds"),
    ("loop", "--steps"),
    ("predict", "--batch"),
    ("device_tests", "--jobs"),
    ("kill_runs", "--kills"),
]


@pytest.mark.parametrize("name, flag", FLAGS)
def test_none_are_refused(benches, tmp_path, capsys, monkeypatch, name, flag):
    monkeypatch.chdir(tmp_path)
    assert benches(name).main([flag, "0"]) == 2
    assert f"{flag} must be at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_ctrl_c_is_a_line(benches, capsys):
    def run():
        raise KeyboardInterrupt

    assert benches("command").exit_code(run) == 130 and capsys.readouterr().err == "interrupted\n"
