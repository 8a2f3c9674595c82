"""`python -m vmae curves`: runs drawn together, finished or not, with reference curves; errors."""

import json
import re

import pytest
from PIL import Image, ImageColor

from vmae import InputError
from vmae.cli import main
from vmae.tools.curves import _SHADES, _STYLES, REFERENCES, draw, read_curve, read_curves


def write_run(folder, steps: int = 100, every: int = 10, tail: str = "", **about):
    folder.mkdir(parents=True)
    lines = [
        {
            "step": s,
            "epoch": s / 50,
            "loss_mean": 1 - s / 1000,
            "lr": 1e-3,
            "grad_norm": 0.1,
            "clips_per_s": 40.0 + s % 20,
        }
        for s in range(every, steps + 1, every)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    if about:
        (folder / "run.json").write_text(json.dumps({"starts": [{"commit": "old"}, about]}))
    return folder


def test_several_runs_in_one_picture(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, steps)) for name, steps in (("a", 100), ("b", 50), ("c", 10))]
    assert main(["curves", *runs, "--output", str(tmp_path / "out.png")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (
        rows[1] == ["a", "100", "0.9000", "0.9000", "45.0"]
        and rows[2][:2] == ["b", "50"]
        and rows[3][:2] == ["c", "10"]
    )
    picture = Image.open(tmp_path / "out.png").convert("L")
    assert picture.width > 1000 and sum(count > 0 for count in picture.histogram()) > 10


def test_a_run_that_was_killed_while_it_wrote(tmp_path):
    folder = write_run(tmp_path / "killed", 60, tail='{"step": 70, "loss_m')
    assert read_curve(folder).records[-1]["step"] == 60
    draw([read_curve(folder)], tmp_path / "killed.pdf")
    assert (tmp_path / "killed.pdf").read_bytes().startswith(b"%PDF")


def test_values_that_were_not_logged_leave_gaps(tmp_path):
    folder = write_run(tmp_path / "old", 20)
    (folder / "log.jsonl").write_text(
        '{"step": 1, "loss_mean": 0.5, "lr": null}\n{"step": 2, "loss_mean": 0.25}\n'
    )
    curve = read_curve(folder)
    assert curve.values("lr") == ([], []) and curve.values("loss_mean") == ([1, 2], [0.5, 0.25])
    assert curve.values("loss_mean", "epoch") == ([], [])
    draw([curve], tmp_path / "gaps.svg")
    assert curve.summary() == {
        "name": "old",
        "steps": 2,
        "loss_of_last_tenth": 0.25,
        "lowest_loss": 0.25,
        "clips_per_s": None,
    }


def test_json(tmp_path, capsys):
    run = write_run(tmp_path / "a", 30, commit="c0ffee", torch="2.13.0", argv=["/private/path"])
    assert main(["curves", str(run), "--by", "epoch", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    curve = content["curves"][0]
    assert content["schema"] == "vmae-curves/1" and curve["about"] == {"commit": "c0ffee", "torch": "2.13.0"}
    assert curve["values"]["loss_mean"] == {"epoch": [0.2, 0.4, 0.6], "value": [0.99, 0.98, 0.97]}
    assert main(["curves", str(run), "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["curves"][0]["steps"] == 30


def test_exported_curves_are_short_and_name_their_run(tmp_path, capsys):
    run = write_run(tmp_path / "long", 5000, commit="c0ffee", clean=True, argv=["/private/path"])
    kept = tmp_path / "long.jsonl"
    assert main(["curves", str(run), "--export", str(kept), "--note", "recipes/pretrain_tiny.sh"]) == 0
    assert "/private/path" not in kept.read_text()
    curve = read_curve(kept)
    assert curve.about == {"note": "recipes/pretrain_tiny.sh", "commit": "c0ffee", "clean": True}
    assert len(curve.records) == 200 and curve.records[-1]["step"] == 5000 and curve.records[0]["step"] == 20
    assert set(curve.records[0]) == {"step", "epoch", "loss_mean", "lr", "grad_norm", "clips_per_s"}
    assert main(["curves", str(run), str(kept), "--export", str(kept)]) == 2
    assert "--export takes one RUN" in capsys.readouterr().err


def test_losses_of_different_targets_are_told(tmp_path, capsys):
    def start(what):
        return {"config": {"derived": {"predicted": what}}}

    names = {"a": "pixels in [0, 1]", "b": "pixels in [0, 1]", "c": "latents of /private/teacher (l1)"}
    runs = {name: str(write_run(tmp_path / name, **start(what))) for name, what in names.items()}
    older = str(write_run(tmp_path / "older", commit="c0ffee"))  # does not say what it predicts
    picture = ["--output", str(tmp_path / "out.png")]
    assert main(["curves", runs["a"], runs["b"], older, *picture]) == 0
    assert capsys.readouterr().err == ""
    assert main(["curves", *runs.values(), older, *picture]) == 0
    both = "a: pixels in [0, 1]; b: pixels in [0, 1]; c: latents of /private/teacher (l1)"
    assert capsys.readouterr().err == f"losses of different targets do not compare: {both}\n"
    kept = tmp_path / "kept.jsonl"
    assert main(["curves", runs["c"], "--export", str(kept)]) == 0 and "private" not in kept.read_text()


def test_reference_curves_lie_below_the_runs(tmp_path):
    run = write_run(tmp_path / "mine")
    reference, mine = read_curves([str(run)], ["tiny"])
    assert reference.reference and reference.name == "reference tiny" and not mine.reference
    draw([reference, mine], tmp_path / "both.png", by="epoch")
    assert (tmp_path / "both.png").stat().st_size > 10_000


@pytest.mark.parametrize("path", sorted(REFERENCES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_references_learn_and_name_their_conditions(path):
    curve = read_curve(path)
    assert {"note", "commit", "torch", "device"} <= set(curve.about) and path.stat().st_size < 60_000
    trivial = re.search(
        r"zero predictor ([\d.]+), mean of the visible tubelets ([\d.]+)", curve.about["note"]
    )
    assert curve.summary()["loss_of_last_tenth"] < 0.5 * min(map(float, trivial.groups()))


def test_runs_of_the_same_name_get_distinct_names(tmp_path):
    runs = [str(write_run(tmp_path / parent / "run")) for parent in ("x", "y")]
    assert [curve.name for curve in read_curves(runs, [])] == runs


def test_neighbouring_lines_differ_without_colour():
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(ImageColor.getrgb, _SHADES)]
    assert len(set(_STYLES)) == 4 and len(_SHADES) % len(
        _STYLES
    )  # so that 20 lines go by before a pair comes again
    assert all(abs(a - b) > 20 for a, b in zip(grey, grey[1:]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to draw"),
        (["nowhere"], "nowhere does not exist"),
        (["empty"], "folder empty has no log.jsonl"),
        (["started"], "has no line of a step yet"),
        (["--reference", "huge"], "no reference curve 'huge'"),
        (["run", "--output", "x.docx"], "docx is no picture format"),
        (["run", "--output", "no/where.png"], "cannot write no/where.png"),
        (["run", "--json", "no/where.json"], "cannot write no/where.json"),
    ],
)
def test_wrong_input_is_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "log.jsonl").write_text("")
    write_run(tmp_path / "run")
    assert main(["curves", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match="no picture without matplotlib"):
        draw([read_curve(write_run(tmp_path / "run"))], tmp_path / "x.png")
