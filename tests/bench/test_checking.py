"""The check of what is timed: right variants pass and a wrong gradient does not, in both dtypes."""

import math
import sys
from dataclasses import replace

import pytest
import torch

OTHERS = """
import torch

from vmae import build_pretrainer, build_reference


def wrong(config):
    model = build_pretrainer(config, backend="torch")
    model.encoder.blocks[0].mlp.fc1.weight.register_hook(lambda grad: grad * 1.05)
    return model


class Renamed(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = build_reference(config)

    def forward(self, clips, mask):
        return self.model(clips, mask)
"""


@pytest.fixture
def job(benches, tiny, clips_of, tmp_path, monkeypatch):
    """A job of the tiny model on a file of 6 clips, of which a backward of the reference takes 4."""
    stepping = benches("stepping")
    torch.save(clips_of(tiny, 6), tmp_path / "clips.pt")
    (tmp_path / "others.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = dict(model="tiny", config=tiny, variant="torch", masking="dual", device="cpu", dtype="float32")
    yield stepping.StepJob(**known, batch=6, threads=1, clips=str(tmp_path / "clips.pt"))
    sys.modules.pop("others", None)


def expected_of(job, at_once=4):
    from harness.checking import Reference

    return Reference(job, at_once).expected(job.masking)


def found_of(job, variant):
    from harness.stepping import Stepper

    return Stepper(replace(job, variant=variant)).gradients()


@pytest.mark.parametrize("masking", ["dual", "encoder_only"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_variants_pass_and_every_gradient_counts(job, dtype, masking):
    job = replace(job, dtype=dtype, masking=masking)
    expected = expected_of(job)
    for variant in ("reference", "reference+sdpa", "torch"):
        found = found_of(job, variant)
        check = expected.check(found)
        assert check.why_wrong(dtype) is None, (variant, check)
        assert check.note == "" and check.compared == len(found.norms) + 1
        assert check.loss_bound <= {"float32": 2e-6, "bfloat16": 1e-3}[dtype]
        assert check.widest_bound <= {"float32": 1e-5, "bfloat16": 0.045}[dtype]
        for name, norm in found.norms.items():
            for other in (norm * 1.05, norm * 0.95, 0.0, math.nan):
                wrong = replace(found, norms={**found.norms, name: other})
                why = expected.check(wrong).why_wrong(dtype)
                assert why and (math.isnan(other) or f"gradient's norm of {name} differs" in why), name
        for loss in (found.loss * (1 + 3 * check.loss_bound), math.nan):
            why = expected.check(replace(found, loss=loss)).why_wrong(dtype)
            assert why and why.startswith("loss differs from the reference's by"), why


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_gradient_behind_a_right_loss(job, dtype):
    job = replace(job, dtype=dtype)
    expected = expected_of(job)
    found = found_of(job, "wrong=others:wrong")
    assert found.loss == found_of(job, "torch").loss
    why = expected.check(found).why_wrong(dtype)
    assert "gradient's norm of encoder.blocks.0.mlp.fc1.weight differs from the reference's by" in why
    assert f"allowed in {dtype}" in why


def test_the_batch_in_parts_is_the_whole(job):
    whole, parts = expected_of(job, 6), expected_of(job, 4)
    assert parts.precise.loss == pytest.approx(whole.precise.loss, rel=1e-12)
    assert parts.precise.norms == pytest.approx(whole.precise.norms, rel=1e-12)


def test_other_names_are_compared_by_the_norm_over_all(job):
    expected = expected_of(job)
    found = found_of(job, "renamed=others:Renamed")
    check = expected.check(found)
    assert check.why_wrong("float32") is None and check.compared == 1
    assert check.parameter == "all gradients" and "other names" in check.note
    wrong = replace(found, norms={name: norm * 1.01 for name, norm in found.norms.items()})
    assert "gradient's norm of all gradients" in expected.check(wrong).why_wrong("float32")
    assert expected.check(wrong, allowance=0.02).why_wrong("float32") is None


def test_tf32_is_off_in_the_precise_run_only(benches):
    checking = benches("checking")
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        with checking._without_tf32():
            assert not any(backend.allow_tf32 for backend in backends)
        assert all(backend.allow_tf32 for backend in backends)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_the_reference_takes_one_clip_where_four_do_not_fit(benches, job, monkeypatch):
    from harness import checking
    from harness.worker import WorkerError

    made = []

    class Fake:
        def __init__(self, make, job, name):
            made.append(make.keywords["at_once"])

        def wait_ready(self):
            if made[-1] == 4:
                raise WorkerError("reference", "OutOfMemoryError: no", True)

        def ask(self, method, masking):
            return masking

        def close(self):
            pass

    monkeypatch.setattr(checking, "Worker", Fake)
    assert checking.expect(job, ["dual", "encoder_only"]) == {"dual": "dual", "encoder_only": "encoder_only"}
    assert made == [4, 1]
