import subprocess
import sys

import pytest

import vmae
from vmae.cli import COMMANDS, GROUPS, build_parser, main


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_every_command_under_its_heading(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(COMMANDS) >= 28
    for heading, group in GROUPS.items():
        section = lines[lines.index(f"{heading}:") + 1 :]
        section = section[: section.index("")]
        listed = [line.split()[0] for line in section if line[:3].strip()]
        assert listed == list(group)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and command in capsys.readouterr().out


@pytest.mark.parametrize(
    "word, told",
    [
        ("pretrian", "no command 'pretrian'; did you mean `vmae pretrain`? `vmae --help` lists"),
        ("dance", "no command 'dance'; `vmae --help` lists all commands"),
    ],
)
def test_unknown_command_exits_with_2_and_names_the_nearest(word, told, capsys):
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_version_and_help_do_not_import_torch(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    printed = capsys.readouterr().out
    assert (
        caught.value.code == 0 and printed.startswith(f"vmae {vmae.__version__} (") and "torch 2." in printed
    )
    code = "import contextlib, sys, vmae.cli\nwith contextlib.suppress(SystemExit): vmae.cli.main(['{}'])\n"
    for flag in ("--help", "--version"):
        assert python(code.format(flag) + "print('torch' in sys.modules)").endswith("\nFalse\n")


def test_only_the_named_command_is_imported():
    code = (
        "import sys; from vmae.cli import build_parser; build_parser('parity')"
        "; print('vmae.tools.parity' in sys.modules, 'vmae.train.tasks.pretrain' in sys.modules)"
    )
    assert python(code) == "True False\n"
    assert build_parser("parity").parse_args(["parity", "x.npz"]).files == ["x.npz"]


def test_public_names_are_there_at_first_use():
    assert set(vmae._MODULES) == set(vmae.__all__) <= set(dir(vmae))
    for name in vmae.__all__:
        assert getattr(vmae, name).__name__.removeprefix("vmae.") == name
    with pytest.raises(AttributeError, match="module 'vmae' has no attribute 'DualMusk'"):
        _ = vmae.DualMusk


def test_completion_completes_commands_flags_and_files(tmp_path, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "bash"])
    script = tmp_path / "vmae.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "videos.txt").touch()

    def complete(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_vmae"
        done = subprocess.run(
            ["bash", "-c", f"{code}; echo ${{COMPREPLY[@]}}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert caught.value.code == 0
    assert complete("vmae", "pre") == ["pretrain", "predict"]
    assert "--mask_ratio" in complete("vmae", "pretrain", "--mask")
    assert complete("vmae", "check-data", "vid") == ["videos.txt"]


def test_completion_without_its_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "zsh"]) == 2
    assert capsys.readouterr().err == "error: completion needs the package shtab: `pip install shtab`\n"


def test_a_reader_that_goes_away_is_no_error():
    """As in `vmae doctor | head -1`."""
    code = (
        "import sys, types, vmae.cli as cli; made = types.ModuleType('made'); sys.modules['made'] = made; "
        "made.add_arguments = lambda parser: None; made.run = lambda args: print('line\\n' * 100_000); "
        "cli.COMMANDS['doctor'] = ('made', 'text'); sys.exit(cli.main(['doctor']))"
    )
    shell = f'{sys.executable} -c "{code}" | head -1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("line\n141\n", "")
