"""Arrays in one file: what was written is read, mapped; damage is told."""

import numpy as np
import pytest

from vmae.errors import InputError
from vmae.files.flat_arrays import read_arrays, write_arrays

ARRAYS = {
    "paths": np.frombuffer(b"a/b.mp4\n", np.uint8),
    "ends": np.array([8], np.uint64),
    "empty": np.zeros(0, np.int32),
    "fps": np.array([29.97, 25.0]),
    "odd": np.array([1, 2, 3], np.int16),
}


@pytest.fixture
def file(tmp_path):
    write_arrays(tmp_path / "list", ARRAYS, {"made": "by a test, größer"})
    return tmp_path / "list"


def test_what_was_written_is_read_and_is_not_writable(file):
    about, found = read_arrays(file)
    assert about == {"made": "by a test, größer"} and list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].tolist() == array.tolist()
        assert not found[name].flags.writeable and found[name].flags.aligned


def test_safetensors_reads_it(file):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    found = load_file(file)
    assert all(found[name].tolist() == array.tolist() for name, array in ARRAYS.items())


def test_pieces_make_one_array(tmp_path):
    write_arrays(
        tmp_path / "f", {"n": (np.arange(k, dtype=np.int64) for k in (2, 0, 3)), "m": ARRAYS["odd"]}, {}
    )
    _, found = read_arrays(tmp_path / "f")
    assert found["n"].tolist() == [0, 1, 0, 1, 2] and found["m"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("keep", [0, 5, 100, 4200])
def test_a_file_that_was_cut_off_is_told(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged|no file of arrays"):
        read_arrays(file)


def test_other_files_are_told(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_arrays(tmp_path / "none")
    (tmp_path / "text").write_text("a list of videos\n" * 100)
    with pytest.raises(InputError, match="no file of arrays"):
        read_arrays(tmp_path / "text")
