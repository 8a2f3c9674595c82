"""What each attention backend pays at a shape: predicted from the tiles of its kernels.

A kernel multiplies tiles: its head dim is padded to a width it was built for (`AttentionBackend.tiles`), its
queries and keys to rows of a tile. 160 or 208 tokens are one or two tiles, so that most of what a kernel does
may be padding. Counted are FLOPs with the padding, exponentials, bytes, and programs against processors.
Forward alone, and forward with backward. Every time here is a prediction.

Tiles (queries x keys) from the kernels' sources, looked up in 2026, run by nobody in this project:
flash-attention's flash_fwd_launch_template.h and flash_bwd_launch_template.h (2), hopper/tile_size.h and
hopper/flash_bwd_launch_template.h (3), flash_attn/cute/interface.py (4, Hopper's forward; the backward's are
not looked up), and the names of the CUTLASS kernels in torch's mem_eff_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from harness.attention_runs import ELEMENTS, MODES, Shape
from harness.results.attention import BackendPrediction, PredictedTime
from harness.results.operations import Rates
from vmae.model.attention.choice import BACKENDS

Tile = tuple[int, int]  # rows of queries, rows of keys


@dataclass(frozen=True, kw_only=True)
class TokenTiles:
    """Tiles of a backend's kernels by padded head dim; None where they are not known."""

    forward: Callable[[int], Tile | None]
    backward: Callable[[int], Tile | None] = lambda width: None
    packed: bool = False  # one packed gradient comes out: none is stacked
    matrix: bool = False  # the softmax matrix goes through memory
    ampere: bool = False  # written for sm_80: its instructions do not reach Hopper's peak


def _table(**tiles: Tile) -> Callable[[int], Tile | None]:
    """Tile of the smallest width that holds the head dim; names are "up_to_WIDTH"."""
    widths = sorted((int(name.removeprefix("up_to_")), tile) for name, tile in tiles.items())
    return lambda width: next((tile for most, tile in widths if width <= most), None)


_FLASH2 = TokenTiles(
    forward=_table(up_to_64=(128, 128), up_to_128=(128, 64)),
    backward=_table(up_to_64=(128, 128), up_to_96=(64, 128), up_to_128=(64, 128)),
    ampere=True,
)
_FLASH2_PACKED = replace(_FLASH2, packed=True)
_FLASH3 = TokenTiles(
    forward=_table(up_to_64=(192, 192), up_to_96=(192, 144), up_to_128=(128, 176)),
    backward=_table(up_to_64=(128, 128), up_to_96=(64, 128), up_to_128=(80, 128)),
)
_FLASH3_PACKED = replace(_FLASH3, packed=True)
_FLASH4 = TokenTiles(forward=_table(up_to_64=(192, 128), up_to_96=(192, 144), up_to_128=(128, 128)))
_CUTLASS = TokenTiles(
    forward=_table(up_to_64=(64, 64), up_to_128=(64, 128)),
    backward=_table(up_to_64=(64, 64), up_to_96=(128, 64), up_to_128=(128, 64)),
    ampere=True,
)
_PLAIN = TokenTiles(forward=lambda width: (1, 1), backward=lambda width: (1, 1), matrix=True)
TOKEN_TILES: dict[str, TokenTiles] = {
    "flash2": _FLASH2_PACKED,
    "flash3": _FLASH3_PACKED,
    "flash4": _FLASH4,
    "xformers": _CUTLASS,
    "sdpa_flash": _FLASH2,
    "sdpa_flash3": _FLASH3,
    "sdpa_flash4": _FLASH4,
    "sdpa_efficient": _CUTLASS,
    "sdpa_math": _PLAIN,
    "softmax": _PLAIN,
}
# Between these two a time is expected: shares of the peaks of matrix units, exponentials, and bytes.
FAST, SLOW = 0.7, 0.3
PROCESSORS = {"H100": 132, "A100": 108}
# Share of the matrix peak that sm_80's instructions (mma) reach: arXiv 2402.13499 measured 63 % on an H100.
AMPERE_SHARE = {"H100": 0.63, "A100": 1.0}
# Exponentials of a processor and cycle (special function units), and cycles a microsecond.
EXPONENTIALS, MHZ = 16, {"H100": 1_755, "A100": 1_410}
# Products of the kind N x N x d: forward q k^T, p v; backward four, and the scores again where they are not
# kept.
PRODUCTS = {"forward": 2, "backward": 5}
# Times that the plain backends move the softmax matrix: written, read by softmax, written, read by the
# product; in the backward five more, as autograd runs it.
MATRIX_PASSES = {"forward": 4, "backward": 5}


def padded(count: int, tile: int) -> int:
    return -(-count // tile) * tile


def predict(
    backend: str, shape: Shape, gpu: str, rates: Rates, element_bytes: int = 2
) -> list[BackendPrediction]:
    """Forward, and forward with backward; empty where the tiles are not published."""
    widths, tiles = BACKENDS[backend].tiles(shape.head_dim, True), TOKEN_TILES.get(backend)
    if widths is None or tiles is None:
        return []
    width = max(widths)
    known = {"forward": tiles.forward(width), "backward": tiles.backward(width)}
    found = []
    for mode in MODES:
        parts = ["forward"] if mode == "forward" else ["forward", "backward"]
        if any(known[part] is None for part in parts):
            continue
        found.append(_predict(backend, shape, mode, parts, known, widths, gpu, rates, element_bytes))
    return found


def _predict(
    backend: str,
    shape: Shape,
    mode: str,
    parts: list[str],
    known: dict[str, Tile | None],
    widths: tuple[int, int],
    gpu: str,
    rates: Rates,
    element_bytes: int,
) -> BackendPrediction:
    tiles, heads = TOKEN_TILES[backend], shape.batch * shape.heads
    flops = exponentials = programs = 0
    times = {FAST: 0.0, SLOW: 0.0}
    for part in parts:
        rows, columns = known[part] or (1, 1)
        scores = heads * padded(shape.tokens, rows) * padded(shape.tokens, columns)
        products = PRODUCTS[part] - (part == "backward" and tiles.matrix)
        work = products * scores * sum(widths)  # 2 FLOPs x a mean width of sum / 2
        # The backward goes over blocks of keys, each a program; the forward over those of queries.
        count = heads * -(-shape.tokens // (rows if part == "forward" else columns))
        # Programs run at once in waves of whole processors, two on each: the last wave is not full.
        slots = 2 * PROCESSORS[gpu]
        waves = 1.0 if rows == 1 else -(-count // slots) * slots / count
        matrix = work / rates.matrix_flops / (AMPERE_SHARE[gpu] if tiles.ampere else 1.0)
        special = scores / (PROCESSORS[gpu] * EXPONENTIALS * MHZ[gpu] * 1e6)
        moved = _moved(shape, part, tiles, element_bytes)
        for share in times:
            # At best matrix units and exponentials overlap, as in flash-attention 3; at worst they add up.
            busy = max(matrix, special) if share == FAST else matrix + special
            tail = 1.0 if share == FAST else waves
            times[share] += 1e6 * max(busy * tail, moved / rates.bytes_per_s) / share
        flops, exponentials, programs = flops + work, exponentials + scores, programs + count
    useful = shape.flops(mode)
    rows, columns = known[parts[-1]] or (1, 1)
    return BackendPrediction(
        backend=backend,
        shape=shape.name,
        tokens=shape.tokens,
        head_dim=shape.head_dim,
        batch=shape.batch,
        mode=mode,
        gpu=gpu,
        head_dim_padded=max(widths),
        query_rows=padded(shape.tokens, rows),
        key_rows=padded(shape.tokens, columns),
        head_dim_factor=sum(widths) / (2 * shape.head_dim),
        token_factor=padded(shape.tokens, rows) * padded(shape.tokens, columns) / shape.tokens**2,
        flop_factor=flops / useful,
        flops=flops,
        exponentials=exponentials,
        bytes=sum(_moved(shape, part, tiles, element_bytes) for part in parts),
        programs=programs,
        predicted_us=PredictedTime(fast=times[FAST], slow=times[SLOW]),
    )


def _moved(shape: Shape, part: str, tiles: TokenTiles, element_bytes: int) -> float:
    """Bytes of a direction: q, k, v, output (and their gradients), the softmax matrix of the plain ones, and
    the stacking of three gradients into one, which reads and writes each once."""
    values = shape.batch * shape.tokens * shape.heads * shape.head_dim
    elements = (
        ELEMENTS["forward"] if part == "forward" else ELEMENTS["forward_backward"] - ELEMENTS["forward"]
    )
    total = elements * values
    if part == "backward" and not tiles.packed:
        total += 6 * values
    if tiles.matrix:
        total += MATRIX_PASSES[part] * shape.batch * shape.heads * shape.tokens**2
    return float(total * element_bytes)
