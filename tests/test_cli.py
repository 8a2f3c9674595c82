import subprocess
import sys

import pytest

from vmae.cli import COMMANDS, build_parser, main


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and command in capsys.readouterr().out


def test_unknown_command_exits_with_2(capsys):
    assert main(["dance"]) == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'dance'" in error and error.count("\n") == 1


def test_only_the_named_command_is_imported():
    code = "import sys; from vmae.cli import build_parser; build_parser('parity'); print('vmae.train.tasks.pretrain' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert build_parser("parity").parse_args(["parity", "x.npz"]).files == ["x.npz"]
