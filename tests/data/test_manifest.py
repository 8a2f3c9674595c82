"""List files: every format of the published lists, the conventions, and each way to get one wrong."""

import os

import pytest

from vmae.data.labels import read_labelled_list
from vmae.data.manifest import DEFAULT_PATTERN, VideoEntry, read_list
from vmae.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two (empty) videos, one of them with blanks in its name, and a folder of frames 3 to
    7."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "my clip 2.mp4"):
        (tmp_path / name).touch()
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(3, 8):
        (frames / f"img_{number:05}.jpg").touch()
    return tmp_path


def write(folder, text, name="list.txt", **options):
    (folder / name).write_text(text, encoding=options.get("encoding", "utf-8"))
    return folder / name


def read_one(folder, line):
    (entry,) = read_list(write(folder, line + "\n"))
    return entry


@pytest.mark.parametrize(
    "line",
    [
        "a.mp4 0 -1",
        "a.mp4",
        "a.mp4 0 -1 17",
        "a.mp4\t0\t-1",
        "  a.mp4   5  -1  ",
        "a.mp4,0,-1",
        "a.mp4, 0, -1, 17",
    ],
)
def test_video_formats(folder, line):
    assert read_one(folder, line) == VideoEntry("a.mp4", "video", 0, -1, None, DEFAULT_PATTERN, 1)


@pytest.mark.parametrize(
    "line", ["my clip 2.mp4 0 -1", "my clip 2.mp4", "my clip 2.mp4 0 -1 3", "my clip 2.mp4,0,-1"]
)
def test_blanks_in_a_path(folder, line):
    assert read_one(folder, line).path == "my clip 2.mp4"


@pytest.mark.parametrize("line", ["frames 3 5", "frames 3 5 17", "frames,3,5"])
def test_frame_folder(folder, line):
    entry = read_one(folder, line)
    assert (entry.kind, entry.start, entry.total, entry.stride) == ("frames", 3, 5, None)
    assert entry.frame_path(0) == os.path.join("frames", "img_00003.jpg")
    assert entry.frame_path(4) == os.path.join("frames", "img_00007.jpg")


def test_a_number_that_ends_the_path_is_not_a_column_if_the_files_say_so(folder):
    # `take 3 5 17`: folder `take` from 3, 5 images, label 17, or folder `take 3` from 5, 17 images.
    (folder / "take 3").mkdir()
    (folder / "take 3" / "img_00005.jpg").touch()
    entry = read_one(folder, "take 3 5 17")
    assert (entry.path, entry.start, entry.total) == ("take 3", 5, 17)
    (folder / "take").mkdir()
    (folder / "take" / "img_00003.jpg").touch()
    entry = read_one(folder, "take 3 5 17")
    assert (entry.path, entry.start, entry.total) == ("take", 3, 5)


def test_a_path_that_ends_in_a_number_before_a_video_marker(folder):
    (folder / "take 5").touch()
    assert read_one(folder, "take 5 0 -1") == VideoEntry("take 5", "video", 0, -1, None, DEFAULT_PATTERN, 1)


def test_comments_and_blank_lines_keep_line_numbers(folder):
    path = write(folder, "# my videos\r\n\r\na.mp4 0 -1\r\n   # indented\r\n\nframes 3 5\n")
    assert [(entry.path, entry.line) for entry in read_list(path)] == [("a.mp4", 3), ("frames", 6)]


@pytest.mark.parametrize("name", ["#hashtag.mp4", "#1.mp4", "##.mp4"])
def test_only_a_blank_makes_a_comment(folder, name):
    (folder / name).touch()
    path = write(folder, f"#\n# {name}\n#\t{name}\na.mp4\n  {name} 0 -1\n")
    assert [(entry.path, entry.line) for entry in read_list(path)] == [("a.mp4", 4), (name, 5)]


def test_what_looks_like_a_comment_and_is_no_file_says_so(folder):
    with pytest.raises(
        InputError, match="line 1: '#mine' does not exist .for a comment, write a blank after the #"
    ):
        read_list(write(folder, "#mine\na.mp4\n"))


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n", " \t\r\n"])
def test_line_ends(folder, end):
    (folder / "list.txt").write_bytes(end.join(["a.mp4 0 -1", "# words", "my clip 2.mp4", ""]).encode())
    assert [(entry.path, entry.line) for entry in read_list(folder / "list.txt")] == [
        ("a.mp4", 1),
        ("my clip 2.mp4", 3),
    ]


@pytest.mark.parametrize(
    "line", ['"one, two.mp4",0,-1', '"one, two.mp4" 0 -1 17', '"one, two.mp4"', '"one, two.mp4", "0", "-1"']
)
def test_quoted_paths(folder, line):
    (folder / "one, two.mp4").touch()
    assert read_one(folder, line) == VideoEntry("one, two.mp4", "video", 0, -1, None, DEFAULT_PATTERN, 1)


def test_a_quote_that_quotes_nothing_belongs_to_the_name(folder):
    (folder / '"live" 3.mp4').touch()
    (folder / '"a"b.mp4').touch()
    assert read_one(folder, '"""live"" 3.mp4" 0 -1').path == '"live" 3.mp4'
    assert read_one(folder, '"a"b.mp4 0 -1').path == '"a"b.mp4'


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "http://127.0.0.1:1/x.mp4", "file:x.mp4", "concat:a.mp4|a.mp4"]
)
def test_what_looks_like_an_address_is_a_file_where_there_is_one(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    assert read_one(folder, name).path == name


@pytest.mark.parametrize(
    "line", ["http://example.org/x.mp4", "s3://bucket/x.mp4 0 -1", "gs://bucket/x.mp4 0 -1 17"]
)
def test_addresses(folder, line):
    with pytest.raises(
        InputError, match="line 2: .*x.mp4' is an address, which is not supported; download it first"
    ):
        read_list(write(folder, f"a.mp4\n{line}\n"))


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("x.m3u8", b"", "playlist or manifest .\\.m3u8"),
        ("X.MPD", b"", "playlist or manifest .\\.mpd"),
        ("x.ffconcat", b"\0" * 100000, "ffconcat"),
        ("x.mp4", b"#EXTM3U\n#EXTINF:1\na.mp4\n", "HLS playlist"),
        ("x.mp4", b"\xef\xbb\xbf\n#extm3u\n", "HLS playlist"),
        ("x.mp4", b"<!--skip--><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'>", "XML manifest .<mpd>"),
        ("x.mkv", b"ffconcat version 1.0\nfile a.mp4\n", "concat list"),
        ("x", b"[playlist]\nFile1=a.mp4\n", "playlist"),
        ("x.avi", b"v=0\no=- 0 0 IN IP4 127.0.0.1\n", "SDP"),
    ],
)
def test_playlists_are_refused(folder, name, content, kind):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"line 2: .*{kind}.*ffmpeg -i FILE -c copy"):
        read_list(write(folder, f"a.mp4\n{name} 0 -1\n"))


def test_only_regular_files(folder):
    os.mkfifo(folder / "pipe.mp4")
    with pytest.raises(InputError, match="line 2: 'pipe.mp4' is .*pipe"):
        read_list(write(folder, "a.mp4\npipe.mp4\n"))


@pytest.mark.parametrize(
    "head",
    ["label,youtube_id,time_start,time_end,split", '"youtube_id","time_start","time_end","split","is_cc"'],
)
def test_the_table_of_kinetics_says_what_to_do(folder, head):
    path = write(folder, f"{head}\ntestifying,---QUuC4vJs,84,94,train\n")
    for read in (read_list, read_labelled_list):
        with pytest.raises(
            InputError, match="line 1: this is Kinetics' own table.*`path label`.*YOUTUBEID_START_END.mp4"
        ):
            read(path)


def test_a_folder_in_place_of_a_list(folder):
    (folder / "sub" / "SomethingV2").mkdir(parents=True)
    (folder / "sub" / "SomethingV2" / "#B.WebM").touch()
    assert [(entry.path, entry.line, entry.stride) for entry in read_list(folder)] == [
        (str(folder / "a.mp4"), 1, None),
        (str(folder / "my clip 2.mp4"), 2, None),
        (str(folder / "sub" / "SomethingV2" / "#B.WebM"), 3, 2),
    ]


def test_byte_order_mark(folder):
    (entry,) = read_list(write(folder, "a.mp4\n", encoding="utf-8-sig"))
    assert entry.path == "a.mp4"


def test_data_root_is_joined_to_relative_paths_only(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "b.mp4").touch()
    path = write(folder, f"b.mp4 0 -1\n{folder / 'a.mp4'} 0 -1\n")
    assert [entry.path for entry in read_list(path, elsewhere)] == [
        str(elsewhere / "b.mp4"),
        str(folder / "a.mp4"),
    ]
    with pytest.raises(InputError, match="data root .* is not a folder"):
        read_list(path, elsewhere / "b.mp4")


def test_without_data_root_the_working_folder_comes_before_the_lists(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("working")
    (elsewhere / "frames").mkdir()
    (elsewhere / "frames" / "img_00003.jpg").touch()
    path = write(folder, "a.mp4\nframes 3 5\n")
    monkeypatch.chdir(elsewhere)
    assert [entry.path for entry in read_list(path)] == [str(folder / "a.mp4"), "frames"]


def test_published_conventions(folder):
    for source, name in (("SomethingV2", "img_00001.jpg"), ("AVA2.2", "image_000001.jpg")):
        (folder / source / "x").mkdir(parents=True)
        (folder / source / "x" / name).touch()
    (folder / "SomethingV2" / "x.webm").touch()
    path = write(folder, "SomethingV2/x 1 9\nAVA2.2/x 1 9\nframes 3 5\nSomethingV2/x.webm\n")
    ssv2, ava, other, video = read_list(path, frame_pattern="img_{:05d}.jpg")
    assert (ssv2.stride, ssv2.pattern) == (2, "img_{:05}.jpg")
    assert (ava.stride, ava.pattern) == (None, "image_{:06}.jpg")
    assert (other.stride, other.pattern) == (None, "img_{:05d}.jpg")
    assert video.stride == 2


def test_directives_hold_for_the_lines_below(folder):
    (folder / "SomethingV2").mkdir()
    (folder / "SomethingV2" / "f_3.png").touch()
    text = "a.mp4\n#! stride=3 pattern=f_{}.png\na.mp4\nSomethingV2 3 2\n"
    text += "#! stride=default\n#! pattern=default\na.mp4\n"
    first, second, third, fourth = read_list(write(folder, text))
    assert (first.stride, first.pattern) == (None, DEFAULT_PATTERN)
    assert (second.stride, second.pattern) == (3, "f_{}.png")
    assert (third.stride, third.pattern) == (3, "f_{}.png")  # what is said beats the convention
    assert (fourth.stride, fourth.pattern) == (None, DEFAULT_PATTERN)


@pytest.mark.parametrize(
    "directive",
    ["stride=0", "stride=-2", "stride = 2", "speed=2", "pattern=frame.jpg", "pattern=f_{:05}_{}.jpg", ""],
)
def test_bad_directive(folder, directive):
    with pytest.raises(InputError, match="line 2"):
        read_list(write(folder, f"a.mp4\n#! {directive}\na.mp4\n"))


def test_bad_frame_pattern_argument(folder):
    with pytest.raises(InputError, match="does not number the frames"):
        read_list(write(folder, "a.mp4\n"), frame_pattern="frame.jpg")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.mp4 0", "malformed: one number"),
        ("a.mp4 17", "label"),  # a list for fine-tuning
        ("0 -1", "malformed"),
        ("a.mp4 0 abc", "malformed: '0 abc' after the path 'a.mp4'"),
        ("a.mp4 0.0 -1.0", "malformed"),
        ("frames 3 five", "malformed: '3 five' after the path 'frames'"),
        ("none.mp4 zero one", "malformed"),
        ("a.mp4,0,-1,", "malformed"),
        ("a.mp4 0 -2", "-2 frames"),
        ("a.mp4 -1 -1", "negative start -1"),
        ("frames -3 5", "negative start -3"),
        ("frames 3 0", "0 frames"),
        ("frames 3 0 17", "0 frames"),
        ("frames 3 99999999999", "more than 1,000,000,000 images"),
        (f"frames {'9' * 5000} 1", "more than 1,000,000,000 images"),
        ("#! stride=99999999999", "stride=N (a whole number from 1 to 1,000,000)"),
        (f"#! stride={'9' * 5000}", "stride=N (a whole number from 1 to 1,000,000)"),
        ("a.mp4 0 30", "is a file, not a folder"),
        ("frames 0 -1", "is a folder"),
        ("frames", "is a folder"),
        ("frames 1 5", "img_00001.jpg"),  # its first image is number 3
        ("none.mp4 0 -1", "'none.mp4' does not exist"),
        ("nothing 1 5", "'nothing' does not exist"),
        ("frames of mine.mp4", "'frames of mine.mp4' does not exist"),
    ],
)
def test_bad_line_is_named(folder, line, message):
    path = write(folder, f"# comment\na.mp4 0 -1\n{line}\n")
    with pytest.raises(InputError) as error:
        read_list(path)
    assert message in str(error.value)
    assert "list.txt" in str(error.value) and "line 3" in str(error.value)


def test_all_missing_files_are_counted(folder, tmp_path_factory):
    lines = ["a.mp4"] + [f"gone{i}.mp4" for i in range(600)]
    path = write(folder, "\n".join(lines))
    with pytest.raises(
        InputError, match=r"line 2: 'gone0.mp4' does not exist.*600 of 601 entries.*no --data-root"
    ):
        read_list(path)
    root = tmp_path_factory.mktemp("root")
    with pytest.raises(InputError, match=rf"line 1: 'a.mp4'.*601 of 601 .*--data-root '{root}'"):
        read_list(path, root)


def test_order_of_a_long_list(folder):
    for i in range(700):
        (folder / f"v{i}.mp4").touch()
    entries = read_list(write(folder, "".join(f"v{i}.mp4 0 -1\n" for i in range(700))))
    assert [(entry.path, entry.line) for entry in entries] == [(f"v{i}.mp4", i + 1) for i in range(700)]


def test_list_file_itself(folder):
    with pytest.raises(InputError, match="'none.txt' does not exist"):
        read_list("none.txt")
    for text in ("", "\n\n", "# only a comment\n#! stride=2\n"):
        with pytest.raises(InputError, match="has no entries"):
            read_list(write(folder, text))
    (folder / "video.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(range(256)))
    with pytest.raises(InputError, match="is not text"):
        read_list(folder / "video.mp4")
    (folder / "wide.txt").write_text("a.mp4\n", encoding="utf-16")
    with pytest.raises(InputError, match="is UTF-16 text; save it as UTF-8"):
        read_list(folder / "wide.txt")
    (folder / "j.txt").write_text('[{"id": "1", "label": "x"}]')
    with pytest.raises(InputError, match="looks like JSON"):
        read_list(folder / "j.txt")
    (folder / "latin.txt").write_bytes("a.mp4\nf\xfcr.mp4\n".encode("latin-1"))
    (folder / "mark.txt").write_bytes(b"\xef\xbb\xbfa.mp4\n\xff.mp4\n")
    with pytest.raises(InputError, match="line 2: not UTF-8 text"):
        read_list(folder / "mark.txt")
    with pytest.raises(InputError, match="line 2: not UTF-8"):
        read_list(folder / "latin.txt")
