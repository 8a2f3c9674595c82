"""What the device tests run: a whole training step, operations, streams, graphs; on a CPU the nearest to it.

As a script, `python tests/device/device_steps.py`, it takes one step: what compute-sanitizer looks at.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vmae_kernels
from vmae import DualMask, MaskConfig, ModelConfig, build_pretrainer
from vmae_kernels.backend import OPERATIONS

BATCH, WARMUP = 2, 3
Arguments = tuple[Tensor, ...]


def small_config() -> ModelConfig:
    """4 x 4 x 4 tokens; head dims 16."""
    encoder = dict(embed_dim=48, depth=2, num_heads=3)
    decoder = dict(decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
    return ModelConfig(img_size=64, num_frames=8, **encoder, **decoder)


@dataclass
class Step:
    """A model with all that a step of it needs, on one device; `step()` gives the loss, on the device."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    clips: Tensor
    mask: DualMask

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.clips.device.type, dtype=torch.bfloat16):
            loss = self.model(self.clips, self.mask)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def make_step(device: torch.device | str, seed: int = 0) -> Step:
    """The same for the same seed; on a GPU with Triton's kernels and an optimizer that reads nothing back."""
    device, config = torch.device(device), small_config()
    on_gpu = device.type == "cuda"
    torch.manual_seed(seed)
    model = build_pretrainer(config, backend="triton" if on_gpu else "torch").to(device)
    shape = (BATCH, config.num_frames, *config.image_hw, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8)
    mask = DualMask.sample(BATCH, config.grid, **MaskConfig(encoder_ratio=0.75).to_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=on_gpu, capturable=on_gpu)
    return Step(model, optimizer, clips.to(device), mask.to(device))


def capture(work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function that replays `work` as a CUDA graph and gives its result, which the next replay overwrites.

    `work` has run before, on a side stream as torch asks for. On a CPU the function is `work`.
    """
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work in here is on a stream of its own; before it and after it the current stream is in step."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held(device: torch.device) -> int:
    """Bytes of tensors that live on a GPU; on a CPU the number of tensors that live."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    # Looked at by type: some objects compute an attribute when asked for it.
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """An operation in here that waits for the GPU is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- operations ---------------------------------------------------------------------------------------------


def arguments_of(seed: int) -> dict[str, Arguments]:
    """On the CPU: small arguments of operations that between them launch every kind of kernel."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sides: int) -> Tensor:
        return torch.randn(*sides, generator=generator)

    def tokens(count: int, total: int) -> Tensor:
        drawn = torch.rand(BATCH, total, generator=generator)
        return drawn.argsort(1)[:, :count].sort(1).values.int()

    clips = torch.randint(0, 256, (BATCH, 4, 16, 16, 3), dtype=torch.uint8, generator=generator)
    counted, weight = tokens(5, 32), torch.ones(BATCH, 5)
    embed = (clips, tokens(6, 32), 0.05 * normal(40, 3, 2, 4, 4), normal(40), normal(32, 40))
    head = (normal(BATCH, 5, 24), 0.05 * normal(96, 24), normal(96), clips, counted, weight)
    return {
        "embed_visible": embed,
        "assemble_decoder_tokens": (
            normal(BATCH, 6, 24), normal(1, 1, 24), normal(32, 24), tokens(6, 32), tokens(8, 32),
        ),
        "layer_norm": (normal(BATCH, 7, 40), normal(40), normal(40)),
        "select_decoded": (normal(BATCH, 14, 24), normal(24), normal(24), 6 + tokens(5, 8)),
        "patch_loss": (normal(BATCH, 5, 96), clips, counted, weight),
        "head_patch_loss": head,
    }  # fmt: skip


def run_operation(name: str, arguments: Arguments, device: torch.device) -> list[Tensor]:
    """Result of an operation and gradients of all that it learns, under a fixed upstream gradient; nothing is
    waited for."""
    call, learned = getattr(vmae_kernels, name), OPERATIONS[name].learned
    moved = dict(zip(inspect.signature(call).parameters, (x.to(device) for x in arguments)))
    leaves = [moved[key].requires_grad_() for key in learned]
    found: Any = call(**moved, backend="triton")
    results = [x for x in (found if isinstance(found, tuple) else (found,)) if x.requires_grad]
    upstream = [torch.linspace(-1, 1, x.numel(), device=device).reshape(x.shape) for x in results]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves, upstream)]


if __name__ == "__main__":
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = float(make_step(here)())
    if not 0 < loss < 100:
        raise SystemExit(f"loss {loss}")
    print(f"one step on {here}: loss {loss:.4f}")
