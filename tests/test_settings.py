"""Every number that can be set states its range: the fields of all configurations, the flags of all
commands."""

import argparse
import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from typing import get_type_hints

import pytest

import vmae
from vmae import InputError
from vmae.cli import COMMANDS, build_parser, main
from vmae.config import ModelConfig, _Checked
from vmae.settings import SEED, Limits, OneOf, OrUnset, Real, Sides, Whole, about_field, limits, ranged, shown
from vmae.train.optim import OptimConfig

# RunConfig and the effective batch are being joined; its range is checked in __post_init__.
ELSEWHERE = {("PretrainConfig", "effective_batch")}
NOT_FINITE = (math.nan, math.inf, -math.inf)


def all_configs() -> list[type]:
    """Configurations of the package: subclasses of `_Checked`, and any dataclass that is called one."""
    found = {}
    for module in pkgutil.walk_packages(vmae.__path__, "vmae."):
        if not module.name.endswith("__main__"):
            for value in vars(importlib.import_module(module.name)).values():
                if (
                    inspect.isclass(value)
                    and dataclasses.is_dataclass(value)
                    and value.__module__.startswith("vmae.")
                ):
                    if issubclass(value, _Checked) or value.__name__.endswith(("Config", "Limits")):
                        found[value.__qualname__, value.__module__] = value
    return [found[key] for key in sorted(found)]


def number_fields(config: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(config) if re.search(r"\b(int|float)\b", str(field.type))]


FIELDS = [(config, field) for config in all_configs() for field in number_fields(config)]


def example(config: type):
    """One that is valid: defaults, and something for what has none."""
    hints, values = get_type_hints(config), {}
    for field in dataclasses.fields(config):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            kind, within = hints[field.name], about_field(config, field.name).within
            several = "tuple" in str(kind)
            if within is not None:
                values[field.name] = (
                    (within.least,) * (1 + ("size" in field.name)) if several else within.least
                )
            else:
                values[field.name] = (
                    example(kind) if dataclasses.is_dataclass(kind) else ("x",) if several else "x"
                )
    return config(**values)


def outside(within: Limits) -> list:
    """Values that are none, or not in the range."""
    if isinstance(within, Whole):
        return [*NOT_FINITE, within.least - 1, within.most + 1, 1.5, True, "7", 10**5000]
    low = within.above if within.least is None else within.least - max(abs(within.least), 1) * 1e-6
    high = within.below if within.most is None else within.most * (1 + 1e-6)
    return [*NOT_FINITE, low, high, True, "0.5", 1j]


def test_there_are_configurations_and_flags():
    assert len(all_configs()) >= 20 and len(FIELDS) >= 120 and len(FLAGS) >= 200


@pytest.mark.parametrize(
    ("config", "field"), FIELDS, ids=lambda part: getattr(part, "__name__", getattr(part, "name", None))
)
def test_every_number_of_a_configuration_has_a_range_and_keeps_to_it(config, field):
    if (config.__name__, field.name) in ELSEWHERE:
        return
    assert issubclass(config, _Checked), f"{config.__name__} does not check its numbers"
    within = about_field(config, field.name).within
    assert isinstance(within, (Whole, Real)), f"{config.__name__}.{field.name} declares no range"
    assert isinstance(within, Whole) == ("int" in str(field.type))
    good = example(config)
    for value in outside(within):
        if "tuple" in str(field.type):
            value = (value,) * (str(field.type).count(",") + 1)
        with pytest.raises(InputError, match=rf"^{field.name} must be {re.escape(str(within))}, not "):
            dataclasses.replace(good, **{field.name: value})
    if "None" in str(field.type):
        assert getattr(dataclasses.replace(good, **{field.name: None}), field.name) is None
    else:
        with pytest.raises(InputError, match=f"^{field.name} must be "):
            dataclasses.replace(good, **{field.name: None})


# --- flags --------------------------------------------------------------------------------------------------


def flags_of(command: str) -> list[tuple[str, argparse.Action]]:
    subparsers = next(a for a in build_parser(command)._actions if isinstance(a, argparse._SubParsersAction))
    known = subparsers.choices[command]._actions
    return [
        (command, action)
        for action in known
        if not isinstance(action.type, OneOf) and (action.type is not None or _is_number(action.default))
    ]


def _is_number(value) -> bool:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(value, (int, float)) and not isinstance(value, bool)


FLAGS = [flag for command in COMMANDS for flag in flags_of(command)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_of_a_command_has_a_range_and_keeps_to_it(command, capsys):
    parser = build_parser(command)
    for _, action in (flag for flag in FLAGS if flag[0] == command):
        name = action.option_strings[0]
        assert isinstance(action.type, Limits), f"{command} {name} states no range"
        within = action.type.side if isinstance(action.type, Sides) else action.type
        unset = within.words if isinstance(within, OrUnset) else ()
        within = within.within if isinstance(within, OrUnset) else within
        bad = ["nan", "inf", "-inf", "lots", "", "9" * 5000]
        bad += (
            [repr(value) for value in outside(within)[3:5]]
            if isinstance(within, (Whole, Real))
            else ["0", "-1"]
        )
        for word in (word for word in bad if word not in unset):
            words = (
                [f"{name}={word}"]
                if not isinstance(action.nargs, int)
                else [name, word, *["0.5"] * (action.nargs - 1)]
            )
            with pytest.raises(InputError) as caught:
                parser.parse_args([command, *words])
            if (
                word[:1] != "-" or not action.nargs
            ):  # argparse takes "-inf" for a flag where several words may follow
                names = "/".join(action.option_strings)
                assert f"argument {names}: must be {action.type}, not {word[:37]}" in str(caught.value)
        default = action.default[0] if isinstance(action.default, (list, tuple)) else action.default
        assert default in (None, argparse.SUPPRESS) or action.type.allows(default), (
            f"{command} {name}: its default is out of its range"
        )
    assert not capsys.readouterr().err


def test_a_wrong_number_ends_with_one_line_and_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--data", "list.txt", "--output", "run", "--opt_eps", "nan"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: argument --eps/--opt_eps: must be a number above 0 and at most 1, not nan"
    )
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


# --- the parts ----------------------------------------------------------------------------------------------


def test_a_flag_shares_the_range_of_its_field():
    with pytest.raises(TypeError, match="ModelConfig.qkv_bias declares no range"):
        limits(ModelConfig, "qkv_bias")
    assert limits(OptimConfig, "lr")("1e-3") == 1e-3 and limits(ModelConfig, "num_frames")("32") == 32
    for wrong in ("0", "nan", "1e5"):
        with pytest.raises(
            argparse.ArgumentTypeError, match="must be a number above 0 and at most 10,000, not"
        ):
            limits(OptimConfig, "lr")(wrong)


def test_ends_belong_to_a_range_as_it_says():
    assert Whole(1, 3).allows(1) and Whole(1, 3).allows(3)
    assert Real(least=0, most=1).allows(0) and Real(least=0, most=1).allows(1)
    assert not Real(above=0, below=1).allows(0.0) and not Real(above=0, below=1).allows(1)
    with pytest.raises(ValueError):
        Real(least=0)


def test_sides():
    sides = Sides(Whole(1, 100))
    assert sides("64") == 64 and sides("32X64") == (32, 64)
    for wrong in ("101", "0x5", "1x2x3", "x", "5x101"):
        with pytest.raises(argparse.ArgumentTypeError, match="HEIGHTxWIDTH"):
            sides(wrong)


def test_lists_become_tuples_and_their_length_is_checked():
    assert OptimConfig(betas=[0.5, 0.9]).betas == (0.5, 0.9)
    for wrong in ((0.9,), (0.9, 0.9, 0.9)):
        with pytest.raises(InputError, match=r"betas must be 2 numbers, not \(0.9"):
            OptimConfig(betas=wrong)
    with pytest.raises(InputError, match="betas must be 2 numbers, not 0.9"):
        OptimConfig(betas=0.9)


def test_names_are_one_of_those_known_or_a_published_name_of_them():
    masks = OneOf("mask", {"cell": 1}, {"run_cell": "cell"})
    assert masks("run_cell") == masks("cell") == "cell"
    with pytest.raises(argparse.ArgumentTypeError, match="^unknown mask 'tube'; known: cell$"):
        masks("tube")
    for wrong in ("tube", "run_cell", 3, None):
        with pytest.raises(InputError, match="^unknown mask .*; known: cell$"):
            masks.check("decoder", wrong)


def test_what_is_shown_of_a_value_is_short():
    nested = []
    nested.append(nested)
    deep = []
    for _ in range(10_000):
        deep = [deep]
    laughs = ["ha"]
    for _ in range(30):
        laughs = [laughs] * 10
    for value in ("x" * 1000, 10**5000, nested, deep, laughs):
        assert len(shown(value)) <= 40
    assert shown(0.5) == "0.5" and shown("yes") == "'yes'"


def test_the_largest_seed_can_be_used(tmp_path):
    import torch

    from vmae.train.step import seed_random

    seed_random(SEED.most, 5, 0)
    torch.manual_seed(SEED.most)
    torch.Generator().manual_seed(SEED.most)


def test_a_field_without_a_range_would_be_noticed():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bad(_Checked):
        number: "int" = 3
        other: "int" = ranged(3, Whole(1, 4))

    with pytest.raises(AssertionError, match="declares no range"):
        test_every_number_of_a_configuration_has_a_range_and_keeps_to_it(Bad, number_fields(Bad)[0])
    test_every_number_of_a_configuration_has_a_range_and_keeps_to_it(Bad, number_fields(Bad)[1])
