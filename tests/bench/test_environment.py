"""Clocks, power and temperature of a GPU beside a measurement; what a rehearsal says of itself."""

import sys

import pytest

LINE = "550.54, 1410, 1980, 2619, 2619, 690.10, 700.00, 71, 0x0000000000000024"
SMI = """
import sys
query = next(word for word in sys.argv if word.startswith("--query-gpu="))
if {unknown!r} in query:
    print(f'Field "{unknown}" is not a valid field to query.')
    sys.exit(2)
print({line!r})
"""


@pytest.fixture
def environment(benches, monkeypatch):
    monkeypatch.delenv("VMAE_REHEARSE", raising=False)
    return benches("environment")


def smi(tmp_path, line=LINE, unknown="no.such.field"):
    path = tmp_path / "smi.py"
    path.write_text(SMI.format(line=line, unknown=unknown))
    return [sys.executable, str(path)]


def test_a_state_is_read(environment, tmp_path):
    state = environment.read_state(smi(tmp_path))
    assert (state.driver, state.sm_mhz, state.sm_mhz_max) == ("550.54", 1410, 1980)
    assert (state.power_w, state.power_limit_w, state.temperature_c) == (690.1, 700, 71)
    assert state.throttled == ["power cap", "software thermal slowdown"]


def test_older_drivers_know_another_name(environment, tmp_path):
    assert environment.read_state(smi(tmp_path, unknown="clocks_event_reasons.active")).throttled
    without = ", ".join(LINE.split(", ")[:-1])
    state = environment.read_state(smi(tmp_path, line=without, unknown="_reasons.active"))
    assert state.sm_mhz == 1410 and state.throttled == []


@pytest.mark.parametrize("line", ["", "No devices were found", "550.54, 1410"])
def test_what_is_no_state(environment, tmp_path, line):
    assert environment.read_state(smi(tmp_path, line=line)) is None
    assert environment.read_state(["no-such-program"]) is None


def test_unknown_values_are_none(environment, tmp_path):
    state = environment.read_state(smi(tmp_path, line=LINE.replace("690.10", "[N/A]")))
    assert state.power_w is None and state.power_limit_w == 700


def test_conditions_name_clocks_and_throttling(environment, tmp_path):
    from dataclasses import replace

    known = environment.find_environment("cpu")
    assert known.gpu_before is None and "MHz" not in known.conditions
    hot = environment.read_state(smi(tmp_path))
    found = replace(known, device="NVIDIA H100", gpu_before=replace(hot, throttled=[]), gpu_after=hot)
    text = "NVIDIA H100 at 1410 of 1980 MHz, 700 W, driver 550.54, THROTTLED: power cap, software thermal"
    assert found.conditions.startswith(text)
    assert "THROTTLED" not in replace(found, gpu_after=None).conditions


def test_a_rehearsal_says_so_and_is_written_with_both_states(environment, monkeypatch, tmp_path):
    import json

    from harness.results.operations import OperationsResult

    monkeypatch.setenv("VMAE_REHEARSE", "1")
    known = environment.find_environment("cpu")
    assert (
        known.rehearsed and known.device == "rehearsal" and known.conditions.startswith("REHEARSAL on a CPU")
    )
    OperationsResult(environment=known, records=[]).write(tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text())["environment"]
    assert written["gpu_before"]["driver"] and written["gpu_after"]["throttled"] == ["power cap"]


def test_a_result_of_a_cpu_has_no_state(environment, tmp_path):
    known = environment.find_environment("cpu")
    assert environment.with_gpu_after(known) is known


def test_tables_of_documents_refuse_a_rehearsal(benches, environment, monkeypatch, tmp_path):
    monkeypatch.setenv("VMAE_REHEARSE", "1")
    from harness.results.operations import CheckRecord, OperationsResult

    record = CheckRecord(operation="o", shape="s", dtype="bfloat16", error_ratio=0.5, ok=True)
    OperationsResult(environment=environment.find_environment("cpu"), records=[record]).write(
        tmp_path / "o.json"
    )
    text = "<!-- table operations o.json -->\nold\n<!-- end of table -->\n"
    with pytest.raises(ValueError, match="o.json: a rehearsal, nothing in it was measured"):
        benches("readme").rewritten(text, tmp_path)
