"""Frame i asked for is frame i given, by every backend, for every container and group structure, or a refusal."""

import numpy as np
import pytest

from vmae.data.containers import container_kind, open_gop_hazard, read_mp4_track, seek_hazard
from vmae.data.decode import BACKENDS, DecodeError, open_video

pytest.importorskip("av")

NAMES = [  # closed and open GOPs, no reordering, uneven times, containers without presentation times or an index
    "h264_closed", "h264_open", "h264_open_mkv", "hevc_closed", "hevc_open", "vp9", "vp9_vfr", "vfr", "avi", "ts",
]  # fmt: skip
REFUSED = {
    "torchcodec": {"avi", "ts"},
    "decord": {"avi", "ts", "h264_open", "h264_open_mkv", "hevc_open"},
    "pyav": set(),
}


def wrong_reads(reader, read_numbers, total):
    """Reads (lists of indices) that gave other frames: single ones, clips with stride 1 and 4, and far jumps."""
    rng = np.random.default_rng(0)
    reads = [[index] for index in rng.permutation(total)[:40].tolist()]
    reads += [list(range(start, start + 16)) for start in rng.integers(0, total - 16, 6).tolist()]
    reads += [list(range(start, start + 64, 4)) for start in rng.integers(0, total - 64, 6).tolist()]
    reads += [[0, total - 1], [5, 100, 47, 5], [total - 1], [23, 24, 25]]
    return [read for read in reads if read_numbers(reader.frames(read)) != read]


@pytest.mark.parametrize("backend", ["torchcodec", "decord", "pyav", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_indices(bar_videos, read_numbers, name, backend):
    if backend != "auto" and (lack := BACKENDS[backend].missing()):
        pytest.skip(lack)
    path = bar_videos[name]
    if name in REFUSED.get(backend, ()):
        with pytest.raises(DecodeError, match=f"refused, it would give wrong frames: {backend} cannot be trusted") as error:
            open_video(path, backend)
        assert error.value.library == backend
        return
    with open_video(path, backend) as reader:
        assert len(reader) == 120
        assert backend == "auto" or reader.backend == backend
        assert reader.fps is None or "vfr" in name or reader.fps == pytest.approx(25, rel=0.05)
        assert wrong_reads(reader, read_numbers, 120) == []


@pytest.mark.parametrize("name", ["h264_open", "avi"])
def test_the_refused_files_are_refused_for_a_reason(bar_videos, read_numbers, name):
    """What decord makes of them; once it is right, the refusal can go."""
    decord = pytest.importorskip("decord")
    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(str(bar_videos[name]), num_threads=1)
    order = np.random.default_rng(0).permutation(120).tolist()  # one after the other it is right
    assert [index for index in order if read_numbers(reader.get_batch([index]).asnumpy()) != [index]]


def test_what_the_container_shows(bar_videos, tmp_path):
    kinds = {name: container_kind(str(path)) for name, path in bar_videos.items()}
    assert kinds["avi"] == "AVI" and kinds["ts"] == "MPEG-TS"
    assert kinds["vp9"] == kinds["vp9_vfr"] == kinds["h264_open_mkv"] == "Matroska"
    assert {kinds[name] for name in ("h264_closed", "h264_open", "hevc_open", "vfr")} == {"MP4"}
    shown = {name: read_mp4_track(str(bar_videos[name])) for name in kinds if kinds[name] == "MP4"}
    assert {name: track.open_gop for name, track in shown.items()} == {
        "h264_closed": False, "h264_open": True, "hevc_closed": False, "hevc_open": True, "vfr": False,
    }  # fmt: skip
    assert open_gop_hazard(str(bar_videos["h264_open"])) == "open GOP"
    assert open_gop_hazard(str(bar_videos["vp9"])) is None
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "moov.mp4").write_bytes(b"\0\0\0\x10moov\0\0\0\3trak")
    for name in ("text.mp4", "moov.mp4"):
        assert open_gop_hazard(str(tmp_path / name)) is None and seek_hazard(str(tmp_path / name)) is None


def test_refused_without_another_backend(bar_videos, uninstall):
    pytest.importorskip("decord")
    uninstall("torchcodec")
    uninstall("pyav")
    with pytest.raises(DecodeError, match="decord cannot be trusted with AVI.*pip install pyav"):
        open_video(bar_videos["avi"])
