"""Flags, YAML files and `config.yaml` of a command, made from the fields of its configurations.

    SETTINGS = Settings(PretrainConfig, RunConfig, defaults={"model": "vit_b"})
    SETTINGS.add_to(parser)                    # a flag for each field with a help text, and `--config`
    args = SETTINGS.complete(args)             # layers: defaults < the command's < --config < flags
                                               # args.notes: lines for the user
    OptimConfig(**chosen(OptimConfig, args))   # what was set; the rest are the class's own defaults

Parsing keeps what was given apart from defaults (`args.given`), because defaults follow from presets,
checkpoints and the length of the run. A key of a YAML file is the name of a flag, with underscores.

tyro 1.0 and jsonargparse 4.53 were tried instead; docs/architecture.md tells why neither is used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from vmae.errors import InputError
from vmae.files.yaml_files import read_yaml
from vmae.settings import Limits, OneOf, OrUnset, Real, Setting, Sides, Whole, about_field, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Headings of `--help`, in order; others come after these.
GROUPS = (
    "machines and assumptions",
    "data and output",
    "what to start from",
    "settings that change results",
    "augmentation (changes results)",
    "optimizer (changes results)",
    "teacher (changes results)",
    "settings that change speed and housekeeping only",
)


@dataclass(frozen=True)
class Key:
    """One setting of a command.

    Attributes:
        name: in YAML files and in the parsed arguments.
        field: of the configuration that holds it.
        about: what the field says.
        kind: its type, as text.
        default: of the command, else the field's; MISSING where it must be given.
        group: heading in `--help`.
    """

    name: str
    field: dataclasses.Field
    about: Setting
    kind: str
    default: Any
    group: str

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off, perhaps as something else decides."""
        return self.kind in ("bool", "bool | None")

    @property
    def flags(self) -> list[str]:
        return [f"--{self.name.replace('_', '-')}", *self.about.aliases]

    @property
    def unset(self) -> str | None:
        """Words for a default that follows from something else; None where `default` is it."""
        if self.about.unset is None or self.default is not self.field.default:
            return None
        return self.about.unset.format(default=_words(self.field.default))

    @property
    def open(self) -> Any:
        """Value of the argument where it is not set."""
        if self.unset is not None or self.default is dataclasses.MISSING:
            return None
        return self.default

    @property
    def shown_default(self) -> str | None:
        """The default as people write it."""
        if self.unset is not None:
            return self.unset
        return None if self.default in (None, "", dataclasses.MISSING) else _words(self.default)

    @property
    def help(self) -> str:
        """The field's help and, after it, the default."""
        return (self.about.help or "") + (
            f" ({self.shown_default})" if self.shown_default is not None else ""
        )

    @property
    def type(self) -> Limits | None:
        """What makes a value of a word."""
        within = self.about.within
        if isinstance(within, Whole) and self.kind.startswith("int | tuple"):
            return Sides(within)
        return within

    @property
    def unset_words(self) -> tuple[str, ...]:
        """Words that mean that the setting keeps its default: "" of a text, "None" of a number that may be
        None, and those of the field."""
        if "None" not in self.kind or isinstance(self.about.within, OneOf):
            return self.about.unset_words
        return ("" if self.about.within is None else "None", *self.about.unset_words)

    def is_unset(self, value: Any) -> bool:
        """Whether a value is one of `unset_words`."""
        return str(value) in self.unset_words

    def add_to(self, parser: Any, default: Any = SUPPRESS) -> None:
        """Add the flags."""
        about = self.about
        text = SUPPRESS if about.hidden else self.help.replace("%", "%%")
        common = {"dest": self.name, "default": default, "help": text}
        if self.is_switch:
            parser.add_argument(*self.flags, action=argparse.BooleanOptionalAction, **common)
            return
        count: int | str | None = "?" if about.bare is not None else None
        kind, action = self.type, _action(_StoreText, key=self)
        if kind is not None:
            action = _action()
            if self.unset_words:
                kind = OrUnset(kind, self.unset_words, self.default)
        if self.kind.startswith("tuple"):
            count = self.length or "+"
            if self.unset_words:
                count, action = "+", _action(_StoreTuple, length=self.length)
        common["metavar"] = about.metavar
        parser.add_argument(*self.flags, type=kind, nargs=count, const=about.bare, action=action, **common)
        for flags, value, told in about.constants:
            constant = {"dest": self.name, "default": SUPPRESS, "help": told or SUPPRESS}
            parser.add_argument(*flags, action="store_const", const=value, **constant)

    def of_file(self, value: Any) -> Any:
        """The value that a YAML file holds, checked; `1e-3` is text in YAML 1.1, and a number here.

        Raises:
            InputError: names the key, and what it may be.
        """
        within = self.about.within
        if value is None and "None" in self.kind:
            return None
        if self.is_unset(value):
            return self.default
        if self.is_switch or within is None:
            if not isinstance(value, bool if self.is_switch else str):
                wanted = "true or false" if self.is_switch else "text"
                raise InputError(f"{self.name} must be {wanted}, not {shown(value)}")
            return value
        if "tuple" in self.kind and (isinstance(value, list) or self.kind.startswith("tuple")):
            if not isinstance(value, list) or len(value) != (self.length or len(value)):
                raise InputError(f"{self.name} must be {self.length or 'some'} numbers, not {shown(value)}")
            return tuple(_checked(part, within, self.name) for part in value)
        return _checked(value, self.type or within, self.name)

    @property
    def length(self) -> int | None:
        """Numbers of a tuple; None where there may be any number of them."""
        inside = self.kind.split("tuple[")[1].split("]")[0]
        return None if "..." in inside else inside.count(",") + 1


def _action(kind: type[argparse.Action] | None = None, **more: Any) -> Any:
    """argparse's `action=`; None is the usual one."""
    return "store" if kind is None else functools.partial(kind, **more)


class _StoreText(argparse.Action):
    """Keeps a text, or the default where that is not set."""

    def __init__(self, *args: Any, key: Key, **more: Any) -> None:
        super().__init__(*args, **more)
        self.key = key

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        setattr(namespace, self.dest, self.key.default if self.key.is_unset(values) else values)


class _StoreTuple(argparse.Action):
    """Keeps so many numbers (None: any number of them), or the default that a word for "not set" stands
    for."""

    def __init__(self, *args: Any, length: int | None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.length = length

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        usual = len(values) == 1 and (values[0] is None or isinstance(values[0], tuple))
        if not usual and len(values) != (self.length or len(values)):
            raise argparse.ArgumentError(self, f"expected {self.length} numbers, not {len(values)}")
        setattr(namespace, self.dest, values[0] if usual else values)


def _checked(value: Any, within: Limits, name: str) -> Any:
    if isinstance(value, bool) and within.allows(word := "on" if value else "off"):
        return word  # YAML 1.1 reads these two words as yes and no
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = within.read(value)
    within.check(name, value)
    return float(value) if isinstance(within, Real) else value


def _words(value: Any) -> str:
    """A default as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- Flags of other programs ---


@dataclass(frozen=True)
class OtherFlag:
    """A flag of another program that is no setting here: accepted, not in `--help`, and a key of files too.

    Attributes:
        name: with its dashes.
        does: what it does here, or why it changes nothing, in a line.
        words: that follow it: 0, 1, or "+" for one or more.
        sets: its words, joined by blanks -> the settings that it stands for, by key; where there are none,
            a note says why. Raises InputError for words that mean nothing.
        noted: whether a note says what it does even so.
    """

    name: str
    does: str
    words: int | str = 0
    sets: Callable[[str], dict[str, Any]] | None = None
    noted: bool = True

    @property
    def key(self) -> str:
        """Its name in a settings file."""
        return self.name.strip("-").replace("-", "_")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add the flag."""
        count: int | str | None = None if self.words == 1 else self.words
        parser.add_argument(
            self.name, action=_Collect, nargs=count, dest="others", help=SUPPRESS, default=SUPPRESS
        )

    def note(self, words: str) -> str:
        """The line for the user."""
        return f"note: {' '.join(filter(None, (self.name, words)))} {self.does}"


class _Collect(argparse.Action):
    """Keeps `OtherFlag`s with their words, in order."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        words = " ".join(values) if isinstance(values, list) else values
        namespace.others = [*getattr(namespace, "others", []), (option_string, words)]


@dataclass
class Layer:
    """What a command line or a settings file says.

    Attributes:
        values: settings by key.
        written: words by the name that was written, without dashes in front: what tells `--mask_ratio` from
            `--encoder-ratio`.
        notes: lines on flags of other programs.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    written: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


Adapt = Callable[[Layer, Layer, dict[str, Any]], tuple[dict[str, Any], dict[str, Any], list[str]]]


def written_flags(words: Sequence[str]) -> dict[str, str]:
    """The flags of a command line without the dashes in front, with the first word of each; the last of those
    that come twice."""
    found: dict[str, str] = {}
    for number, word in enumerate(words):
        if word.startswith("--"):
            name, joined, value = word[2:].partition("=")
            following = words[number + 1] if number + 1 < len(words) else ""
            found[name] = value if joined or following.startswith("--") else following
    return found


class Settings:
    """The settings of a command: the fields with a help text of some configurations and of those in them.

    Args:
        configs: their classes.
        defaults: what the command sets before anyone else does, by key.
        without_file: makes, of the flags, the command's settings where no file is given; for `plan`.
        others: flags of other programs that are accepted too.
        adapt: (flags, file, what both set, merged) -> what follows from them: settings between the defaults
            and the file, settings above the flags, and lines for the user.
    """

    def __init__(
        self,
        *configs: type[DataclassInstance],
        defaults: dict[str, Any] | None = None,
        without_file: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        others: Iterable[OtherFlag] = (),
        adapt: Adapt | None = None,
    ) -> None:
        self.defaults, self.without_file, self.adapt = defaults or {}, without_file, adapt
        self.others = {flag.name: flag for flag in others}
        self.keys: dict[str, Key] = {}
        for config in configs:
            self._add(config)
        self.keys = dict(sorted(self.keys.items(), key=lambda item: _order(item[1].group)))
        unknown = set(self.defaults) - set(self.keys)
        if unknown:
            raise TypeError(f"defaults of no setting: {', '.join(sorted(unknown))}")

    def _add(self, config: type[DataclassInstance]) -> None:
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            about = about_field(config, field.name)
            if dataclasses.is_dataclass(hints[field.name]):
                self._add(hints[field.name])
            elif about.help is not None:
                name = about.name or field.name
                if name in self.keys:
                    raise TypeError(f"two settings are called {name}")
                default = self.defaults.get(name, field.default)
                group = str(about.group or getattr(config, "group", "options"))
                self.keys[name] = Key(name, field, about, str(field.type), default, group)

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add all flags, and `--config` and `--dry-run`."""
        for title in dict.fromkeys(key.group for key in self.keys.values()):
            group = parser.add_argument_group(title)
            for key in self.keys.values():
                if key.group == title:
                    key.add_to(group)
            if title == GROUPS[1]:
                told = "settings, a `key: value` a line; keys are the flags' names; flags come on top"
                group.add_argument("--config", metavar="FILE.yaml", help=told)
                told = "check everything, print the resolved settings, write nothing"
                group.add_argument("--dry-run", action="store_true", help=told)
        for flag in self.others.values():
            if flag.name not in parser._option_string_actions:
                flag.add_to(parser)
        parser.set_defaults(settings=self)

    def complete(self, args: argparse.Namespace) -> argparse.Namespace:
        """Parsed flags with the other layers below them; nothing is done a second time.

        `args.given` holds what any layer set; each setting is an attribute too, None where its default
        follows from others. `args.notes` are lines for the user.

        Raises:
            InputError: a file that cannot be read, a key or value in it that is wrong, or a setting that has
                to be given and was not.
        """
        if "given" in args:
            return args
        flags = Layer(
            {name: value for name in self.keys if (value := getattr(args, name, MISSING)) is not MISSING}
        )
        flags.written = written_flags(getattr(args, "words", ()))
        for name, words in getattr(args, "others", ()):
            self._take(self.others[name], words, flags)
        file = Layer()
        if args.config:
            file = self._read(args.config)
        elif self.without_file is not None:
            file.values = self.without_file(flags.values)
        notes = [*file.notes, *flags.notes]
        below: dict[str, Any] = {}
        above: dict[str, Any] = {}
        if self.adapt is not None:
            said = self.merge(file.values, flags.values)
            said = {name: value for name, value in said.items() if value is not None}
            below, above, more = self.adapt(flags, file, said)
            notes += more
        given = self.merge(self.defaults, below, file.values, flags.values, above)
        self._check_required(given)
        for key in self.keys.values():
            setattr(args, key.name, given.get(key.name, key.open))
        args.given, args.notes = given, list(dict.fromkeys(notes))
        return args

    def _check_required(self, given: dict[str, Any]) -> None:
        needed = [key for key in self.keys.values() if _is_required(key)]
        missing = [key for key in needed if key.name not in given]
        if missing:
            names = ", ".join("/".join(key.flags) for key in missing)
            keys = ", ".join(key.name for key in missing)
            raise InputError(f"the following arguments are required: {names} (or {keys} in --config)")
        empty = next((key for key in needed if given[key.name] == ""), None)
        if empty is not None:
            raise InputError(f"{'/'.join(empty.flags)} is empty: {empty.about.help}")

    def _take(self, flag: OtherFlag, words: str, layer: Layer) -> None:
        """Add what a flag of another program stands for to a layer.

        Raises:
            InputError: its words mean nothing, or the layer says something else.
        """
        values = flag.sets(words) if flag.sets is not None else {}
        for name, value in values.items():
            if layer.values.setdefault(name, value) != value:
                raise InputError(
                    f"{flag.name} stands for {self.keys[name].flags[0]} {_words(value)}, but "
                    f"{_words(layer.values[name])} is given too: leave one of them out"
                )
        if flag.noted and not values:
            layer.notes.append(flag.note(words))

    def merge(self, *layers: dict[str, Any]) -> dict[str, Any]:
        """Later layers on top; what one overrules is dropped from those below it."""
        merged: dict[str, Any] = {}
        for layer in layers:
            for name in layer:
                for other in self.keys[name].about.overrules:
                    if other not in layer:
                        merged.pop(other, None)
            merged.update(layer)
        return merged

    def read(self, path: str | Path) -> dict[str, Any]:
        """The settings of a YAML file, by key; published names of them work too.

        Raises:
            InputError: it cannot be read, or a key or value is wrong; names file and key.
        """
        return self._read(path).values

    def _read(self, path: str | Path) -> Layer:
        """A YAML file as a layer."""
        names = {
            flag.strip("-").replace("-", "_"): key.name for key in self.keys.values() for flag in key.flags
        }
        others = {flag.key: flag for flag in self.others.values() if flag.key not in names}
        layer, taken = Layer(), []
        for written, value in read_yaml(path):
            name, other = names.get(written.replace("-", "_")), others.get(written.replace("-", "_"))
            layer.written[written] = value
            try:
                if other is not None:
                    if value is not False:
                        taken.append((other, _words_of_file(other, value)))
                    continue
                if name is None:
                    near = difflib.get_close_matches(written, [*names, *others], n=1)
                    advice = (
                        f"; did you mean {near[0]}?" if near else "; keys are names of flags, with _ for -"
                    )
                    raise InputError(f"unknown setting {shown(written)}{advice}")
                if name in layer.values:
                    raise InputError(f"{name} is set twice")
                if (found := self.keys[name].of_file(value)) is not MISSING:
                    layer.values[name] = found
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
        for other, words in taken:
            try:
                self._take(other, words, layer)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
        return layer

    def resolved(self, args: argparse.Namespace, *configs: DataclassInstance) -> dict[str, Any]:
        """All settings of a run by key: what was given, and what the configurations made of it."""
        values = args.given | settled(*configs)
        if "effective_batch" in values:
            values.pop("accumulate", None)
        return {name: values[name] for name in self.keys if values.get(name) is not None}


def _words_of_file(flag: OtherFlag, value: Any) -> str:
    """The words that a key of a file stands for.

    Raises:
        InputError: it is neither text nor numbers, or a value of a switch.
    """
    parts = value if isinstance(value, list) else [value]
    if flag.words == 0:
        if value is not True:
            raise InputError(f"{flag.key} must be true or false, not {shown(value)}")
        return ""
    if not parts or not all(isinstance(part, (str, int, float)) or part is None for part in parts):
        raise InputError(f"{flag.key} must be text or a number, not {shown(value)}")
    return " ".join("" if part is None else str(part) for part in parts)


def _order(group: str) -> int:
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def _is_required(key: Key) -> bool:
    return key.default is dataclasses.MISSING and key.about.unset is None


def chosen(config: type[DataclassInstance], args: argparse.Namespace) -> dict[str, Any]:
    """What was given for the fields of a configuration, by field; without those of configurations in it."""
    values = {}
    for field in dataclasses.fields(config):
        about = about_field(config, field.name)
        key = about.name or field.name
        if about.help is not None and key in args.given:
            values[field.name] = args.given[key]
    return values


def flat(config: DataclassInstance) -> dict[str, Any]:
    """The settings of a configuration, and of those in it, by key."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        about, value = about_field(type(config), field.name), getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            values |= flat(value)
        elif about.help is not None:
            values[about.name or field.name] = value
    return values


def settled(*configs: DataclassInstance) -> dict[str, Any]:
    """What a settings file that repeats a run holds of its configurations, by key."""
    values: dict[str, Any] = {}
    for config in configs:
        values |= {name: value for name, value in flat(config).items() if value is not None}
    if "effective_batch" in values:
        values.pop("accumulate", None)  # it follows, for any number of ranks
    return values


def add_settings(parser: Any, config: type[DataclassInstance], names: str, **changes: Any) -> None:
    """Flags of some fields (blanks between) of a configuration, for a command without a settings file.

    Args:
        changes: of their `Setting`; with `unset` the argument is None where it is not given.
    """
    for name in names.split():
        field = config.__dataclass_fields__[name]
        about = dataclasses.replace(about_field(config, name), **changes)
        key = Key(about.name or name, field, about, str(field.type), field.default, "")
        key.add_to(parser, default=key.open)
