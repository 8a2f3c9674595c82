"""The static model of the kernels: it reads loops out of machine code, counts what runs, and the kernels'
loops hold what they promise. Nothing here is a measurement."""

import json
from dataclasses import replace

import pytest
import torch
from test_kernel_build import build_report

from vmae_kernels import predict, sass
from vmae_kernels.build import ARGUMENTS
from vmae_kernels.predict import GPUS, Arguments, Built, Loop, Mismatch
from vmae_kernels.recording import Recorder, fused, joined_products

# As cuobjdump prints it: 2 instructions, a loop of 7 that counts up by 4 and one of 3 within it, a call that
# no healthy run makes, a loop that waits for a copy.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   I2F.U8 R8, R4 ;
        /*0040*/                   LDG.E.U16 R9, [R2.64+0x8] ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/                   IADD3 R10, R10, 0x1, RZ ;
        /*0070*/                   ISETP.NE.AND P1, PT, R10, 0x8, PT ;
        /*0080*/               @P1 BRA 0x0060 ;
        /*0090*/                   IADD3 R0, R0, 0x4, RZ ;
        /*00a0*/                   ISETP.GE.AND P0, PT, R0, UR8, PT ;
        /*00b0*/              @!P0 BRA 0x0020 ;
        /*00c0*/               @P2 BRA 0x0110 ;
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR5], R11 ;
        /*00e0*/              @!P3 BRA 0x00d0 ;
        /*00f0*/                   STG.E.64 [R2.64], R24 ;
        /*0100*/                   EXIT ;
        /*0110*/                   CALL.REL.NOINC 0x0130 ;
        /*0120*/                   BRA 0x00f0 ;
        /*0130*/                   RET.REL.NODEC R20 0x0 ;
"""


def launch(code=CODE, kernel="made_up", programs=132, **arguments) -> Built:
    return Built(
        kernel=kernel, programs=programs, warps=4, stages=3, registers=128, shared_bytes=0,
        arguments=Arguments([], (), arguments), options={}, code=sass.read_kernel(code),
    )  # fmt: skip


@pytest.fixture
def loops(monkeypatch):
    """Registers the loops of `CODE`."""

    def set_loops(*known):
        monkeypatch.setitem(predict.LOOPS, "made_up", known)

    set_loops(Loop(lambda a: a.rows, lambda a: 4, Loop(lambda a: 8)))
    return set_loops


def test_loops_are_found_in_machine_code():
    kernel = sass.read_kernel(CODE)
    (outer,) = kernel.loops
    (inner,) = outer.inner
    assert (outer.header, inner.header) == (0x20, 0x60)
    assert [x.stem for x in inner.body] == ["IADD3", "ISETP", "BRA"]
    assert [x.stem for x in outer.body] == ["LDG", "I2F", "LDG", "HGMMA", "IADD3", "ISETP", "BRA"]
    assert outer.steps == [4] and inner.steps == [1]
    # What waits for a copy, and what only a call leads to, is not counted.
    assert {"STG", "EXIT"} <= {x.stem for x in kernel.straight}
    assert not {"CALL", "RET"} & {x.stem for x in kernel.straight}


def test_instructions_by_pipe_and_width():
    (outer,) = sass.read_kernel(CODE).loops
    assert sass.by_pipe(outer.body) == {"memory": 2, "conversion": 1, "tensor": 1, "alu": 2, "control": 1}
    assert sass.conversions(outer.body) == 1
    assert sass.narrow_loads(outer.body) == 1  # the U16
    assert [x.bits for x in outer.body if x.stem == "LDG"] == [128, 16]
    (product,) = [x for x in outer.body if x.pipe == "tensor"]
    assert sass.matrix_flops(product) == 2 * 64 * 128 * 16 / 4  # four warps do it together


def test_what_a_program_executes(loops):
    found = predict.predict(launch(rows=40), GPUS["h100"])
    straight = len(sass.read_kernel(CODE).straight)
    assert found.instructions_per_program == 4 * (straight + 10 * (7 + 8 * 3))
    assert (found.conversions_in_loop, found.narrow_loads_in_loop) == (1, 1)
    assert [(x["turns"], x["instructions"]) for x in found.loops] == [(10, 7), (80, 3)]
    assert found.programs_per_sm == 4 and found.waves == 1  # 128 registers of 128 threads: 16,384 of 65,536
    low, high = found.us
    assert 0 < low < high


def test_more_programs_take_longer_and_the_largest_bound_wins(loops):
    one, two = (predict.predict(launch(rows=4000, programs=n), GPUS["h100"]) for n in (132, 264))
    for name in ("issue", "conversions", "tensor"):
        assert two.bounds_us[name][0] == pytest.approx(2 * one.bounds_us[name][0])
    assert one.us[0] == pytest.approx(max(low for low, _ in one.bounds_us.values()) + predict.GAP_US[0])
    cycles = one.bounds_us["conversions"][0] * 1e-6 * GPUS["h100"].clock_hz
    assert cycles == pytest.approx(4 * 1000 * 1 / 0.5)  # 4 warps x 1,000 turns, 16 lanes a cycle
    assert one.bounds_us["issue"][1] == pytest.approx(one.bounds_us["issue"][0] / predict.REACHED)


def test_a_loop_unrolled_by_the_assembler_runs_so_many_times_less(loops):
    wide = CODE.replace("IADD3 R0, R0, 0x4, RZ", "IADD3 R0, R0, 0x10, RZ")
    found = predict.predict(launch(wide, rows=64), GPUS["h100"])
    assert found.loops[0]["turns"] == 4  # 64 rows by 4, four at once


@pytest.mark.parametrize(
    "known, message",
    [
        ((), "loops at 0x20 that the table does not know"),
        ((Loop(lambda a: a.rows), Loop(lambda a: a.rows)), "2 loops by the table, 1 in the binary"),
        ((Loop(lambda a: a.columns),), "no argument columns among rows"),
    ],
)
def test_a_table_that_does_not_fit_is_an_error(loops, known, message):
    loops(*known)
    with pytest.raises(Mismatch, match=message):
        predict.predict(launch(rows=40), GPUS["h100"])


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(Mismatch, match="unheard_of: no loops in vmae_kernels.predict.LOOPS"):
        predict.predict(launch(kernel="unheard_of"), GPUS["h100"])


def test_a_compiler_joins_passes_between_products():
    recorder = Recorder(enter=False)
    a, b = (torch.ones(64, 64, device="meta") for _ in range(2))
    recorder.given(a, b)
    with recorder:
        result = ((a + 1) * 2 @ b).relu().sum()
    recorder.given(result)
    found = fused(recorder.events, recorder.outer)
    assert [call.name for _, call, _ in found] == ["fused", "mm", "fused"]
    assert [passes for *_, passes in found] == [1, 1, 2]  # a sum may pass over its input once more
    before, product, after = (call for _, call, _ in found)
    assert before.bytes == 2 * 64 * 64 * 4 and product.flops == 2 * 64**3
    assert after.bytes == 64 * 64 * 4 + 4


def recorded(call, *tensors) -> list:
    recorder = Recorder(enter=False)
    with recorder:
        call(*tensors)
    return recorder.events


def test_attention_of_fewer_queries_than_keys_is_counted_whole():
    query, key = (torch.empty(2, 3, tokens, 64, requires_grad=True) for tokens in (5, 7))

    def attend(q, k):
        torch.nn.functional.scaled_dot_product_attention(q, k, k).sum().backward()

    calls = [event.what for event in recorded(attend, query, key) if "dot_product" in event.what.name]
    if not calls:
        pytest.skip("this torch has no fused attention on a CPU")
    assert [call.shape for call in calls] == [(2, 3, 5, 64, 7)] * 2
    assert [call.flops for call in calls] == [2 * products * 2 * 3 * 5 * 7 * 64 for products in (2, 5)]


def test_what_a_product_is_copied_into_is_its_own_result():
    """An operator's float32 copy on a CPU: cuBLAS writes it itself. A copy outside operators stays."""
    a, out = torch.ones(4, 4, dtype=torch.bfloat16, device="meta"), torch.ones(4, 4, device="meta")
    events = recorded(lambda: out.copy_(a @ a))
    assert [event.what.name for event in joined_products(events)] == ["mm", "copy_"]
    inside = [replace(event, operator="head_patch_loss") for event in events]
    (product,) = joined_products(inside)
    assert product.what.name == "mm" and sum(product.what.made.values()) == 4 * 4 * 4


def test_what_an_operators_call_wrote_is_read_from_the_l2(loops):
    buffer = torch.empty(1 << 20)
    one = launch(rows=4, p_x=buffer)
    cold = predict.predict(one, GPUS["h100"])
    warm = predict.predict(one, GPUS["h100"], frozenset(predict.touched_bytes(one)))
    assert warm.bounds_us["bytes"][0] < cold.bounds_us["bytes"][0]
    assert warm.bounds_us["bytes"][1] == cold.bounds_us["bytes"][1]


# --- The kernels themselves, built for an H100 ---


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return build_report(tmp_path_factory.mktemp("model"), "--predict", "--device", "h100")


FIELDS = "kernel preset target instructions_per_unit conversions_in_loop narrow_loads_in_loop registers"


@pytest.mark.slow
def test_predictions_of_all_operations(records):
    triton = [r for r in records if r["by"] == "triton"]
    for r in triton:
        assert r.keys() >= {*FIELDS.split(), "programs_per_sm", "predicted_us", "floor_us"}
    for r in records:
        low, high = r["predicted_us"]
        assert 0 < low <= high and json.dumps(r)
    sums = {(r["operation"], r["preset"], r["direction"]) for r in records if r["by"] == "sum"}
    assert {(operation, preset) for operation, preset, _ in sums} == {
        (operation, preset) for operation in ARGUMENTS for preset in ("vit_b", "vit_g")
    }


def of_operation(records, operation, preset):
    return [r for r in records if (r["operation"], r["preset"], r["by"]) == (operation, preset, "triton")]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["vit_b", "vit_g"])
def test_loops_of_the_embedding_convert_nothing(records, preset):
    own = [r for r in of_operation(records, "embed_visible", preset) if r["kernel"].startswith("embed")]
    assert (
        len(own) >= 4
        and {r["kernel"]: r["conversions_in_loop"] for r in own if r["conversions_in_loop"]} == {}
    )


# A line of pixels at patch 14 is 42 bytes, so tubelets begin at odd halves of a word.
ODD_LINES = pytest.mark.xfail(strict=True, reason="20 loads of 16 bits a token and warp: lines of 42 bytes")


@pytest.mark.slow
@pytest.mark.parametrize("operation, preset", [
    ("embed_visible", "vit_b"), ("embed_visible", "vit_g"), ("select_decoded", "vit_b"),
    ("layer_norm", "vit_b"), ("patch_loss", "vit_b"), ("head_patch_loss", "vit_b"),
    pytest.param("head_patch_loss", "vit_g", marks=ODD_LINES),
])  # fmt: skip
def test_loops_load_no_less_than_32_bits(records, operation, preset):
    own = of_operation(records, operation, preset)
    assert own and {r["kernel"]: r["narrow_loads_in_loop"] for r in own if r["narrow_loads_in_loop"]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["vit_b", "vit_g"])
def test_a_token_of_the_head_costs_less_than_1100_warp_instructions(records, preset):
    """Target statistics, error and gradient, all warps together; the statistics alone were 3,150."""
    (error,) = [r for r in of_operation(records, "head_patch_loss", preset) if "error" in r["kernel"]]
    assert error["instructions_per_unit"] / error["options"]["ROWS"] < 1100


# Microseconds of forward and backward at batch 32, ViT-B and ViT-g: the interval's middle.
GOALS = {
    ("head_patch_loss", "both"): (250, 300),
    ("embed_visible", "both"): (55, 100),
    ("select_decoded", "backward"): (40, 60),
}
# At the rates reached in full 47 and 81 us, of which the rows' copy and the fold take 7 and 9.
OVER = {
    ("embed_visible", "both", "vit_b"): pytest.mark.xfail(strict=True, reason="62 us predicted"),
    ("embed_visible", "both", "vit_g"): pytest.mark.xfail(strict=True, reason="103 us predicted"),
}


@pytest.mark.slow
@pytest.mark.parametrize("operation, direction, preset, goal", [
    pytest.param(*key, preset, goal, marks=OVER.get((*key, preset), ()))
    for key, goals in GOALS.items() for preset, goal in zip(("vit_b", "vit_g"), goals)
])  # fmt: skip
def test_goals(records, operation, direction, preset, goal):
    (whole,) = [
        r for r in records
        if (r["operation"], r["preset"], r["by"], r["direction"]) == (operation, preset, "sum", direction)
    ]  # fmt: skip
    assert sum(whole["predicted_us"]) / 2 <= goal
    assert whole["predicted_us"][1] >= whole["floor_us"]
