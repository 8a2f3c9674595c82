"""Reads what `cuobjdump --dump-sass` prints of a kernel: its instructions, its loops, and what each warp of a
program executes of them by pipe.

Natural loops of the control flow (a branch back to a block that dominates it). Left out, because no healthy
run executes them: subroutines behind a CALL (the long way of a 64-bit division), blocks that only lead there,
and loops that wait for a copy (SYNCS).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9]*[\w.]*)\s*([^;]*);", re.M)
_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
_REGISTER = re.compile(r"\bU?R\d+\b")
_STEP = re.compile(r"^(U?R\d+)(?:\.reuse)?, (U?R\d+)(?:\.reuse)?, (-?0x[0-9a-f]+)")

# First letters of an opcode up to its first dot, by pipe; the longest that fits counts.
_PIPES = {
    "tensor": "HGMMA QGMMA IGMMA BGMMA HMMA IMMA DMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "conversion": "I2F F2F F2I I2I FRND",
    "special": "MUFU POPC FLO BREV",
    "fma": "FADD FMUL FFMA IMAD IMUL HFMA2 HADD2 HMUL2 FSWZADD FADD2 FMUL2 FFMA2",
    "alu": (
        "IADD IADD3 LOP3 SEL ISETP FSETP FSEL FMNMX FMNMX3 PRMT SHF SHL SHR LEA VIADD VIADDMNMX VIMNMX "
        "VIMNMX3 IMNMX SGXT IABS PLOP3 P2R R2P F2FP I2FP F2IP BMSK MOV CS2R FCHK VABSDIFF "
        "HMNMX2 HSETP2 HSET2 VOTE LOP"
    ),
    "memory": (
        "LDG STG LDS STS LDSM STSM LDGSTS SHFL LDL STL LD ST ATOM ATOMG ATOMS RED REDG REDUX LDC LDTM STTM "
        "MATCH MOVM UTMALDG UTMASTG UBLKCP"
    ),
}
_PIPE_OF = {stem: pipe for pipe, stems in _PIPES.items() for stem in stems.split()}
CONVERSIONS = frozenset(_PIPES["conversion"].split())
LOADS = ("LDG", "LDGSTS", "LD")
COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")


@dataclass(frozen=True)
class Instruction:
    """One line. `name` with its modifiers ("LDG.E.128"); `predicate` "" or "P0", "!P0"."""

    address: int
    name: str
    operands: str = ""
    predicate: str = ""

    @property
    def stem(self) -> str:
        return self.name.split(".")[0]

    @property
    def pipe(self) -> str:
        """tensor, conversion, special, fma, alu, memory, uniform or control."""
        if self.stem in _PIPE_OF:
            return _PIPE_OF[self.stem]
        return "uniform" if self.stem.startswith("U") or self.stem in ("S2UR", "R2UR") else "control"

    @property
    def issued_only(self) -> bool:
        """A slot filled for its timing: predicated off for good."""
        return self.predicate in ("!PT", "!UPT")

    @property
    def bits(self) -> int:
        """Width of one thread's access to memory."""
        sizes = re.findall(r"\.(?:U|S)?(8|16|64|128)\b", self.name)
        return int(sizes[0]) if sizes else 32

    @property
    def target(self) -> int | None:
        """Address that a branch goes to."""
        found = _ADDRESS.search(self.operands)
        return int(found[1], 16) if found and self.stem == "BRA" else None


def read_instructions(text: str) -> list[Instruction]:
    """Instructions of the one kernel in `text`, in order of their addresses."""
    return [
        Instruction(int(address, 16), name, operands.strip(), predicate)
        for address, predicate, name, operands in _LINE.findall(text)
    ]


@dataclass
class Block:
    """Instructions that run one after another."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)

    @property
    def start(self) -> int:
        return self.instructions[0].address


def _successors(last: Instruction, following: int | None) -> list[int]:
    """Addresses that may come after a block's last instruction."""
    always = last.predicate in ("", "PT", "UPT")
    if last.stem in ("EXIT", "RET", "BRX", "JMX"):
        return [] if always or following is None else [following]
    if last.target is None:
        return [] if following is None else [following]
    sure = always and re.fullmatch(r"0x[0-9a-f]+", last.operands) is not None and last.name == "BRA"
    return [last.target] + ([] if sure or following is None else [following])


def basic_blocks(instructions: list[Instruction]) -> dict[int, Block]:
    """Blocks by address, those that the entry reaches."""
    starts = {instructions[0].address}
    for here, following in zip(instructions, instructions[1:]):
        if here.target is not None:
            starts.add(here.target)
        if here.stem in ("BRA", "EXIT", "RET", "BRX", "CALL"):
            starts.add(following.address)
    blocks: dict[int, Block] = {}
    for instruction in instructions:
        if instruction.address in starts:
            current = blocks[instruction.address] = Block([])
        current.instructions.append(instruction)
    order = sorted(blocks)
    for start, after in zip(order, (*order[1:], None)):
        found = _successors(blocks[start].instructions[-1], after)
        blocks[start].successors = [
            address
            for address in found
            if address in blocks
            and address != start
            or address == start
            and len(blocks[start].instructions) > 1
        ]
    reached, waiting = set(), [order[0]]
    while waiting:
        start = waiting.pop()
        if start not in reached:
            reached.add(start)
            waiting += blocks[start].successors
    return {start: blocks[start] for start in order if start in reached}


def _predecessors(blocks: dict[int, Block]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {start: [] for start in blocks}
    for start, block in blocks.items():
        for following in block.successors:
            found[following].append(start)
    return found


def _dominators(blocks: dict[int, Block], before: dict[int, list[int]]) -> dict[int, set[int]]:
    first, everything = next(iter(blocks)), set(blocks)
    found = {start: everything for start in blocks} | {first: {first}}
    changed = True
    while changed:
        changed = False
        for start in blocks:
            if start == first:
                continue
            now = set.intersection(*(found[p] for p in before[start])) | {start}
            if now != found[start]:
                found[start], changed = now, True
    return found


def _cold(blocks: dict[int, Block], before: dict[int, list[int]]) -> set[int]:
    """Blocks that end in a CALL, and those that only such lead to."""
    cold = {start for start, block in blocks.items() if block.instructions[-1].stem == "CALL"}
    changed = True
    while changed:
        more = {start for start in blocks if before[start] and all(p in cold for p in before[start])} - cold
        cold |= more
        changed = bool(more)
    return cold


@dataclass
class Loop:
    """A loop of the binary.

    Attributes:
        header: address of its first block.
        blocks: addresses of all its blocks, inner loops' too.
        body: instructions of one turn, inner loops left out.
        steps: what the registers that decide the branch back may grow by in one turn.
        inner: loops within.
    """

    header: int
    blocks: set[int]
    body: list[Instruction] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    inner: list[Loop] = field(default_factory=list)

    @property
    def everything(self) -> list[Instruction]:
        """Instructions of the loop and of all loops within."""
        return self.body + [x for loop in self.inner for x in loop.everything]


_SETTERS = ("ISETP", "UISETP", "PLOP3", "UPLOP3")


def _registers_behind(predicate: str, code: list[Instruction]) -> set[str]:
    """Registers compared by the last instruction of `code` that sets `predicate`, through uniform ones."""
    for i in range(len(code) - 1, -1, -1):
        if code[i].stem not in _SETTERS:
            continue
        places = re.findall(r"!?U?P(?:\d|T)\b", code[i].operands)
        if predicate in places[: 1 if code[i].stem.endswith("PLOP3") else 2]:
            found = set(_REGISTER.findall(code[i].operands))
            for source in places[1:]:
                if source.lstrip("!") != predicate and source[-1] != "T":
                    found |= _registers_behind(source.lstrip("!"), code[:i])
            return found
    return set()


def _counter_steps(code: list[Instruction], branches: list[Instruction]) -> list[int]:
    """What registers that decide the branch back grow by in a turn."""
    deciding: set[str] = set()
    for branch in branches:
        for predicate in (branch.predicate.lstrip("!"), *re.findall(r"\bU?P\d\b", branch.operands)):
            if predicate:
                deciding |= _registers_behind(predicate, [x for x in code if x.address < branch.address])
    steps = set()
    for x in code:
        found = _STEP.match(x.operands)
        if x.stem in ("VIADD", "IADD3", "UIADD3", "IADD") and found and found[1] == found[2] in deciding:
            step = int(found[3], 16)
            steps.add(min(abs(step), abs(step - (1 << 32))))
    return sorted(steps)


@dataclass
class Kernel:
    """A kernel's code: what runs once, and its outermost loops."""

    straight: list[Instruction]
    loops: list[Loop]

    @property
    def all_loops(self) -> list[Loop]:
        found, waiting = [], list(self.loops)
        while waiting:
            loop = waiting.pop(0)
            found.append(loop)
            waiting = loop.inner + waiting
        return found


def read_kernel(text: str) -> Kernel:
    """Loops of the kernel in `text`, in order of address, those within others inside them."""
    blocks = basic_blocks(read_instructions(text))
    before = _predecessors(blocks)
    dominators, cold = _dominators(blocks, before), _cold(blocks, before)
    loops: dict[int, Loop] = {}
    branches: dict[int, list[Instruction]] = {}
    for start, block in blocks.items():
        for header in block.successors:
            if header in dominators[start]:
                inside, waiting = {header}, [start]
                while waiting:
                    here = waiting.pop()
                    if here not in inside:
                        inside.add(here)
                        waiting += before[here]
                if not _waits(x for here in inside for x in blocks[here].instructions):
                    loops.setdefault(header, Loop(header, set())).blocks |= inside
                    branches.setdefault(header, []).append(block.instructions[-1])
    ordered = sorted(loops.values(), key=lambda loop: (len(loop.blocks), loop.header))
    outer: list[Loop] = []
    for i, loop in enumerate(ordered):
        parent = next((x for x in ordered[i + 1 :] if loop.blocks < x.blocks), None)
        (outer if parent is None else parent.inner).append(loop)
    for loop in ordered:
        loop.inner.sort(key=lambda x: x.header)
        own = loop.blocks.difference(*(x.blocks for x in loop.inner)) - cold
        loop.body = [x for start in sorted(own) for x in blocks[start].instructions]
        loop.steps = _counter_steps(loop.body, branches[loop.header])
    rest = set(blocks).difference(*(loop.blocks for loop in outer)) - cold
    straight = [x for start in sorted(rest) for x in blocks[start].instructions]
    return Kernel(straight, sorted(outer, key=lambda loop: loop.header))


def matrix_flops(instruction: Instruction) -> float:
    """FLOPs of one warp's matrix instruction, from the shape in its name; HGMMA's is four warps' together."""
    if instruction.pipe != "tensor":
        return 0.0
    if found := re.search(r"GMMA\.(\d+)x(\d+)x(\d+)", instruction.name):
        return 2.0 * math.prod(int(side) for side in found.groups()) / 4
    if found := re.search(r"MMA\.(16)(8)(\d+)", instruction.name):
        return 2.0 * math.prod(int(side) for side in found.groups())
    raise ValueError(f"{instruction.name}: a matrix instruction of unknown shape")


def _waits(instructions: Iterable[Instruction]) -> bool:
    """Whether a loop does nothing but wait."""
    stems = {x.stem for x in instructions}
    return "SYNCS" in stems and stems <= {"SYNCS", "BRA", "NANOSLEEP", "NOP", "YIELD"}


def by_pipe(instructions: Iterable[Instruction]) -> Counter[str]:
    return Counter(x.pipe for x in instructions)


def narrow_loads(instructions: Iterable[Instruction]) -> int:
    """Loads from global memory of less than 32 bits a thread."""
    return sum(x.stem in LOADS and not x.issued_only and x.bits < 32 for x in instructions)


def conversions(instructions: Iterable[Instruction]) -> int:
    """Conversions of the slow pipe, 16 lanes a cycle."""
    return sum(x.stem in CONVERSIONS for x in instructions)
