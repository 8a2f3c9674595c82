"""Frame i asked for is frame i given, by every backend, for every container and group structure, or a
refusal. The table in docs/decoders.md is that of CASES."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vmae.data import dali, inspection
from vmae.data.containers import FORMATS, container_kind, is_intra
from vmae.data.decode import BACKENDS, DecodeError, open_video, video_backends
from vmae.data.inspection import inspect_video
from vmae.data.manifest import VideoEntry
from vmae.data.readers.pyav import PyavReader

pytest.importorskip("av")

# Who refuses what PyAV finds in a file: every other backend, or decord (and DALI, by the same rule) only.
OTHERS = frozenset({*video_backends(), "dali"} - {"pyav"})
DECORD = frozenset({"decord", "dali"})


@dataclass(frozen=True)
class Case:
    """A video of conftest.py.

    Attributes:
        about: what it is, for the table.
        refused: by whom, with `because` in the message; DALI leaves it to the CPU.
        numbers: that its frames show.
    """

    about: str
    refused: frozenset = frozenset()
    because: str = ""
    numbers: range | list = range(120)


CASES = {
    "h264_closed": Case("H.264 with B-frames, closed groups, MP4"),
    "fragmented": Case("H.264, fragmented MP4"),
    "one_key": Case("H.264, one key frame"),
    "vfr": Case("H.264, variable frame rate"),
    "interlaced": Case("H.264, interlaced (both fields in a frame)"),
    "ten_bit": Case("H.264, 10 bits", DECORD, "yuv420p10le pixels"),
    "h264_open": Case("H.264, open groups, MP4", DECORD, "open GOP"),
    "h264_open_mkv": Case("H.264, open groups, Matroska", DECORD, "open GOP"),
    "short_gop": Case("H.264, open groups of 2 frames", OTHERS, "key frames closer together"),
    "hevc_closed": Case("HEVC, closed groups"),
    "hevc_open": Case("HEVC, open groups", DECORD, "open GOP"),
    "vp9": Case("VP9, WebM"),
    "vp9_mp4": Case("VP9, MP4"),
    "vp9_vfr": Case("VP9, variable frame rate"),
    "odd_size": Case("VP9, odd width and height", frozenset({"decord"}), "yuv420p pixels of 129 x 65"),
    "mpeg4": Case("MPEG-4 part 2, MP4"),
    "mpeg4_b": Case("MPEG-4 part 2 with B-frames, MP4", DECORD, "open GOP"),
    "mpeg2_b_mkv": Case("MPEG-2 with B-frames, Matroska", DECORD, "open GOP"),
    "refresh": Case("H.264 with intra refresh, MP4", OTHERS, "intra refresh"),
    "refresh_b": Case("H.264 with intra refresh and B-frames, MP4", OTHERS, "intra refresh"),
    "refresh_mkv": Case("H.264 with intra refresh, Matroska", OTHERS, "intra refresh"),
    "refresh_ts": Case("H.264 with intra refresh, MPEG-TS", OTHERS, "MPEG-TS"),
    "refresh_edit": Case(
        "H.264 with intra refresh, cut without encoding", OTHERS | {"pyav"}, "no picture is whole"
    ),
    "edit_start": Case("edit list that begins inside a group", OTHERS, "an edit list", range(30, 90)),
    "edit_parts": Case(
        "edit list of three parts", OTHERS, "an edit list", [*range(10, 30), *range(70, 100), *range(40, 50)]
    ),
    "edit_open": Case(
        "edit list that shows a part twice, open groups", OTHERS, "an edit list", [*range(10, 60)] * 2
    ),
    "cut": Case("cut without encoding (`ffmpeg -ss T -c copy`), MP4", OTHERS, "an edit list", range(33, 120)),
    "cut_head": Case("cut at an open group, Matroska", OTHERS, "in the middle of a group", range(24, 120)),
    "cut_middle": Case(
        "cut between key frames, Matroska", OTHERS, "in the middle of a group", range(24, 120)
    ),
    "cut_middle_ts": Case("cut between key frames, MPEG-TS", OTHERS, "MPEG-TS", range(24, 120)),
    "turned_90": Case("turned by 90 degrees", frozenset({"dali"})),
    "turned_180": Case("turned by 180 degrees", frozenset({"dali"})),
    "turned_270": Case("turned by 270 degrees", frozenset({"dali"})),
    "turned_vp9": Case("turned by 90 degrees, VP9", frozenset({"dali"})),
    "mirrored_x": Case("mirrored left to right", OTHERS, "a mirrored video"),
    "mirrored_y": Case("mirrored top to bottom", OTHERS, "a mirrored video"),
    "transposed": Case("turned and mirrored", OTHERS, "a mirrored video"),
    "transversed": Case("turned and mirrored the other way", OTHERS, "a mirrored video"),
    "turned_30": Case("turned by 30 degrees", OTHERS | {"pyav"}, "no multiple of 90 degrees"),
    "scaled": Case("display matrix that scales (left out)"),
    "wide_pixels": Case("pixels that are not square (as stored)"),
    "two_streams": Case("two video streams (FFmpeg's best)", DECORD, "2 video streams"),
    "avi": Case("H.264, AVI", OTHERS, "AVI"),
    "mpeg4_b_avi": Case("MPEG-4 part 2 with B-frames, AVI", OTHERS, "AVI"),
    "ts": Case("H.264, MPEG-TS", OTHERS, "MPEG-TS"),
    "mpeg2_ps": Case("MPEG-2, MPEG-PS", OTHERS, "MPEG-PS"),
}


TURNED = ("turned", "mirrored", "transposed", "transversed")


@pytest.fixture(scope="module")
def videos(bar_videos, odd_videos):
    return {**odd_videos, **bar_videos}


@pytest.fixture
def read(read_numbers, orientations):
    """The numbers that frames of a video show, by its name."""

    def read_displayed(name, frames):
        undo = (
            orientations["turned_90" if name == "turned_vp9" else name][1]
            if name.startswith(TURNED)
            else np.asarray
        )
        return read_numbers(undo(frames))

    return read_displayed


def wrong_reads(reader, read, expected):
    """Reads (lists of indices) that gave other frames: single ones, clips with stride 1 and 3, and far
    jumps."""
    rng, total = np.random.default_rng(0), len(expected)
    reads = [[index] for index in rng.permutation(total)[:20].tolist()]
    reads += [list(range(start, start + 16)) for start in rng.integers(0, total - 16, 3).tolist()]
    reads += [list(range(start, start + 45, 3)) for start in rng.integers(0, total - 45, 3).tolist()]
    reads += [[0, total - 1], [5, total - 9, 47, 5], [total - 1], [23, 24, 25], [0, 1, 2]]
    return [indices for indices in reads if read(reader.frames(indices)) != [expected[i] for i in indices]]


@pytest.mark.parametrize("backend", [*video_backends(), "auto"])
@pytest.mark.parametrize("name", CASES)
def test_indices(videos, read, name, backend):
    if backend != "auto" and (lack := BACKENDS[backend].missing()):
        pytest.skip(lack)
    path, case = videos[name], CASES[name]
    if backend in case.refused or (backend == "auto" and "pyav" in case.refused):
        with pytest.raises(DecodeError) as error:
            open_video(path, backend).frames([0])
        assert case.because in str(error.value)
        assert backend in ("auto", error.value.library)
        if "pyav" not in case.refused:
            assert f"refused, it would give wrong frames: {backend} cannot be trusted with" in str(
                error.value
            )
        return
    with open_video(path, backend) as reader:
        assert len(reader) == len(case.numbers)
        assert backend == "auto" or reader.backend == backend
        assert reader.fps is None or "vfr" in name or reader.fps == pytest.approx(25, rel=0.05)
        assert wrong_reads(reader, lambda frames: read(name, frames), case.numbers) == []
        if backend == "pyav":
            frames = list(reader.iterate())
            assert read(name, np.stack(frames)) == list(case.numbers)
            assert reader.size == frames[0].shape[1::-1]


@pytest.mark.parametrize("name", CASES)
def test_what_dali_is_given(videos, name):
    found = dali.DaliLoader._look_into(SimpleNamespace(_codecs=dali.GPU_CODECS), str(videos[name]))
    assert (found is None) == ("dali" in CASES[name].refused)
    assert found is None or found[0] == 120


def test_the_table_in_the_documentation():
    names = video_backends()
    heads = ["video", *(BACKENDS[name].library.name for name in names), "given to DALI"]
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for case in CASES.values():
        cells = ["refused" if name in case.refused else "right" for name in names]
        rows.append(f"| {case.about} | {' | '.join(cells)} | {'no' if 'dali' in case.refused else 'yes'} |")
    text = (Path(__file__).parents[2] / "docs" / "decoders.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("|")] == rows


def count_decoded(reader, read):
    """Frames that come out of the decoder, and reads from the start, while `read` runs."""
    counts = {"frames": 0, "starts": 0}
    whole, start = reader._whole_frames, reader._decode_from_start

    def counted(container):
        for frame in whole(container):
            counts["frames"] += 1
            yield frame

    def counted_start(*args, **settings):
        counts["starts"] += 1
        return start(*args, **settings)

    reader._whole_frames, reader._decode_from_start = counted, counted_start
    read()
    return counts


SOUGHT = [
    "h264_closed",
    "h264_open",
    "h264_open_mkv",
    "short_gop",
    "mpeg4_b",
    "cut",
    "edit_start",
    "edit_open",
    "vfr",
]


@pytest.mark.parametrize("name", SOUGHT)
def test_files_that_can_be_sought_are_not_decoded_from_the_start(videos, name):
    """In "edit_open" FFmpeg seeks past the key frame that it is asked for; the one before it will do."""
    with PyavReader(VideoEntry(str(videos[name]))) as reader:
        counts = count_decoded(reader, lambda: [reader.frames([index]) for index in range(len(reader))])
        assert counts == {"frames": 0, "starts": 0}


def test_a_file_that_cannot_be_sought_is_decoded_from_the_start(videos, read_numbers):
    with PyavReader(VideoEntry(str(videos["h264_closed"]))) as reader:

        class Stuck:
            def __getattr__(self, name):
                return getattr(container, name)

            def seek(self, *args, **settings):
                raise PermissionError(1, "Operation not permitted")

        container, reader._container = reader._container, Stuck()
        counts = count_decoded(reader, lambda: None)
        assert read_numbers(reader.frames([70, 3, 71])) == [70, 3, 71]
        assert counts == {"frames": 72, "starts": 1}


@pytest.mark.parametrize("name", ["h264_open", "avi", "refresh", "mpeg4_b", "edit_start"])
def test_the_refused_files_are_refused_for_a_reason(videos, read_numbers, name):
    """What decord makes of them; once it is right, the refusal can go."""
    decord = pytest.importorskip("decord")
    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(str(videos[name]), num_threads=1)
    numbers = CASES[name].numbers
    order = np.random.default_rng(0).permutation(len(numbers)).tolist()  # one after the other it is right
    assert [index for index in order if read_numbers(reader.get_batch([index]).asnumpy()) != [numbers[index]]]


def test_what_the_container_shows(videos, tmp_path):
    kinds = {name: container_kind(str(videos[name])) for name in CASES}
    assert {name for name, kind in kinds.items() if kind == "AVI"} == {"avi", "mpeg4_b_avi"}
    assert {name for name, kind in kinds.items() if kind == "MPEG-TS"} == {
        "ts",
        "refresh_ts",
        "cut_middle_ts",
    }
    assert (
        kinds["vp9"] == kinds["vp9_vfr"] == kinds["h264_open_mkv"] == "Matroska"
        and kinds["mpeg2_ps"] == "MPEG-PS"
    )
    assert {kinds[name] for name in ("h264_closed", "fragmented", "hevc_open", "vfr", "turned_90")} == {"MP4"}
    names = ("h264_closed", "h264_open", "hevc_closed", "hevc_open", "vfr", "ts")
    found = {name: inspect_video(videos[name]) for name in names}
    assert {name: about.open_gop for name, about in found.items()} == {
        "h264_closed": False,
        "h264_open": True,
        "hevc_closed": False,
        "hevc_open": True,
        "vfr": False,
        "ts": False,
    }
    assert all(about.gop == 24 and FORMATS[kinds[name]] == about.kind for name, about in found.items())
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "moov.mp4").write_bytes(b"\0\0\0\x10moov\0\0\0\3trak")
    assert (
        container_kind(str(tmp_path / "text.mp4")) == "unknown"
        and container_kind(str(tmp_path / "moov.mp4")) == "MP4"
    )
    with pytest.raises(DecodeError, match="moov.mp4: cannot be opened"):
        inspect_video(tmp_path / "moov.mp4")


def test_an_inspection_is_kept_until_the_file_changes(videos, tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(videos["h264_closed"].read_bytes())
    first, before = inspect_video(path), inspection._inspect.cache_info()
    assert inspect_video(path) is first and inspection._inspect.cache_info().hits == before.hits + 1
    path.write_bytes(videos["h264_open"].read_bytes())
    assert not first.open_gop and inspect_video(path).open_gop


@pytest.mark.parametrize(
    ("units", "whole"),
    [
        (["65 88 80"], True),  # IDR
        (["09 f0", "67 42", "68 ce", "06 05", "65 88 80"], True),
        (["06 06 01 c4 80", "41 88 80"], True),  # recovery point, I slice (7)
        (["06 06 01 84 80", "41 9a 21"], False),  # P slice (5)
        (["41 88 80", "41 2a 9a"], False),  # an I slice and a P slice of one picture
        (["65 88 80", "41 9a 21"], True),  # the second field refers to the first
        (["41 00"], False),  # cut off
    ],
)
def test_pictures_that_decoding_may_start_at(units, whole):
    units = [bytes.fromhex(unit) for unit in units]
    assert is_intra(b"".join(len(unit).to_bytes(4, "big") + unit for unit in units), 4) == whole
    assert is_intra(b"".join(b"\0\0\1" + unit for unit in units), 0) == whole


def test_refused_without_another_backend(bar_videos, uninstall):
    pytest.importorskip("decord")
    uninstall("torchcodec")
    uninstall("pyav")
    with pytest.raises(DecodeError, match="decord cannot be trusted with AVI.*pip install pyav"):
        open_video(bar_videos["avi"])
