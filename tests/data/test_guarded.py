"""Files that hang or crash whoever opens them: a pipe, a device, a dead mount; every command ends with a
line."""

import contextlib
import ctypes
import faulthandler
import functools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.folder import export_weights
from vmae.cli import main
from vmae.config import MaskConfig
from vmae.data import decode, describe_data
from vmae.data.dataset import check_decodable
from vmae.data.decode import Backend, DecodeError, open_video
from vmae.data.files import Unanswered, ask_files, check_regular
from vmae.data.guarded import guarded, guarded_each, guarded_streams
from vmae.data.manifest import VideoEntry, read_list, read_text
from vmae.data.video_reader import memory_as_decode_error
from vmae.errors import InputError
from vmae.evaluate.features import WindowConfig, extract_videos
from vmae.synthetic.samples import sample_videos

VIDEO = str(sample_videos()[2])  # 120 frames of 176 x 144
CONFIG = ModelConfig(
    img_size=32, num_frames=8, embed_dim=48, depth=1, num_heads=3, decoder_embed_dim=32, decoder_num_heads=2
)
LIMIT_S = 0.6


@pytest.fixture
def limit(monkeypatch):
    monkeypatch.setenv("VMAE_HANG_S", str(LIMIT_S))


@pytest.fixture
def pipe(tmp_path) -> str:
    """A FIFO that nobody writes to, named as a video: to open it hangs."""
    os.mkfifo(tmp_path / "pipe.mp4")
    return str(tmp_path / "pipe.mp4")


@pytest.fixture
def hanging(pipe, tmp_path, monkeypatch) -> str:
    """A regular file that hangs the decoder, which opens the pipe in its place; other files are read as
    ever."""
    path = tmp_path / "hanging.mp4"
    path.write_bytes(Path(VIDEO).read_bytes())
    whole = decode.BACKENDS["pyav"]

    def open_entry(entry):
        return open(pipe) if entry.path == str(path) else whole.open(entry)

    monkeypatch.setitem(decode.BACKENDS, "pyav", Backend("pyav", ("video",), open_entry, whole.missing))
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Files of a tiny pre-trained model and of a tiny classifier."""
    folder = tmp_path_factory.mktemp("checkpoints")
    pretrained = {"model": CONFIG.to_dict(), "mask": MaskConfig(encoder_ratio=0.5).to_dict(), "stride": 2}
    export_weights(folder / "p.pth", build_pretrainer(CONFIG).state_dict(), config=pretrained)
    about = {"model": CONFIG.to_dict(), "num_classes": 5, "clip": {"num_frames": 8, "image_size": 32}}
    export_weights(folder / "c.pth", build_classifier(CONFIG, 5).state_dict(), config=about)
    return {"pretrained": str(folder / "p.pth"), "classifier": str(folder / "c.pth")}


def special_files(folder: Path) -> dict[str, str]:
    """Paths that are no regular files, and what they are."""
    os.mkfifo(folder / "fifo.mp4")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path may have 107 characters
        listener.bind("socket.mp4")
        os.chdir(here)
    (folder / "link.mp4").symlink_to("fifo.mp4")
    (folder / "zero.mp4").symlink_to("/dev/zero")
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to("loop.mp4")
    kinds = {
        "fifo": "is a pipe, not a file",
        "socket": "is a socket",
        "link": "is a pipe",
        "zero": "is a device",
    }
    kinds |= {
        "folder": "is a folder; for frames",
        "loop": "cannot be read: Too many levels",
        "none": "does not exist",
    }
    return {str(folder / f"{name}.mp4"): text for name, text in kinds.items()}


def test_only_regular_files_are_opened(tmp_path):
    for path, text in special_files(tmp_path).items():
        with pytest.raises(DecodeError, match=f"^{re.escape(path)}: {text}"):
            open_video(path)
    with pytest.raises(DecodeError, match="is a file, not a folder of frames"):
        open_video(VideoEntry(VIDEO, "frames", 0, 3))
    with pytest.raises(DecodeError, match="cannot be read"):
        open_video("zero\0byte.mp4")
    (tmp_path / "good.mp4").symlink_to(VIDEO)
    check_regular(tmp_path / "good.mp4")


def test_a_pipe_among_the_images_of_a_folder(tmp_path):
    for number in range(1, 5):
        Image.new("RGB", (40, 32)).save(tmp_path / f"img_{number:05}.jpg")
    entry = VideoEntry(str(tmp_path), "frames", 1, 4)
    (tmp_path / "img_00003.jpg").unlink()
    os.mkfifo(tmp_path / "img_00003.jpg")
    with open_video(entry) as reader:
        with pytest.raises(
            DecodeError, match="img_00003.jpg: is a pipe, not a file; the list promises 4 frames"
        ):
            reader.frames([0, 2])
        assert len(reader.frames([0, 1, 3])) == 3


def test_lists_that_name_pipes(tmp_path, pipe):
    (tmp_path / "list.txt").write_text(f"{VIDEO}\n{pipe}\n")
    with pytest.raises(InputError, match=f"line 2: '{pipe}' is a pipe, not a video file"):
        read_list(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text(f"{pipe} 0 5\n")
    with pytest.raises(InputError, match="is a pipe, not a folder of frames"):
        read_list(tmp_path / "list.txt")


@pytest.mark.parametrize("command", ["predict", "reconstruct", "attention", "pca", "features"])
@pytest.mark.parametrize("kind", ["pipe", "hanging"])
def test_commands_on_a_file_that_hangs(command, kind, limit, pipe, hanging, checkpoints, tmp_path, capsys):
    path = pipe if kind == "pipe" else hanging
    checkpoint = checkpoints["classifier" if command in ("predict", "features") else "pretrained"]
    arguments = [command, path, "--checkpoint", checkpoint, "--device", "cpu"]
    began = time.monotonic()
    code = main([*arguments, *([] if command == "predict" else ["--output", str(tmp_path / "out.png")])])
    assert time.monotonic() - began < 30
    said = "".join(capsys.readouterr())
    assert code == (1 if command == "features" else 2)
    expected = (
        "is a pipe, not a file"
        if kind == "pipe"
        else "took more than 0.6 s (VMAE_HANG_S); its worker was stopped"
    )
    assert f"{path}: {expected}" in said


@pytest.mark.slow
def test_a_run_looks_into_videos_that_hang(limit, hanging):
    """At its start: one that hangs is passed over, all that hang are an error within the limits."""
    hung, good = VideoEntry(hanging), VideoEntry(VIDEO)
    ((path, error),) = check_decodable([hung, good])
    assert path == hanging and "took more than 0.6 s" in error
    (line,) = describe_data([hung, good])
    assert line.startswith("list: 2 videos, about 0.00") or line.startswith("list: 2 videos, 100.0%")
    began = time.monotonic()
    with pytest.raises(
        InputError, match=r"all of the \d videos tried, of 20, are undecodable.*took more than 0.6 s"
    ):
        check_decodable([hung] * 20)
    assert time.monotonic() - began < 10


def test_what_a_worker_gives_is_what_the_process_itself_gives():
    read = functools.partial(_middle, count=3)
    assert torch.equal(guarded(read, VIDEO), read(VIDEO))
    with pytest.raises(DecodeError, match="none.mp4: does not exist"):
        guarded(read, "none.mp4")
    with pytest.raises(InputError, match="unknown decoding backend"):
        list(guarded_each(functools.partial(open_video, backend="nvdec"), [VIDEO]))
    with pytest.raises(RuntimeError, match="KeyError: 'a bug'"):
        guarded(_bug, VIDEO)
    assert list(guarded_each(read, [])) == []


def _middle(path, count):
    with open_video(path) as reader:
        return torch.from_numpy(reader.frames(range(40, 40 + count)))


def _bug(path):
    raise KeyError("a bug")


def test_a_worker_that_runs_out_of_memory(tmp_path):
    """numpy's and torch's lack of memory, real ones, name the file; other errors stay what they are."""
    for allocate in (
        lambda path: np.empty(1 << 60, np.uint8),
        lambda path: torch.empty(1 << 60, dtype=torch.uint8),
    ):
        with pytest.raises(DecodeError, match="v.mp4: cannot be decoded: it needs more memory than there is"):
            guarded(allocate, "v.mp4")
    with pytest.raises(RuntimeError, match="other"), memory_as_decode_error("v.mp4"):
        raise RuntimeError("other")


def _counted(entry, fail_at=None):
    """0, 1, 2, ... of an entry that names how many; kills its worker once at 5 where it says so."""
    name, total = entry.path.split(":")
    for number in range(int(total)):
        if name == "broken" and number == 7:
            raise DecodeError(f"{entry.path}: broken")
        if name == "hang" and number == 7:
            time.sleep(1000)
        if name.startswith("/") and number == 5 and not os.path.exists(name):
            Path(name).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield torch.tensor([number])


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_streams(chunk, tmp_path):
    """Whole, empty, broken, hanging, killed once (and taken up where it was), and left in the middle."""
    names = ["a:8", "b:0", "broken:9", "hang:9", f"{tmp_path / 'died'}:12", "c:30", "d:4"]
    streams = guarded_streams(_counted, [VideoEntry(name) for name in names], chunk=chunk, hang_s=0.5)
    found = {}
    for name, stream in zip(names, streams, strict=True):
        numbers = found[name.split(":")[0]] = []
        try:
            for item in stream:
                numbers.append(item.item())
                if name == "c:30" and len(numbers) == 2:
                    break
        except DecodeError as error:
            numbers.append(str(error))
    assert found["a"] == list(range(8)) and found["b"] == [] and found["d"] == list(range(4))
    assert found["broken"][-1] == "broken:9: broken" and found["broken"][:-1] == list(
        range(7 // chunk * chunk)
    )
    assert found["hang"][-1].startswith("hang:9: took more than 0.5 s")
    assert found["hang"][:-1] == list(range(7 // chunk * chunk))
    assert found[str(tmp_path / "died")] == list(range(12)) and found["c"] == [0, 1]


def test_features_go_on_after_a_video_that_hangs(limit, hanging):
    config, device = WindowConfig(frames=8, step=8, size=(32, 32)), torch.device("cpu")
    model = build_classifier(CONFIG, 5).eval()
    entries = [VideoEntry(VIDEO), VideoEntry(hanging), VideoEntry(VIDEO)]
    first, lost, last = extract_videos(model, entries, config, batch_size=4, device=device)
    assert isinstance(lost, DecodeError) and "took more than" in str(lost)
    assert first.shape == (15, 48) and np.allclose(first, last, atol=1e-6)


# --- Lists from pipes, and file systems that do not answer ---


def test_a_list_from_a_pipe_can_be_read_twice():
    """As bash's <(COMMAND) gives it; `finetune` reads its list for the classes first."""
    for text in ("a.mp4\nb.mp4\n", "c.mp4\n"):
        reading, writing = os.pipe()
        os.write(writing, text.encode())
        os.close(writing)
        assert [read_text(f"/dev/fd/{reading}") for _ in range(3)] == [text] * 3
        os.close(reading)


def test_lists_that_cannot_be_read(limit, tmp_path, pipe):
    for path, text in ((pipe, "within 0.6 s"), ("/dev/zero", "is a device"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=text):
            read_text(path)
    os.rename(pipe, tmp_path / "mix.yaml")
    assert (
        main(
            [
                "pretrain",
                "--data",
                str(tmp_path / "mix.yaml"),
                "--output",
                str(tmp_path / "run"),
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_list_by_process_substitution(tmp_path):
    """The command itself, in a shell."""
    script = (
        f"{sys.executable} -m vmae check-data <(echo {VIDEO}; echo /none.mp4) --output {tmp_path} --workers 1"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "2 videos: 1 good, 1 bad" in done.stdout, done.stderr
    assert (tmp_path / "clean.txt").read_text() == f"{VIDEO}\n"


def test_files_are_asked_in_order_and_in_time():
    assert ask_files(lambda n: n * n, range(1000), threads=8) == [n * n for n in range(1000)]
    assert ask_files(len, []) == []
    with pytest.raises(ZeroDivisionError):
        ask_files(lambda n: 1 // n, [1, 0])
    gate = threading.Event()
    with pytest.raises(Unanswered, match="within 0.2 s") as caught:
        ask_files(lambda n: n != 3 or gate.wait(30), range(9), threads=2, limit_s=0.2)
    gate.set()
    assert caught.value.item == 3


def test_the_limit_is_a_number_of_seconds(monkeypatch):
    for text in ("soon", "0", "-1", "nan", "inf", ""):
        monkeypatch.setenv("VMAE_HANG_S", text)
        with pytest.raises(InputError, match="VMAE_HANG_S must be seconds above 0"):
            read_text(VIDEO)


def _mount_dead(folder: Path) -> None:
    """Mount a file system that never answers, for this process and its children alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000) or libc.mount(
        None, b"/", None, 0x4000 | 1 << 18, None
    ):  # CLONE_NEWNS; MS_REC | MS_PRIVATE
        raise OSError("no mount namespace of its own")
    options = f"fd={os.open('/dev/fuse', os.O_RDWR)},rootmode=40000,user_id=0,group_id=0"
    if libc.mount(b"dead", os.fsencode(folder), b"fuse", 0, options.encode()):
        raise OSError(os.strerror(ctypes.get_errno()))


def _run_on_dead_mount(folder: Path, arguments: list[str], answer) -> None:
    try:
        _mount_dead(folder)
    except OSError as error:
        answer.send(f"cannot mount: {error}")
        return
    answer.send("mounted")
    with open(folder.parent / "said.txt", "w") as file, contextlib.redirect_stderr(file):
        code = main(arguments)
    os._exit(code)


@pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs FUSE, and the right to mount"
)
@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("predict", "dead/v.mp4: took more than 0.6 s"),
        ("list", "line 2: its file system does not answer within 0.6 s"),
        ("listed", "list.txt': its file system does not answer within 0.6 s"),
        ("check-data", "line 2: its file system does not answer within 0.6 s"),
        ("features", "dead/v.mp4': its file system does not answer within 0.6 s"),
        ("root", "dead': its file system does not answer within 0.6 s"),
    ],
)
def test_a_dead_mount(command, line, limit, checkpoints, tmp_path):
    """A real one: its files hang whoever asks for them."""
    dead = tmp_path / "dead"
    dead.mkdir()
    (tmp_path / "list.txt").write_text(f"{VIDEO}\n{dead / 'v.mp4'}\n")
    arguments = {
        "predict": [
            "predict",
            str(dead / "v.mp4"),
            "--checkpoint",
            checkpoints["classifier"],
            "--device",
            "cpu",
        ],
        "list": [
            "pretrain",
            "--data",
            str(tmp_path / "list.txt"),
            "--output",
            str(tmp_path / "run"),
            "--device",
            "cpu",
        ],
        "listed": [
            "pretrain",
            "--data",
            str(dead / "list.txt"),
            "--output",
            str(tmp_path / "run"),
            "--device",
            "cpu",
        ],
        "check-data": ["check-data", str(tmp_path / "list.txt")],
        "features": [
            "features",
            str(dead / "v.mp4"),
            "--checkpoint",
            checkpoints["classifier"],
            "--output",
            f"{dead}.f",
        ],
        "root": ["check-data", str(tmp_path / "list.txt"), "--data-root", str(dead)],
    }[command]
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_run_on_dead_mount, args=(dead, arguments, theirs)
    )
    process.start()
    try:
        assert ours.poll(20)
        if (mounted := ours.recv()) != "mounted":
            pytest.skip(mounted)
        process.join(30)
        assert process.exitcode == 2 and line in (tmp_path / "said.txt").read_text(), (
            tmp_path / "said.txt"
        ).read_text()
    finally:
        process.kill()
        process.join()


# --- What is left behind ---


def _state(pid: int) -> str:
    """A letter of /proc: Z of a zombie; X where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "X"


def _children() -> list[int]:
    return [
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_replacements_leave_nothing_behind(tmp_path, monkeypatch):
    """Neither processes nor files, open or on disk, after some dozen workers that hung, crashed, were killed,
    or did well."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def count() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), len(_children()), len(os.listdir(tmp_path))

    def soak(rounds: int) -> None:
        kinds = ["hang", "crash", "kill", "good"] * rounds
        answers = list(guarded_each(_misbehave, kinds, hang_s=0.05))
        assert [isinstance(answer, DecodeError) for answer in answers] == [True, True, True, False] * rounds
        for kind in ("crash", "good", "good"):
            list(guarded_each(_misbehave, [kind]))

    soak(1)
    before = count()
    soak(6)  # 25 replacements: it takes two kills to blame a video
    assert count() == before and before[2] == 0


def _misbehave(kind):
    if kind == "hang":
        time.sleep(1000)
    if kind in ("crash", "kill"):
        faulthandler.disable()  # its report is for crashes that nobody meant
        os.kill(os.getpid(), signal.SIGABRT if kind == "crash" else signal.SIGKILL)
    return torch.zeros(1000)


def _run_a_hanging_one(pids, interruptible):
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        guarded(lambda path: (pids.send(os.getpid()), time.sleep(1000)), "v.mp4")
    except KeyboardInterrupt:
        pids.send("interrupted")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_main_process_is_that_of_its_worker(how):
    """Ctrl-C ends a guarded call at once; a worker that hangs ends by itself soon after its parent was
    killed."""
    ours, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(
        target=_run_a_hanging_one, args=(theirs, how == signal.SIGINT)
    )
    parent.start()
    assert ours.poll(20)
    worker = ours.recv()
    began = time.monotonic()
    os.kill(parent.pid, how)
    parent.join(20)
    if how == signal.SIGINT:
        assert ours.poll(5) and ours.recv() == "interrupted" and time.monotonic() - began < 3
    while _state(worker) not in "XZ" and time.monotonic() - began < 10:
        time.sleep(0.05)
    left = _state(worker) not in "XZ"
    if left:
        os.kill(worker, signal.SIGKILL)
    assert not left
