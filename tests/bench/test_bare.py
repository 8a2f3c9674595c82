"""With torch, triton, numpy and pytest alone: benchmarks start, step synthetic clips and say what is missing;
kernel tests say why they do not run where the interpreter cannot work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What the four bring with them; optree is torch's own choice where it is installed.
SHOWN = """
torch triton numpy pytest torchgen functorch optree sympy mpmath networkx jinja2 markupsafe filelock fsspec
typing_extensions setuptools _pytest iniconfig packaging pluggy pygments vmae vmae_kernels
"""
HIDE = f"""
import sys
from importlib.machinery import PathFinder

SHOWN = set({SHOWN.split()!r})


class Bare:
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        if path is None and spec is not None and name not in SHOWN:
            places = [str(spec.origin), *(spec.submodule_search_locations or ())]
            if any("site-packages" in place for place in places):
                return None
        return spec

    find_distributions = staticmethod(PathFinder.find_distributions)
    invalidate_caches = staticmethod(PathFinder.invalidate_caches)


sys.meta_path[sys.meta_path.index(PathFinder)] = Bare()
"""
BENCHES = ("operations", "attention", "step", "predict", "scaling", "suite", "dual_vs_encoder")
HIDDEN = ("einops", "av", "decord", "torchcodec", "PIL", "tqdm", "yaml")
CODE = f"""
import importlib, sys

if __name__ == "__main__":  # and not in workers
    sys.path.insert(0, "bench")
    for name in {BENCHES}:
        bench = importlib.import_module(name)
    assert not any(name in sys.modules for name in {HIDDEN})
    small = ["--model", "vit_tiny", "--batch", "1", "--steps", "1", "--warmup", "0", "--device", "cpu"]
    sys.exit(bench.main([*small, "--variants", "reference", "--masking", "dual"]))
"""


@pytest.mark.slow
def test_with_torch_triton_numpy_and_pytest_alone(tmp_path):
    """In every process, so that workers lack the others too."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    (tmp_path / "code.py").write_text(CODE)
    paths = f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(tmp_path / "code.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: synthetic clips, nothing is decoded: " in done.stdout
    assert "reference, dual" in done.stdout


OLD = """
import numpy, triton, pytest

triton.__version__, numpy.__version__ = "3.6.0", "2.4.1"
raise SystemExit(pytest.main(["tests/kernels/test_patch_loss.py", "-q", "-rs", "-p", "no:cacheprovider"]))
"""


@pytest.mark.slow
def test_kernel_tests_are_skipped_where_the_interpreter_fails():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", OLD]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    reason = "triton 3.6.0 with numpy 2.4.1: its interpreter needs numpy below 2.4"
    assert reason in done.stdout and " passed" not in done.stdout and "....." not in done.stdout


def test_which_versions_can_interpret(monkeypatch):
    import interpreter

    found = {}
    for triton, numpy in (("3.6.0", "2.4.0"), ("3.6.0", "2.3.5"), ("3.7.1", "2.4.6"), ("3.6.0+git1", "2.5")):
        monkeypatch.setattr(interpreter.triton, "__version__", triton)
        monkeypatch.setattr(interpreter.numpy, "__version__", numpy)
        monkeypatch.setattr(interpreter.torch.cuda, "is_available", lambda: False)
        found[triton, numpy] = interpreter.why_not_interpreted() is None
    assert list(found.values()) == [False, True, True, False]
    monkeypatch.setattr(interpreter.torch.cuda, "is_available", lambda: True)
    assert interpreter.why_not_interpreted() is None
