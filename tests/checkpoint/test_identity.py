"""What a result depends on: seen by its bytes, and compared by every command that adds to an earlier
result."""

import json
import shutil

import pytest
import torch
from torch import nn

from vmae import InputError, ModelConfig, build_classifier
from vmae.checkpoint.folder import export_weights
from vmae.checkpoint.identity import fingerprint, list_hash, model_identity
from vmae.cli import main
from vmae.data.labels import convert_head
from vmae.data.manifest import VideoEntry
from vmae.files.settled import check_same, settle
from vmae.synthetic.samples import sample_videos

CONFIG = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4, embed_dim=48, depth=1, num_heads=3)


class Holder(nn.Module):
    """Parameters of given names and values."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value, requires_grad=False))


def test_a_fingerprint_is_of_the_bytes():
    a, b = torch.randn(6), torch.randn(6)
    seen = [
        fingerprint(Holder(**values))
        for values in (
            dict(a=a, b=b),
            dict(a=b, b=a),
            dict(a=a.flip(0), b=b),
            dict(a=-a, b=b),
            dict(a=a.view(2, 3), b=b),
            dict(a=a.view(torch.int32), b=b),
            dict(a=a.bfloat16(), b=b),
            dict(a=a),
            dict(a=a, c=b),
            dict(a=torch.zeros(6), b=b),
            dict(a=-torch.zeros(6), b=b),
        )
    ]
    assert len(set(seen)) == len(seen)
    assert (
        fingerprint(Holder(a=torch.stack([a, b], 1)[:, 0], b=b))
        == fingerprint(Holder(b=b.clone(), a=a))
        == seen[0]
    )
    assert fingerprint(Holder(a=torch.tensor(1.0), b=torch.empty(0))) != fingerprint(
        Holder(a=torch.tensor(1.0))
    )
    plain = nn.BatchNorm1d(2)
    before = fingerprint(plain)
    plain.running_mean += 1  # a buffer
    assert fingerprint(plain) != before == fingerprint(nn.BatchNorm1d(2))


def test_a_fingerprint_does_not_depend_on_threads():
    model = Holder(**{name: torch.randn(1_000_000) for name in "abcd"})
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(fingerprint(model))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_the_identity_of_a_model_sees_what_its_weights_do_not():
    def identity(pooling="mean", head=1.0, without=(), **changes):
        torch.manual_seed(0)
        model = build_classifier(CONFIG.replace(**changes), 3, pooling=pooling, init_scale=head)
        return json.dumps(model_identity(model, without=without))

    different = [
        identity(),
        identity(num_heads=4),
        identity(pos_grid=(2, 3, 3)),
        identity(layer_norm_eps=1e-5),
    ]
    different += [
        identity(pooling="first"),
        identity(qk_scale=0.3),
        identity(num_frames=8, pos_grid=(2, 2, 2)),
    ]
    different += [identity(head=2.0)]
    assert len(set(different)) == len(different)
    same = [
        identity(drop_path_rate=0.1),
        identity(decoder_depth=1),
        identity(pos_grid=(2, 2, 2)),
        identity(img_size=(32, 32)),
    ]
    assert set(same) == {identity(), identity(qk_scale=0.25)}
    assert identity(without=("head.",)) == identity(head=2.0, without=("head.",))


def test_a_list_is_its_content():
    entries = [VideoEntry("a.mp4", line=1), VideoEntry("b.mp4", line=2)]
    plain = list_hash(entries, [(0,), (1,)])
    assert plain == list_hash([VideoEntry("a.mp4", line=5), VideoEntry("./b.mp4")], [(0,), (1,)])
    others = [
        list_hash(entries, [(1,), (0,)]),
        list_hash(entries[::-1], [(0,), (1,)]),
        list_hash(entries[:1], [(0,)]),
        list_hash([VideoEntry("a.mp4", stride=2), entries[1]], [(0,), (1,)]),
        list_hash(entries, [(0,), (0, 1)]),
        list_hash([VideoEntry("a.mp4", "frames", 1, 10), entries[1]], [(0,), (1,)]),
    ]
    assert len({plain, *others}) == 7


def test_differences_are_named_in_one_line(tmp_path):
    before = {"clip": {"stride": 2, "sampling": "dense"}, "weights": "a" * 64, "dtype": "float32", "more": 1}
    now = {
        "clip": {"stride": 4, "sampling": "dense"},
        "weights": "b" * 64,
        "dtype": "float32",
        "size": (2, 3),
    }
    with pytest.raises(InputError) as raised:
        check_same(before, now, "DIR holds another test", "remove it")
    expected = (
        "DIR holds another test (there and now: clip.stride 2, 4; weights differs; size null, [2, 3]); "
        "remove it"
    )
    assert str(raised.value) == expected
    settle(tmp_path / "out" / "about.json", {"a": (1, 2)}, "another test", noted=1)
    settle(tmp_path / "out" / "about.json", {"a": (1, 2)}, "another test", noted=2)
    for text in ("{", "17", '"x"', "[]", "{}", "\udcff"):
        (tmp_path / "out" / "about.json").write_text(text, errors="surrogateescape")
        with pytest.raises(InputError, match="settings file .*about.json|holds another test"):
            settle(tmp_path / "out" / "about.json", {"a": (1, 2)}, "another test")


# --- The commands: one setting at a time ---


@pytest.fixture(scope="module")
def world(labelled_world, tmp_path_factory):
    """Weights of three classes, and of the same with two heads exchanged; lists; two videos of one name."""
    folder = tmp_path_factory.mktemp("identity")
    torch.manual_seed(1)
    model = build_classifier(CONFIG, 3)
    nn.init.normal_(model.head.weight)
    settings = {"model": CONFIG.to_dict(), "clip": {"num_frames": 4, "image_size": 32, "stride": 2}}
    export_weights(folder / "weights.pth", model.state_dict(), config=settings)
    export_weights(folder / "exchanged.pth", convert_head(model.state_dict(), [1, 0, 2]), config=settings)
    (folder / "map.json").write_text("[1, 0, 2]")
    lines = (labelled_world / "val.txt").read_text().splitlines(keepends=True)[:2]
    (folder / "val.txt").write_text("".join(lines))
    (folder / "renamed.txt").write_text("# a comment\n" + "".join(lines))
    (folder / "reversed.txt").write_text("".join(lines[::-1]))
    (folder / "other_labels.txt").write_text("".join(lines).replace(" 1\n", " 2\n"))
    (folder / "several.txt").write_text("".join(lines).replace(" 1\n", " 1;2\n"))
    (folder / "x").mkdir()
    (folder / "x" / "carphone_pristine.mp4").write_bytes(sample_videos()[2].read_bytes())
    return folder


EVALUATE = ["--device", "cpu", "--segments", "1", "--crops", "1", "--workers", "0"]


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory):
    """A test of `weights.pth` on `val.txt`."""
    out = tmp_path_factory.mktemp("evaluated")
    words = ["--checkpoint", str(world / "weights.pth"), "--output", str(out), *EVALUATE]
    assert main(["evaluate", str(world / "val.txt"), *words]) == 0
    return out


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--label-map", "map.json"], "weights differs"),
        (["--checkpoint", "exchanged.pth"], "weights differs"),
        (["--segments", "2"], "views.segments 1, 2"),
        (["--crops", "2"], "views.crops 1, 2"),
        (["--sampling", "sparse", "--segments", "1"], 'clip.sampling "dense", "sparse"'),
        (["--stride", "1"], "clip.stride 2, 1"),
        (["--image-size", "48"], "size [32, 32], [48, 48]"),
        (["--num-frames", "2"], "frames 4, 2"),
        (["--dtype", "bfloat16"], 'dtype "float32", "bfloat16"'),
        (["--scores"], "scores false, true"),
        (["reversed.txt"], "list differs"),
        (["other_labels.txt"], "list differs"),
        (["several.txt"], "multi_label false, true"),
        (["--batch-size", "1", "--workers", "1", "--backend", "torch", "--attention", "softmax"], None),
        (["renamed.txt", "--image-size", "32x32"], None),
    ],
)
def test_evaluate(world, evaluated, tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(world)
    shutil.copytree(evaluated, tmp_path / "out")
    listed = [] if flags[0].endswith(".txt") else ["val.txt"]
    code = main(
        [
            "evaluate",
            *listed,
            *EVALUATE,
            "--checkpoint",
            "weights.pth",
            "--output",
            str(tmp_path / "out"),
            *flags,
        ]
    )
    err = capsys.readouterr().err
    if named is None:
        assert code == 0
    else:
        assert (
            code == 2
            and len(err.splitlines()) == 1
            and "holds another test (there and now: " in err
            and named in err
        ), err
        assert "choose another --output, or remove" in err
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == (
        evaluated / "predictions.jsonl"
    ).read_bytes()


@pytest.fixture(scope="module")
def featured(world, tmp_path_factory):
    """Features of a video, and the words that made them."""
    out = tmp_path_factory.mktemp("features")
    words = [
        "--checkpoint",
        str(world / "weights.pth"),
        "--output",
        str(out),
        "--device",
        "cpu",
        "--step",
        "60",
    ]
    assert main(["features", str(sample_videos()[2]), *words]) == 0
    return out, words


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--step", "61"], "windows.step 60, 61"),
        (["--normalize"], "windows.normalize false, true"),
        (["--dtype", "bfloat16"], 'windows.dtype "float32", "bfloat16"'),
        (["--image-size", "48"], "windows.size [32, 32], [48, 48]"),
        (["--num-frames", "2"], "windows.frames 4, 2"),
        (["--batch-size", "3", "--backend", "torch", "--attention", "softmax"], None),
        (["--label-map", "map.json"], None),  # the head is behind the features
    ],
)
def test_features(world, featured, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(world)
    out, words = featured
    capsys.readouterr()
    code = main(["features", str(sample_videos()[2]), *words, *flags])
    err = capsys.readouterr().err
    assert code == (0 if named is None else 2)
    assert named is None or f"holds features of other weights or windows (there and now: {named}" in err


def test_features_of_another_video_of_the_same_name(world, featured, tmp_path, capsys):
    out, words = featured
    assert sample_videos()[2].name == "carphone_pristine.mp4"
    capsys.readouterr()
    assert main(["features", str(world / "x" / "carphone_pristine.mp4"), *words]) == 2
    err = capsys.readouterr().err
    assert (
        f"carphone_pristine.npy is of {sample_videos()[2]}, not of {world / 'x'}" in err
        and "choose another --output" in err
    )
    (out / "carphone_distorted.npy").write_bytes((out / "carphone_pristine.npy").read_bytes())
    assert main(["features", str(sample_videos()[3]), *words]) == 2
    assert "is of a video that videos.json does not name" in capsys.readouterr().err
    (out / "carphone_distorted.npy").unlink()
    assert main(["features", str(sample_videos()[3]), *words]) == 0  # another video is added
    for text in ("{", "[]", '{"carphone_pristine.npy": 3}'):
        (tmp_path / "features.json").write_bytes((out / "features.json").read_bytes())
        (tmp_path / "videos.json").write_text(text)
        assert main(["features", str(sample_videos()[2]), *words, "--output", str(tmp_path)]) == 2
        assert "videos.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "features"])
def test_all_ranks_are_refused(world, evaluated, featured, monkeypatch, run_ranks, command):
    monkeypatch.chdir(world)
    words = {
        "evaluate": [
            "val.txt",
            *EVALUATE,
            "--checkpoint",
            "weights.pth",
            "--output",
            str(evaluated),
            "--scores",
        ],
        "features": [str(sample_videos()[2]), *featured[1], "--step", "61"],
    }[command]
    assert run_ranks(2, main, [command, *map(str, words)]) == [2, 2]
