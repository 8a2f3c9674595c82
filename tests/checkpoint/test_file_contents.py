"""Files that are no weights, or more than weights: one line each, and nothing of them runs."""

import argparse
import io
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch

from vmae import InputError
from vmae.checkpoint.pickles import read_pickle
from vmae.checkpoint.published import load_weights
from vmae.cli import main

WEIGHTS = {"patch_embed.proj.weight": torch.ones(64, 3), "head.bias": torch.arange(500.0)}
SCALAR = np.float64(0).__reduce__()[0]


class Calls:
    """Unpickles by calling `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Sly(argparse.Namespace):
    """A Namespace that is none."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


class Subclass(argparse.Namespace):
    pass


class Fake:
    """Pickles as a global of any name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class NamedPickler(pickle._Pickler):
    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Fake):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, save_persistent_id)


def called(module, name, *arguments):
    """A tuple of what pickles as a call of a global by name: `Raw` writes it."""
    return Raw(Fake(module, name), arguments)


class Raw:
    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments


class RawPickler(NamedPickler):
    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Raw):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


TOUCH = "touch pwned"
HOSTILE = {
    "os.system": (Calls(os.system, TOUCH), "posix.system"),
    "eval": (Calls(eval, "open('pwned', 'w')"), "eval"),
    "exec": (Calls(exec, "open('pwned', 'w')"), "exec"),
    "open": (called("io", "open", "pwned", "w"), "io.open"),
    "getattr": (called("builtins", "getattr", pathlib.PurePosixPath("a"), "touch"), "getattr"),
    "import": (called("builtins", "__import__", "os"), "__import__"),
    "Popen": (called("subprocess", "Popen", TOUCH), "subprocess.Popen"),
    "partial": (called("functools", "partial", print), "functools.partial"),
    "hub": (called("torch.hub", "load", "a/b", "c"), "torch.hub.load"),
    "torch.load": (called("torch.serialization", "load", "x.pth"), "torch.serialization.load"),
    "Namespace that calls": (Sly(a=1), "posix.system"),
    "subclass of Namespace": (Subclass(a=1), "test_file_contents.Subclass"),
    "another Namespace": (called("types", "SimpleNamespace"), "types.SimpleNamespace"),
    "object array": (np.array([Calls(os.system, TOUCH)], dtype=object), "multiarray._reconstruct"),
    "array": (np.arange(3), "multiarray._reconstruct"),
    "old array": (
        called("numpy.core.multiarray", "_reconstruct", Fake("numpy", "ndarray"), (0,), b"b"),
        "numpy.core.multiarray._reconstruct",
    ),
    "numpy.load": (called("numpy", "load", "x.npy", None, True), "numpy.load"),
    "numpy.memmap": (called("numpy", "memmap", "pwned", "uint8", "w+", 0, (3,)), "numpy.memmap"),
    "numpy.core": (called("numpy.core.multiarray", "fromfile", "x"), "numpy.core.multiarray.fromfile"),
    "numpy.testing": (called("numpy.testing._private.utils", "runstring", "1", {}), "utils.runstring"),
    "numpy.dtypes": (called("numpy.dtypes", "ObjectDType"), "numpy.dtypes.ObjectDType"),
    "object scalar": (Calls(SCALAR, np.dtype(object), Calls(os.system, TOUCH)), "numpy.dtype of 'O8'"),
    "record": (Calls(SCALAR, np.dtype([("a", object)]), b"12345678"), "numpy.dtype of 'V8'"),
    "any code": (called("numpy.dtype", "x"), "numpy.dtype.x"),
    "text for a dtype": (called("numpy", "dtype", "f8,O"), "numpy.dtype of 'f8,O'"),
    "no dtype": (called("numpy._core.multiarray", "scalar", "O8", b"x"), "multiarray.scalar of str"),
    "too few bytes": (Calls(SCALAR, np.dtype("f8"), b"123"), "multiarray.scalar of f8 without its 8 bytes"),
    "path": (called("pathlib", "Path.touch", "pwned"), "pathlib.Path.touch"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_twins_are_refused_by_name_and_do_not_run(tmp_path, monkeypatch, name, zipped):
    monkeypatch.chdir(tmp_path)
    evil, refused = HOSTILE[name]

    class Module:
        Pickler = RawPickler

        @staticmethod
        def dump(obj, file, protocol):
            RawPickler(file, protocol).dump(obj)

    content = {"model": WEIGHTS, "args": argparse.Namespace(lr=np.float64(1), evil=evil)}
    torch.save(content, "evil.pth", pickle_module=Module, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError) as caught:
        load_weights("evil.pth")
    text = str(caught.value)
    assert "evil.pth is damaged, or holds more than weights and was not executed: it names " in text
    assert refused in text and "\n" not in text and "safe_globals" not in text
    assert os.listdir() == ["evil.pth"], "nothing ran"


def test_what_was_allowed_for_a_file_is_not_allowed_after_it(tmp_path):
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=np.float64(1))}, tmp_path / "w.pth")
    before = set(torch.serialization.get_safe_globals())
    load_weights(tmp_path / "w.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pth", weights_only=True)


def saved(zipped=True):
    file = io.BytesIO()
    torch.save({"model": WEIGHTS}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def safe(tensors=WEIGHTS):
    return pytest.importorskip("safetensors.torch").save(tensors)


def zip_of(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NO_WEIGHTS = {
    "half a zip": ("w.pth", lambda: saved()[: len(saved()) // 2], r"cut off \([\d,]+ bytes"),
    "almost a zip": ("w.pth", lambda: saved()[:-3], "cut off"),
    "half of legacy": ("w.pth", lambda: saved(False)[: len(saved(False)) // 2], "cut off or damaged"),
    "start of legacy": ("w.pth", lambda: saved(False)[:40], "cut off or damaged"),
    "half of safetensors": (
        "w.safetensors",
        lambda: safe()[: len(safe()) // 2],
        r"cut off \([\d,]+ bytes of",
    ),
    "header of safetensors": ("w.safetensors", lambda: safe()[:50], "cut off"),
    "damaged header": (
        "w.safetensors",
        lambda: safe()[:9] + b"!" + safe()[10:],
        "a damaged safetensors header",
    ),
    "LFS": ("w.pth", lambda: LFS, "a pointer of git LFS instead of the weights: `git lfs pull`"),
    "LFS of safetensors": ("w.safetensors", lambda: LFS, "a pointer of git LFS"),
    "page": ("w.pth", lambda: b"\n<!DOCTYPE html><html><body>Sign in", "a web page instead of the weights"),
    "page of XML": ("w.bin", lambda: b"<?xml version='1.0'?><Error>AccessDenied", "a web page"),
    "empty": ("w.pth", lambda: b"", r"is empty \(0 bytes\)"),
    "JSON": ("w.bin", lambda: b'{"weight_map": {}}', "JSON text"),
    "text": ("w.pth", lambda: b"404: Not Found", "is text, no weights: it begins with '404: Not Found'"),
    "zeros": ("w.pth", lambda: bytes(3000), "the same byte over and over"),
    "onnx": ("w.onnx", lambda: b"\x08\x08\x12\x07pytorch\x1a\x05", "ONNX graph"),
    "onnx as pth": ("w.pth", lambda: b"\x08\x08\x12\x07pytorch\x1a\x05\0", "ONNX graph"),
    "tflite": ("w.tflite", lambda: b"\x1c\0\0\0TFL3\0\0", "TensorFlow Lite"),
    "tensorflow": ("saved_model.pb", lambda: b"\x08\x01\x12\0\xf1", "a file of TensorFlow"),
    "tensorflow data": ("model.ckpt.data-00000-of-00001", lambda: b"\x01\0\xf1", "a file of TensorFlow"),
    "keras": ("w.h5", lambda: b"\x89HDF\r\n\x1a\n", "HDF5"),
    "keras 3": ("w.keras", lambda: zip_of("config.json", "model.weights.h5"), "a model of Keras"),
    "npz": ("w.npz", lambda: zip_of("a.npy", "b.npy"), r"arrays of numpy \(.npz\)"),
    "zip": ("w.zip", lambda: zip_of("readme.txt"), r"torch.save did not write \(it holds readme.txt\)"),
    "gzip": ("w.pth.gz", lambda: b"\x1f\x8b\x08\0", r"compressed \(gzip\): unpack it"),
    "pickle": ("w.pkl", lambda: pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    "script": (
        "w.pt",
        lambda: zip_of("w/data.pkl", "w/code/__torch__/model.py", "w/constants.pkl"),
        "a TorchScript program",
    ),
    "bytes": ("w.pth", lambda: b"\xf0\x01\0\x03" * 9, "neither of torch.save nor safetensors"),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_is_no_weights_is_said_to_be_what_it_seems(tmp_path, name):
    file, content, words = NO_WEIGHTS[name]
    (tmp_path / file).write_bytes(content())
    with pytest.raises(InputError, match=f"checkpoint .*{file} cannot be read: it .*{words}") as caught:
        load_weights(tmp_path / file)
    assert "\n" not in str(caught.value)


def test_the_command_line_says_it_in_a_line(tmp_path, capsys):
    (tmp_path / "w.pth").write_bytes(LFS)
    for words in (["predict", "x.mp4", "--checkpoint"], ["convert"]):
        assert main([*words, str(tmp_path / "w.pth"), *([str(tmp_path / "out")] * (len(words) == 1))]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and "a pointer of git LFS" in text


def test_a_pickle_of_another_protocol(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "w.pth", pickle_protocol=4)
    with pytest.raises(InputError, match="pickle protocol is none of torch.save's own"):
        load_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.bin", "w"])
@pytest.mark.parametrize("content", [saved, lambda: saved(False), safe])
def test_the_content_counts_not_the_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content())
    found = load_weights(tmp_path / name)
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


def test_a_zip_that_was_compressed_again(tmp_path):
    """Its tensors cannot be mapped; they are read."""
    with zipfile.ZipFile(io.BytesIO(saved())) as old, zipfile.ZipFile(tmp_path / "w.pth", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)
    found = load_weights(tmp_path / "w.pth")
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


def test_an_optimizer_beside_the_weights_is_not_read(tmp_path):
    """The file is mapped: tensors that nobody uses take no memory."""
    torch.save({"model": WEIGHTS, "optimizer": {"state": {0: torch.ones(10_000_000)}}}, tmp_path / "w.pth")
    before = resident()
    content = read_pickle(tmp_path / "w.pth", "zip")
    assert resident() - before < 20_000_000 < content["optimizer"]["state"][0].nbytes
    assert torch.equal(content["model"]["head.bias"], WEIGHTS["head.bias"])


def resident():
    """Bytes of this process in memory."""
    pages = pathlib.Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("no /proc here")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
