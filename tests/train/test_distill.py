"""A student learns what the teacher makes of the very clips that it sees; logits may be stored once, with the
views' seeds."""

import json

import pytest
import torch

from vmae import InputError, ModelConfig, build_classifier
from vmae.checkpoint.folder import export_weights
from vmae.checkpoint.published import load_weights
from vmae.cli import main
from vmae.data.view_store import LogitStore, fill_store
from vmae.files.folder_lock import FolderLock
from vmae.train.tasks.distil import distillation_loss

CONFIG = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
FLAGS = [
    "--model",
    "vit_tiny",
    "--image-size",
    "32",
    "--num-frames",
    "4",
    "--stride",
    "2",
    "--batch-size",
    "4",
    "--num-sample",
    "1",
    "--workers",
    "0",
    "--log-every",
    "1",
    "--no-tensorboard",
    "--device",
    "cpu",
    "--mixup",
    "0",
    "--cutmix",
    "0",
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Fine-tuned checkpoints of 3 and of 5 classes, with random weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("teachers")
    for classes in (3, 5):
        model = build_classifier(CONFIG, classes)
        torch.nn.init.normal_(model.head.weight)
        export_weights(folder / f"{classes}.pth", model.state_dict(), config={"model": CONFIG.to_dict()})
    return folder


@pytest.fixture
def distil(labelled_world, tmp_path):
    def start(teacher, *flags, out="run"):
        where = [
            "--data",
            str(labelled_world / "train.txt"),
            "--output",
            str(tmp_path / out),
            "--teacher",
            str(teacher),
        ]
        return main(["distil", *where, *FLAGS, *map(str, flags)])

    return start


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_loss():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 4 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0), expected)
    assert float(distillation_loss(teacher + 3, teacher, 1.0)) == pytest.approx(0, abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert distillation_loss(student.bfloat16(), teacher, 2.0).dtype == torch.float32


def test_a_student_that_is_the_teacher_has_nothing_to_learn(distil, teachers, tmp_path):
    flags = ["--init", teachers / "3.pth", "--kl-weight", "1", "--steps", "1", "--drop-path", "0"]
    assert distil(teachers / "3.pth", *flags) == 0
    assert losses(tmp_path / "run")[0] == pytest.approx(0, abs=1e-5)


def test_live_and_stored_logits_train_the_same_student(distil, teachers, tmp_path, capsys):
    flags = ["--kl-weight", "0.5", "--steps", "4", "--warmup-steps", "0", "--lr", "0.01"]
    store = ["--logits", tmp_path / "logits"]
    assert distil(teachers / "3.pth", *flags, out="live") == 0
    assert distil(teachers / "3.pth", *flags, *store, "--store", "2") == 0
    assert (
        "bf16 logits of 2 epochs x 12 samples, 3 classes" in capsys.readouterr().out
        and not (tmp_path / "run").exists()
    )
    assert distil(teachers / "3.pth", *flags, *store) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "live"), rel=5e-3)  # but for bf16
    live, stored = (load_weights(tmp_path / name / "weights.pth")["head.weight"] for name in ("live", "run"))
    torch.testing.assert_close(live, stored, atol=2e-3, rtol=0.05)


def test_stored_epochs_come_again(distil, teachers, tmp_path):
    """Three steps are an epoch: with one stored, step 4 sees the views of the first epoch, in another
    order."""
    flags = ["--steps", "5", "--logits", tmp_path / "logits"]
    assert distil(teachers / "3.pth", *flags, "--store", "1") == 0
    assert distil(teachers / "3.pth", *flags) == 0
    assert len(losses(tmp_path / "run")) == 5


def test_a_larger_teachers_head_is_converted(distil, teachers, tmp_path, capsys):
    assert distil(teachers / "5.pth", "--steps", "1") == 2
    assert "has 5 classes, the labels have 3; --teacher-map FILE.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "map.json").write_text("[4, 2, 0]")
    assert distil(teachers / "5.pth", "--steps", "1", "--teacher-map", tmp_path / "map.json") == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--store", "1"], "--store needs the folder to store to"),
        (["--logits", "L", "--mixup", "0.8"], "stored logits are of single clips"),
        (["--logits", "L"], "holds no stored logits"),
        (["--temperature", "0"], "--temperature: must be a number above 0"),
        (["--kl-weight", "2"], "--kl-weight: must be a number at least 0 and at most 1, not 2"),
    ],
)
def test_bad_input(distil, teachers, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert distil(teachers / "3.pth", "--steps", "1", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_logits_of_other_views_are_refused(distil, teachers, labelled_world, tmp_path, capsys):
    flags = ["--logits", tmp_path / "logits", "--steps", "1"]
    assert distil(teachers / "3.pth", *flags, "--store", "1") == 0
    world = labelled_world / "train.txt"
    lines = world.read_text().splitlines(keepends=True)
    (tmp_path / "reversed.txt").write_text("".join(lines[::-1]))
    (tmp_path / "shorter.txt").write_text("".join(line.replace(" 10 ", " 9 ") for line in lines))
    (tmp_path / "map.json").write_text("[1, 0, 2]")
    for change, named in (
        (["--seed", "1"], "seed 0, 1"),
        (["--stride", "1"], "clip.stride 2, 1"),
        (["--erase", "0"], "augment.erase 0.25, 0"),
        (["--dtype", "bfloat16"], 'dtype "float32", "bfloat16"'),
        (["--data", tmp_path / "reversed.txt"], "list differs"),
        (["--data", tmp_path / "shorter.txt"], "list differs"),
        (["--teacher-map", tmp_path / "map.json"], "teacher.weights differs"),
    ):
        assert distil(teachers / "3.pth", *flags, *change) == 2
        err = capsys.readouterr().err
        assert (
            f"of other views or another teacher (there and now: {named}" in err
            and "choose another --logits folder" in err
        )
    # What decides nothing of the teacher's logits: batches, temperature, the labels themselves.
    (tmp_path / "relabelled.txt").write_text("".join(line[:-2] + "0\n" for line in lines))
    same = [
        "--batch-size",
        "2",
        "--temperature",
        "1",
        "--data",
        tmp_path / "relabelled.txt",
        "--num-classes",
        "3",
    ]
    assert distil(teachers / "3.pth", *flags, *same, "--dry-run") == 0
    (tmp_path / "logits" / "epoch-0000.done").write_bytes(b"\1" * 11 + b"\0")
    assert distil(teachers / "3.pth", *flags) == 2
    assert "lacks the logits of 1 samples" in capsys.readouterr().err


# --- The store ---

ABOUT = {"epochs": 2, "samples": 5, "num_sample": 2, "classes": 3, "seed": 0}


def row(key):
    return torch.full((2, 3), 10.0 * key[0] + key[1])


def test_the_store_resumes_and_ranks_share_it(tmp_path):
    store, asked = LogitStore(tmp_path, ABOUT), []

    def compute(keys):
        asked.extend(keys)
        if len(asked) > 4:
            raise KeyboardInterrupt
        return torch.cat([row(key) for key in keys])

    store.create()
    with pytest.raises(KeyboardInterrupt):
        fill_store(store, compute, batch_size=2)
    again = LogitStore(tmp_path, ABOUT)
    again.create()  # keeps what is there
    assert len(again.missing()) == 6
    shares = [again.missing()[rank::3] for rank in range(3)]
    for rank in range(3):  # ranks that run at the same time have looked before anyone wrote
        again.write(shares[rank], torch.cat([row(key) for key in shares[rank]]))
    assert not again.missing()
    found = LogitStore(tmp_path, ABOUT).read([(1, 4), (0, 0)])
    assert found.dtype == torch.float32 and torch.equal(found, torch.cat([row((1, 4)), row((0, 0))]))


def test_the_store_names_what_differs(tmp_path):
    LogitStore(tmp_path, ABOUT).create()
    with pytest.raises(InputError, match="seed 0, 1"):
        LogitStore(tmp_path, {**ABOUT, "seed": 1})
    with pytest.raises(InputError, match="no stored logits"):
        LogitStore(tmp_path / "gone", ABOUT).missing()
    (tmp_path / "logits.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        LogitStore(tmp_path, ABOUT)


def test_a_store_that_another_process_fills_is_refused(distil, teachers, tmp_path, capsys):
    with FolderLock(tmp_path / "logits"):
        assert distil(teachers / "3.pth", "--logits", tmp_path / "logits", "--store", "1") == 2
        assert f"{tmp_path / 'logits'} is in use by" in capsys.readouterr().err
    assert not (tmp_path / "logits").exists()


@pytest.mark.parametrize("opt", ["sgd", "muon"])
def test_a_student_with_an_optimizer_and_dropouts(distil, teachers, tmp_path, opt):
    """The teacher beside it has neither."""
    flags = "--steps 2 --warmup-steps 0 --lr 0.1 --drop 0.1 --attn_drop_rate 0.1 --kl-weight 1".split()
    assert distil(teachers / "3.pth", *flags, "--opt", opt) == 0
    seen = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(seen) == 2 and seen[0]["loss"] > 0 and seen[0]["grad_norm"] > 0


def test_stores_from_before_a_setting_came_are_still_good(distil, teachers, tmp_path, labelled_world):
    """What describes the views names a later setting where it is not as before only."""
    assert distil(teachers / "3.pth", "--logits", tmp_path / "store", "--store", "1") == 0
    about = json.loads((tmp_path / "store" / "logits.json").read_text())
    assert not set(about["augment"]) & {"erase_mode", "increasing", "mixup_mode", "cutmix_minmax"}
    other = ["--logits", tmp_path / "other", "--store", "1", "--remode", "const"]
    assert distil(teachers / "3.pth", *other) == 0
    assert json.loads((tmp_path / "other" / "logits.json").read_text())["augment"]["erase_mode"] == "const"
