"""bench/operations.py where there may be no GPU: the check mode, and the floors."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "operations.py"


def load():
    spec = importlib.util.spec_from_file_location("bench_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_check_mode(tmp_path):
    command = [sys.executable, str(SCRIPT), "--check", "--json", str(tmp_path / "check.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["schema"] == "vmae-bench/1"
    assert {"device", "cpu", "cores", "torch", "triton", "python", "commit", "clean", "date"} <= report[
        "environment"
    ].keys()
    assert len(report["records"]) == 20 and all(record["ok"] for record in report["records"])


def test_floors_count_what_the_design_says():
    """ViT-B, batch 32, by hand: 32 * 160 tubelets of 1536 bytes, a 1536 x 768 weight, 768-wide tokens; 12.08
    GFLOP."""
    module = load()
    shape = module.Shape(name="vit_b", batch=32, **module.PRESETS["vit_b"])
    counts = module.floor_counts("embed_visible", shape)["forward"]
    assert counts["bytes"] == 32 * 160 * 1536 + 768 * 1536 * 2 + 32 * 160 * 768 * 2 + 1568 * 768 * 4
    assert counts["matrix"] == 2 * 32 * 160 * 1536 * 768
    assert module.floor_us({"bytes": 3.35e6}, module.H100) == 1.0
    loss = module.floor_counts("patch_loss", shape)
    assert (
        loss["forward"]["bytes"] == 32 * 704 * 1536 * 3 and loss["backward"]["bytes"] == 32 * 704 * 1536 * 5
    )


def test_a_wrong_variant_is_found():
    module = load()
    shape = module.CHECK_SHAPES[0]
    eager = module.variants("patch_loss", compiled=False)["eager"]
    calls = {"eager": eager, "wrong": lambda *x: eager(*x) * 1.01}
    ratios = module.check("patch_loss", shape, calls, "cpu", module.torch.bfloat16)
    assert ratios["eager"] <= 1 < ratios["wrong"]
