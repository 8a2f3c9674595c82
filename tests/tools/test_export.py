"""`python -m vmae export`: one file with published names from whatever holds weights."""

import sys

import pytest
import torch

from vmae import InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.folder import CheckpointFolder, export_weights
from vmae.checkpoint.published import load_weights
from vmae.checkpoint.saver import Saver
from vmae.cli import main
from vmae.evaluate.encoder import load_encoder
from vmae.evaluate.reconstruct import load_model
from vmae.tools import graphs

CONFIG = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4, depth=1)


@pytest.fixture
def run(tmp_path):
    """A run's folder with two checkpoints, and the newer one's weights."""
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        state = build_pretrainer(CONFIG).state_dict()
        about = {"config": {"model": CONFIG.to_dict(), "stride": 2}}
        Saver(CheckpointFolder(tmp_path / "run")).save(step, {"model": state, "optimizer": {}}, about)
    return tmp_path / "run", state


@pytest.mark.parametrize("name", ["out.pth", "new/out.safetensors"])
@pytest.mark.parametrize("source", ["", "checkpoint-00000002"])
def test_a_runs_newest_weights_become_one_file(run, tmp_path, capsys, name, source):
    folder, state = run
    assert main(["export", str(folder / source), str(tmp_path / name)]) == 0
    assert f"checkpoint-00000002: {len(state)} tensors" in capsys.readouterr().out
    read = load_weights(tmp_path / name)
    assert read.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in read.items())
    model, settings = load_model(tmp_path / name)  # the file says which architecture it is of
    assert model.config == CONFIG and settings["stride"] == 2


def test_official_weights_are_converted_too(tmp_path):
    state = build_pretrainer(CONFIG).state_dict()
    torch.save({"module": state}, tmp_path / "official.pth")
    assert main(["export", str(tmp_path / "official.pth"), str(tmp_path / "out.safetensors")]) == 0
    assert load_weights(tmp_path / "out.safetensors").keys() == state.keys()


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("gone", "out.pth", "gone does not exist"),
        (".", "out.pth", "holds no complete checkpoint"),
        ("run", "out.bin", "must end with .pth"),
        ("run", "file/out.pth", "not writable"),
    ],
)
def test_wrong_input_is_named(run, tmp_path, monkeypatch, capsys, source, output, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(["export", source, output]) == 2
    assert words in capsys.readouterr().err


# --- .pt2 and .onnx ---


GRAPHS = [".pt2", pytest.param(".onnx", marks=pytest.mark.needs_onnx)]


@pytest.fixture(autouse=True)
def _onnx(request):
    if request.node.get_closest_marker("needs_onnx"):
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)


@pytest.fixture
def classifier(tmp_path):
    """A fine-tuned model's file, and the model."""
    model = build_classifier(CONFIG, 3).eval()
    clip = {"num_frames": 4, "image_size": 32, "stride": 2}
    about = {"model": CONFIG.to_dict(), "clip": clip, "pooling": "mean", "class_names": ["a", "b", "c"]}
    export_weights(tmp_path / "classifier.pth", model.state_dict(), config=about)
    return tmp_path / "classifier.pth", model


def run_graph(path, clips):
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(clips)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])


@pytest.mark.parametrize("suffix", GRAPHS)
@pytest.mark.parametrize("what", ["logits", "features", "tokens"])
def test_a_classifier_becomes_a_graph_for_any_batch(classifier, tmp_path, capsys, suffix, what):
    path, model = classifier
    out = tmp_path / "new" / f"model{suffix}"
    assert main(["export", str(path), str(out), "--what", what]) == 0
    assert f"{what} of clips 3 x 4 x 32 x 32, any batch" in capsys.readouterr().out
    assert [file.name for file in out.parent.iterdir() if file.suffix != ".data"] == [out.name]
    for batch in (1, 2, 5):
        clips = torch.randn(batch, 3, 4, 32, 32)
        with torch.no_grad():
            expected = {"logits": model, "features": model.features, "tokens": model.tokens}[what](clips)
            torch.testing.assert_close(run_graph(out, clips), expected, rtol=1e-4, atol=1e-5)
    about = graphs.read_about(out)
    assert (
        about["frames"] == 4
        and about["size"] == [32, 32]
        and about["output"] == what
        and about["mean"][0] == 0.485
    )
    assert about.get("classes") == (None if what == "tokens" else ["a", "b", "c"])


@pytest.mark.parametrize("suffix", GRAPHS)
def test_tokens_of_a_pretrained_encoder(run, tmp_path, suffix):
    folder, _ = run
    assert main(["export", str(folder), str(tmp_path / f"encoder{suffix}"), "--what", "tokens"]) == 0
    clips, model = torch.randn(2, 3, 4, 32, 32), load_encoder(folder).model
    with torch.no_grad():
        torch.testing.assert_close(
            run_graph(tmp_path / f"encoder{suffix}", clips), model.tokens(clips), rtol=1e-4, atol=1e-5
        )


def test_other_frames_and_sizes(classifier, tmp_path):
    out = tmp_path / "model.pt2"
    assert main(["export", str(classifier[0]), str(out), "--num-frames", "8", "--image-size", "48"]) == 0
    assert (
        run_graph(out, torch.randn(2, 3, 8, 48, 48)).shape == (2, 3) and graphs.read_about(out)["frames"] == 8
    )


def test_a_graph_that_is_off_is_not_kept(classifier, tmp_path, monkeypatch):
    load = graphs._load_pt2
    monkeypatch.setattr(graphs, "_load_pt2", lambda path: lambda clips: load(path)(clips) * 1.001)
    with pytest.raises(
        graphs.ExportError, match=r"off.pt2 is not written: its logits of 1 clips are 1.0e-03 off"
    ):
        graphs.export_graph(graphs.ClipModel(classifier[1]), tmp_path / "off.pt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.pth"]


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("x.pth", ["--averaged"], "--averaged: for .pt2 and .onnx only"),
        (
            "x.safetensors",
            ["--what", "logits", "--num-frames", "8"],
            "--what, --num-frames: for .pt2 and .onnx only",
        ),
        ("x.pt2", ["--averaged", "--what", "tokens"], "name the run's weights_ema.pth as the source"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(classifier, tmp_path, capsys, name, flags, told):
    assert main(["export", str(classifier[0]), str(tmp_path / name), *flags]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / name).exists()


@pytest.mark.parametrize("error", [RuntimeError("boom\nand more"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["export", "save", "load"])
def test_what_the_exporter_raises_is_one_line(classifier, tmp_path, monkeypatch, capsys, step, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.export, step, fail)
    assert main(["export", str(classifier[0]), str(tmp_path / "x.pt2")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ") and f"x.pt2 is not written: {str(error).splitlines()[0]}" in told
    assert [path.name for path in tmp_path.iterdir()] == ["classifier.pth"]


@pytest.mark.parametrize("package", ["onnxscript", pytest.param("onnxruntime", marks=pytest.mark.needs_onnx)])
def test_a_missing_package_is_told_before_any_work(tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(
        "vmae.tools.export.load_classifier", lambda *args, **kwargs: pytest.fail("the weights were read")
    )
    assert main(["export", str(tmp_path / "gone.pth"), str(tmp_path / "x.onnx")]) == 2
    assert "`pip install onnx onnxscript onnxruntime`" in capsys.readouterr().err


def test_graphs_say_what_they_need(run, classifier, tmp_path, monkeypatch, capsys):
    assert main(["export", str(run[0]), str(tmp_path / "x.pt2")]) == 2
    assert "has no head" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(classifier[0]), str(tmp_path / "x.onnx")]) == 2
    assert "`pip install onnx onnxscript onnxruntime`" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.glob(".export-*"))
    with pytest.raises(InputError, match="must end with .pt2 or .onnx"):
        graphs.export_graph(graphs.ClipModel(classifier[1]), tmp_path / "x.bin")
    with pytest.raises(InputError, match="unknown output 'classes'"):
        graphs.ClipModel(classifier[1], "classes")
    with pytest.raises(InputError, match="a model without a head"):
        graphs.ClipModel(load_encoder(run[0]).model)
