"""A static model of the kernels: how long each launch should take on a GPU that is not there, as an interval.

`python -m vmae_kernels.build --predict` catches what a training step launches at batch 32, builds it, reads
the loops of the binary (vmae_kernels.sass) and counts what one program executes: code outside loops once,
each loop as often as `LOOPS` says from the launch's own arguments. The largest of these wins:

    issue       warp instructions over 4 a cycle and processor
    each pipe   warp instructions over the pipe's rate; conversions at 16 lanes a cycle, tensor cores at peak
    bytes       every tensor of the launch once, at the bandwidth that streaming kernels reach
    latency     (upper end only) rounds to memory that nothing hides, times the waves of programs

Lower end: rates reached in full, and what an earlier kernel of the operation left in the L2 free. Upper end:
`REACHED` of the instruction rates, all bytes from memory, `BYTES_REACHED` of that rate. Programs are spread
over the processors, the busiest one counts. Nothing here was measured: the records are kept to be scored by
the first measurement.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vmae_kernels import sass
from vmae_kernels.recording import (
    Event,
    OperatorCall,
    Recorder,
    TorchCall,
    fused,
    joined_products,
    storage_of,
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a device does at most.

    Attributes:
        target: of the build.
        clock_hz: under load.
        bytes_per_s: reached by kernels that stream; `peak_bytes_per_s` of the datasheet, for floors.
        l2_bytes_per_s, l2_bytes: of the cache.
        matrix_flops: bf16 peak of the datasheet; `matrix_flops_per_cycle` of a processor.
        float_rate: float32 warp instructions a cycle and processor.
        shared_bytes: of a processor.
    """

    target: str
    processors: int
    clock_hz: float
    bytes_per_s: float
    peak_bytes_per_s: float
    l2_bytes_per_s: float
    l2_bytes: int
    matrix_flops: float
    matrix_flops_per_cycle: int
    float_rate: float
    shared_bytes: int
    source: str


GPUS = {
    "h100": Gpu(
        target="sm_90", processors=132, clock_hz=1.75e9, bytes_per_s=2.7e12, peak_bytes_per_s=3.35e12,
        l2_bytes_per_s=5.5e12, l2_bytes=50 << 20, matrix_flops=989e12, matrix_flops_per_cycle=4096,
        float_rate=4, shared_bytes=228 << 10,
        source="H100 SXM datasheet; 1.75 GHz under load and 2.7 TB/s reached are assumptions",
    ),
    "a100": Gpu(
        target="sm_80", processors=108, clock_hz=1.41e9, bytes_per_s=1.65e12, peak_bytes_per_s=2.04e12,
        l2_bytes_per_s=3.5e12, l2_bytes=40 << 20, matrix_flops=312e12, matrix_flops_per_cycle=2048,
        float_rate=2, shared_bytes=164 << 10,
        source="A100 SXM 80 GB datasheet; 1.65 TB/s reached is an assumption",
    ),
}  # fmt: skip

# Warp instructions a cycle and processor: four schedulers, one instruction each; 16-lane and 32-lane pipes.
ISSUE, ALU_RATE, INTEGER_PRODUCT_RATE, MEMORY_RATE, SLOW_RATE = 4.0, 2.0, 2.0, 1.0, 0.5
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of a processor
# Shares at the interval's upper end: of the instruction rates, of the bytes a second.
REACHED, BYTES_REACHED = 0.65, 0.85
# Cycles from a load to its value (memory, not L2), between dependent instructions of one warp, and
# microseconds between two kernels of a queue or a graph: assumptions.
LOAD_CYCLES, DEPENDENT_CYCLES, GAP_US = 700, 4, (0.5, 1.5)
PRODUCT_SHARE = (0.75, 0.60)  # of the matrix peak that products outside the kernels reach


def assumptions() -> dict[str, Any]:
    """What the model takes for granted beside the device's rates."""
    return {
        "reached": REACHED, "bytes_reached": BYTES_REACHED, "load_cycles": LOAD_CYCLES,
        "dependent_cycles": DEPENDENT_CYCLES, "gap_us": GAP_US, "product_share": PRODUCT_SHARE,
        "issue": ISSUE, "alu_rate": ALU_RATE,
        "integer_product_rate": INTEGER_PRODUCT_RATE, "memory_rate": MEMORY_RATE, "slow_rate": SLOW_RATE,
    }  # fmt: skip


class Arguments:
    """Values of a launch by the names of the kernel's parameters, found in upper case too: a size that became
    a `constexpr` keeps its formula."""

    def __init__(self, names: Iterable[str], args: tuple, kwargs: dict):
        self.by_name = dict(zip(names, args)) | kwargs

    def __getattr__(self, name: str) -> Any:
        for known in (name, name.upper(), name.lower()):
            if known in self.by_name:
                return self.by_name[known]
        raise AttributeError(f"no argument {name} among {', '.join(self.by_name)}")


Formula = Callable[[Arguments], float]
Span = tuple[float, float]  # lower and upper end


class Loop:
    """A loop of a kernel's source: `extent` over `step` turns; `inner` are the loops within, in order."""

    def __init__(self, extent: Formula, step: Formula = lambda a: 1, *inner: Loop):
        self.extent, self.step, self.inner = extent, step, inner

    def turns(self, a: Arguments) -> float:
        return math.ceil(self.extent(a) / self.step(a))


def _tubelet(a: Arguments) -> int:
    return 3 * a.DEPTH * a.PATCH**2


_ROWS = Loop(lambda a: a.rows_per_program, lambda a: a.BLOCK_R)
_TOKENS = Loop(lambda a: a.ROWS, lambda a: a.BLOCK_R)

# Loops of every kernel by argument names, checked against those of the binary: one that is not there, or one
# too many, is an error.
LOOPS: dict[str, tuple[Loop, ...]] = {
    "embed_visible_rows_kernel": (),
    "embed_visible_fold_kernel": (),
    "embed_visible_fwd_kernel": (Loop(lambda a: a.K, lambda a: a.BLOCK_K),),
    "embed_visible_bwd_weight_kernel": (Loop(lambda a: a.rows_per_split, lambda a: a.BLOCK_M),),
    "embed_visible_bwd_finish_kernel": (),
    # One use of a position in the mean: as many rows as there are, over positions.
    "embed_visible_bwd_pos_kernel": (Loop(lambda a: a.p_order.numel() / (a.p_bounds.numel() - 1)),),
    "column_sum_kernel": (_ROWS,),
    "reduce_partials_kernel": (Loop(lambda a: a.n_parts, lambda a: a.BLOCK_R),),
    "layer_norm_fwd_kernel": (_ROWS,),
    "layer_norm_bwd_kernel": (_ROWS,),
    "head_error_kernel": (_TOKENS,),
    "weighted_mean_kernel": (Loop(lambda a: a.n_partial, lambda a: a.BLOCK),),
    "patch_loss_fwd_kernel": (_TOKENS,),
    "patch_loss_bwd_kernel": (_TOKENS,),
    "select_decoded_fwd_kernel": (),
    "select_decoded_bwd_kernel": (_ROWS,),
    "assemble_decoder_tokens_fwd_kernel": (),
}


def _clip_rows(a: Arguments) -> float:
    for name in ("p_tokens", "p_visible"):
        if not hasattr(a, "n_rows") and hasattr(a, name):
            return getattr(a, name).numel()
    return a.n_rows


# Elements of an argument that a launch touches, where these are not all: by argument, or kernel and argument.
TOUCHED: dict[str, Formula] = {
    "p_clips": lambda a: _clip_rows(a) * _tubelet(a),
    "p_pos": lambda a: min(a.p_pos.numel(), a.n_rows * a.width),
    "head_error_kernel.p_pred": lambda a: a.n_rows * _tubelet(a) * 2,  # read, and written in place
    "head_error_kernel.p_weight": lambda a: a.n_rows,
    "head_error_kernel.p_tokens": lambda a: a.n_rows,
    "head_error_kernel.p_partial": lambda a: a.n_rows / a.ROWS * 2,
    "head_error_kernel.p_bias_partial": lambda a: a.n_rows / a.ROWS * _tubelet(a),
    "select_decoded_fwd_kernel.p_hidden": lambda a: a.n_rows * a.width,
    "select_decoded_bwd_kernel.p_hidden": lambda a: a.p_grad_normed.numel(),
    "column_sum_kernel.p_x": lambda a: a.n_rows * a.n_columns,
}


class Mismatch(Exception):
    """The table of loops and the binary do not fit."""


@dataclass
class Turn:
    """A loop of the binary and how often its body runs in one program."""

    loop: sass.Loop
    times: float


def match_loops(kernel: str, found: list[sass.Loop], known: tuple[Loop, ...], a: Arguments) -> list[Turn]:
    """How often each loop of the binary runs, inner ones after their outer one.

    A loop that the assembler unrolled is there several times, the widest first: the counter's step tells by
    how much. One whose turns are constant may be gone.
    """
    turns: list[Turn] = []
    try:
        _match(kernel, found, known, a, 1.0, turns)
    except AttributeError as error:
        raise Mismatch(f"{kernel}: a formula in LOOPS asks for what the launch has not: {error}") from None
    return turns


def _match(kernel, found, known, a, times, turns) -> None:
    if len(found) < len(known):
        if found or any(loop.turns(a) > 8 for loop in known):
            where = ", ".join(f"{loop.header:#x}" for loop in found) or "none"
            raise Mismatch(f"{kernel}: {len(known)} loops by the table, {len(found)} in the binary ({where})")
        return
    if found and not known:
        where = ", ".join(f"{loop.header:#x}" for loop in found)
        raise Mismatch(f"{kernel}: loops at {where} that the table does not know")
    rest = list(found)
    for i, source in enumerate(known):
        later = len(known) - i - 1
        left = source.turns(a)
        group = [rest.pop(0)]
        while len(rest) > later and _unrolled(rest[0], source, a) < _unrolled(group[-1], source, a):
            group.append(rest.pop(0))
        for loop in group:
            unrolled = _unrolled(loop, source, a)
            runs = left // unrolled if unrolled > 1 else left
            left -= runs * unrolled
            turns.append(Turn(loop, times * runs))
            _match(kernel, loop.inner, source.inner, a, times * runs, turns)
    if rest:
        where = ", ".join(f"{loop.header:#x}" for loop in rest)
        raise Mismatch(f"{kernel}: loops at {where} that the table does not know")


def _unrolled(loop: sass.Loop, source: Loop, a: Arguments) -> int:
    """Turns of the source in one of the binary: its counter's step over the source's."""
    step = int(source.step(a))
    factors = [found // step for found in loop.steps if found % step == 0 and 1 <= found // step <= 16]
    return min(factors, default=1)


@dataclass
class Work:
    """What one warp of a program executes, and what one thread of it loads."""

    instructions: float = 0
    pipes: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    slow: float = 0
    memory_cycles: float = 0
    integer_products: float = 0
    flops: float = 0

    def add(self, code: Iterable[sass.Instruction], times: float) -> None:
        for x in code:
            self.instructions += times
            self.pipes[x.pipe] += times
            if x.pipe in ("conversion", "special"):
                self.slow += times
            if x.pipe == "memory" and not x.issued_only:
                self.memory_cycles += times * max(1, x.bits // 32)
            if x.stem == "IMAD":
                self.integer_products += times
            self.flops += times * sass.matrix_flops(x)


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the model needs to know of one launch: its grid, its arguments, its binary."""

    kernel: str
    programs: int
    warps: int
    stages: int
    registers: int
    shared_bytes: int
    arguments: Arguments
    options: dict[str, Any]
    code: sass.Kernel


def tensor_bytes(kernel: str, a: Arguments) -> dict[str, tuple[Tensor, float]]:
    """Tensors of a launch, and the bytes of each that it touches."""
    found = {}
    for name, value in a.by_name.items():
        tensor = getattr(value, "base", value)  # of a descriptor
        if isinstance(tensor, Tensor):
            formula = TOUCHED.get(f"{kernel}.{name}", TOUCHED.get(name))
            count = tensor.numel() if formula is None else formula(a)
            found[name] = (tensor, count * tensor.element_size())
    return found


def programs_per_processor(launch: Built, gpu: Gpu) -> int:
    """Programs that fit a processor at once: registers (in steps of 256 a warp), shared memory, warps."""
    registers = math.ceil(launch.registers * 32 / 256) * 256 * launch.warps
    shared = launch.shared_bytes + 1024
    return max(1, min(REGISTERS // registers, gpu.shared_bytes // shared, WARPS // launch.warps, PROGRAMS))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One launch, predicted.

    Attributes:
        bounds_us: lower and upper microseconds of each thing that may bind.
        binds: the one that does at the lower end, and at the upper.
    """

    instructions_per_program: float
    conversions_in_loop: int
    narrow_loads_in_loop: int
    loops: list[dict]
    programs_per_sm: int
    waves: int
    bounds_us: dict[str, Span]
    us: Span
    binds: tuple[str, str]
    floor_us: float
    bytes: float
    flops: float


def predict(launch: Built, gpu: Gpu, inner: frozenset[int] = frozenset()) -> Prediction:
    """The interval of one launch on `gpu`.

    Args:
        inner: storages that earlier kernels of the same operation wrote.

    Raises:
        Mismatch: the kernel is not in `LOOPS`, or its loops are others.
    """
    if launch.kernel not in LOOPS:
        raise Mismatch(f"{launch.kernel}: no loops in vmae_kernels.predict.LOOPS; add how often each runs")
    code = launch.code
    turns = match_loops(launch.kernel, code.loops, LOOPS[launch.kernel], launch.arguments)
    work = Work()
    work.add(code.straight, 1)
    for turn in turns:
        work.add(turn.loop.body, turn.times)
    resident = programs_per_processor(launch, gpu)
    waves = math.ceil(launch.programs / (gpu.processors * resident))
    busiest = math.ceil(launch.programs / gpu.processors) * launch.warps  # warps of the busiest processor
    sizes = tensor_bytes(launch.kernel, launch.arguments)
    everything = sum(size for _, size in sizes.values())
    kept = sum(
        size
        for tensor, size in sizes.values()
        if storage_of(tensor) in inner and tensor.numel() * tensor.element_size() <= gpu.l2_bytes / 2
    )

    def us(cycles: float) -> Span:
        return 1e6 * cycles / gpu.clock_hz, 1e6 * cycles / gpu.clock_hz / REACHED

    bounds = {
        "issue": us(busiest * work.instructions / ISSUE),
        "float": us(busiest * work.pipes["fma"] / gpu.float_rate),
        "integer products": us(busiest * work.integer_products / INTEGER_PRODUCT_RATE),
        "integer": us(busiest * work.pipes["alu"] / ALU_RATE),
        "conversions": us(busiest * work.slow / SLOW_RATE),
        "memory pipe": us(busiest * work.memory_cycles / MEMORY_RATE),
        "tensor": us(busiest * work.flops / gpu.matrix_flops_per_cycle),
        "bytes": (
            1e6 * max((everything - kept) / gpu.bytes_per_s, everything / gpu.l2_bytes_per_s),
            1e6 * everything / gpu.bytes_per_s / BYTES_REACHED,
        ),
        "latency": (0.0, 1e6 * waves * latency_cycles(launch, turns) / gpu.clock_hz),
    }
    low = max(bounds, key=lambda name: bounds[name][0])
    high = max(bounds, key=lambda name: bounds[name][1])
    flops = work.flops * launch.warps * launch.programs
    inside = [x for loop in code.all_loops for x in loop.body]
    return Prediction(
        instructions_per_program=work.instructions * launch.warps,
        conversions_in_loop=sass.conversions(inside),
        narrow_loads_in_loop=sass.narrow_loads(inside),
        loops=[summary_of(turn) for turn in turns],
        programs_per_sm=resident,
        waves=waves,
        bounds_us=bounds,
        us=(bounds[low][0] + GAP_US[0], bounds[high][1] + GAP_US[1]),
        binds=(low, high),
        floor_us=1e6 * max(everything / gpu.peak_bytes_per_s, flops / gpu.matrix_flops),
        bytes=everything,
        flops=flops,
    )


def latency_cycles(launch: Built, turns: list[Turn]) -> float:
    """Cycles of one program alone: two rounds to memory outside loops, one a turn where a loop waits for what
    it loads (divided by the copies in flight where it does not), and its own dependent instructions."""
    straight = sum(x.stem in sass.LOADS for x in launch.code.straight)
    cycles = LOAD_CYCLES * min(2, straight) + DEPENDENT_CYCLES * len(launch.code.straight) / 2
    for turn in turns:
        stems = {x.stem for x in turn.loop.body if not x.issued_only}
        own = DEPENDENT_CYCLES * len(turn.loop.body) / 2
        rounds = 0.0
        if "LDG" in stems:
            rounds = LOAD_CYCLES
        elif stems & set(sass.COPIES):
            rounds = LOAD_CYCLES / max(1, launch.stages - 1)
        cycles += turn.times * max(rounds, own)
    return cycles


def summary_of(turn: Turn) -> dict:
    """A loop as a record: pipes, loads by width, copies."""
    body = turn.loop.body
    widths = Counter(f"{x.stem}.{x.bits}" for x in body if x.stem in sass.LOADS and not x.issued_only)
    return {
        "at": f"{turn.loop.header:#x}", "turns": turn.times, "instructions": len(body),
        "pipes": dict(sass.by_pipe(body)), "loads": dict(widths),
        "copies": sum(x.stem in sass.COPIES for x in body), "conversions": sass.conversions(body),
    }  # fmt: skip


def torch_us(call: TorchCall, gpu: Gpu, passes: int = 1) -> Span:
    """Microseconds of one call of PyTorch: FLOPs at `PRODUCT_SHARE` of the peak, or its bytes. With `passes`
    over its inputs at the upper end, each one kernel more."""
    fast, slow = (1e6 * call.flops / (share * gpu.matrix_flops) for share in PRODUCT_SHARE)
    wrote = sum(call.made.values())
    low, high = (1e6 * (n * (call.bytes - wrote) + wrote) / gpu.bytes_per_s for n in (1, passes))
    return max(low, fast) + GAP_US[0], max(high / BYTES_REACHED, slow) + passes * GAP_US[1]


def rival_us(rival: Recorder, gpu: Gpu) -> dict[str, Span]:
    """Microseconds of the reference under torch.compile by direction: its calls, `fused`."""
    found: dict[str, Span] = {}
    for direction, call, passes in fused(rival.events, rival.outer):
        us = torch_us(call, gpu, passes)
        for name in (direction, "both"):
            found[name] = add(found.get(name, (0.0, 0.0)), us)
    return found


def add(a: Span, b: Span) -> Span:
    return a[0] + b[0], a[1] + b[1]


def outer_bytes(events: list[Event], outer: set[int]) -> dict[str, float]:
    """Bytes that an operation must move by direction: each of its arguments, results and gradients once."""
    found: dict[str, dict[int, float]] = {}
    for event in events:
        sizes = found.setdefault(event.direction, {})
        for key, size in touched_bytes(event.what).items():
            if key in outer:
                sizes[key] = max(sizes.get(key, 0.0), size)
    return {direction: sum(sizes.values()) for direction, sizes in found.items()}


def touched_bytes(what: Any) -> dict[int, float]:
    """Bytes by storage of a launch or a call."""
    if isinstance(what, Built):
        return {storage_of(x): size for x, size in tensor_bytes(what.kernel, what.arguments).values()}
    return what.read | what.made if isinstance(what, TorchCall) else {}


def records_of(events: list[Event], gpu: Gpu, named: dict) -> list[dict]:
    """Records of an operation's kernels (launches that differ in nothing but sizes together), of PyTorch's
    calls, and of the operators that these are parts of."""
    kernels: dict[tuple, dict] = {}
    operators: dict[str, dict] = {}
    inner: set[int] = set()
    for event in joined_products(events):
        what = event.what
        if isinstance(what, OperatorCall):
            start = {"elements": what.elements, "predicted_us": (0.0, 0.0), "floor_us": 0.0}
            operators[what.name] = {
                **named, "kernel": what.name, "by": "operator", "direction": event.direction, **start,
            }  # fmt: skip
            continue
        if isinstance(what, TorchCall):
            us = torch_us(what, gpu)
            floor = 1e6 * max(what.bytes / gpu.peak_bytes_per_s, what.flops / gpu.matrix_flops)
            key, fields = (what.name, event.direction), {"kernel": what.name, "by": "torch"}
            inner |= what.made.keys()
        else:
            found = predict(what, gpu, frozenset(inner))
            us, floor, fields = found.us, found.floor_us, kernel_fields(what, found)
            key = (what.kernel, event.direction, *sorted((k, str(v)) for k, v in what.options.items()))
            inner |= touched_bytes(what).keys()
        start = {"direction": event.direction, "launches": 0, "predicted_us": (0.0, 0.0), "floor_us": 0.0}
        record = kernels.setdefault(key, {**named, **fields, **start})
        record["launches"] += 1
        for sum_of in [record] + ([operators[event.operator]] if event.operator else []):
            sum_of["predicted_us"] = add(sum_of["predicted_us"], us)
            sum_of["floor_us"] += floor
    return [*kernels.values(), *operators.values()]


def kernel_fields(launch: Built, found: Prediction) -> dict:
    return {
        "kernel": launch.kernel, "by": "triton", "options": launch.options, "programs": launch.programs,
        "warps": launch.warps, "stages": launch.stages, "registers": launch.registers,
        "shared_bytes": launch.shared_bytes,
        "instructions_per_unit": round(found.instructions_per_program), "unit": "program",
        "conversions_in_loop": found.conversions_in_loop, "narrow_loads_in_loop": found.narrow_loads_in_loop,
        "programs_per_sm": found.programs_per_sm, "waves": found.waves, "loops": found.loops,
        "bounds_us": found.bounds_us, "binds": found.binds,
    }  # fmt: skip


def whole_records(
    records: list[dict], moved: dict[str, float], rival: Recorder, gpu: Gpu, named: dict
) -> list[dict]:
    """Forward, backward and both of an operation: sums of its kernels, beside floor and rival.

    Args:
        moved: of `outer_bytes`.
        rival: the reference's calls; its products are the FLOPs of the floor.
    """
    times = rival_us(rival, gpu)
    parts = [r for r in records if r["by"] != "operator"]
    floors: dict[str, float] = {}
    for direction, size in moved.items():
        flops = sum(event.what.flops for event in rival.events if event.direction == direction)
        floors[direction] = 1e6 * max(size / gpu.peak_bytes_per_s, flops / gpu.matrix_flops)
    found = []
    for direction in (*moved, "both"):
        us = (0.0, 0.0)
        for r in parts:
            us = add(us, r["predicted_us"]) if direction in (r["direction"], "both") else us
        floor = sum(floors.values()) if direction == "both" else floors[direction]
        record = {"kernel": "all", "by": "sum", "direction": direction, "predicted_us": us, "floor_us": floor}
        found.append(
            {**named, **record, "rival": "torch.compile", "rival_us": times.get(direction, (0.0, 0.0))}
        )
    return found


def table(records: list[dict], gpu: Gpu) -> str:
    """Markdown: a line a kernel, a line for each direction of an operation."""
    head = (
        "operation", "preset", "kernel", "launches", "programs x warps", "instructions a program", "loops",
        "conversions", "narrow loads", "registers", "programs an SM", "waves", "binds", "predicted us",
        "floor us", "rival us",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in records:
        if r["by"] == "operator":
            continue
        variant = "".join(
            f" {key}" for key, value in r.get("options", {}).items() if value is True and key == "ADD"
        )
        row = [
            r["operation"],
            r["preset"],
            f"{r['kernel'].removesuffix('_kernel')} {r['direction']}{variant}",
        ]
        if r["by"] == "triton":
            loops = ", ".join(f"{x['turns']:g} x {x['instructions']}" for x in r["loops"])
            row += [r["launches"], f"{r['programs']} x {r['warps']}", r["instructions_per_unit"], loops]
            row += [r["conversions_in_loop"], r["narrow_loads_in_loop"], r["registers"]]
            row += [r["programs_per_sm"], r["waves"], " / ".join(r["binds"])]
        else:
            row += [r.get("launches", ""), *[""] * 9]
        rival = as_span(r["rival_us"]) if "rival_us" in r else ""
        cells = [*row, as_span(r["predicted_us"]), f"{r['floor_us']:.1f}", rival]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    note = f"PREDICTED, not measured. Loops: turns x instructions. {gpu.source}."
    return "\n".join([*lines, "", note])


def as_span(us: Span) -> str:
    return f"{us[0]:.1f} to {us[1]:.1f}"
