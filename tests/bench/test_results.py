"""Results: every committed file is read and shown; records come back from JSON as they were; the README's
tables are those of its results."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "bench" / "results").rglob("*.json") if path.stem != "suite")
README = ROOT / "README.md"


def test_every_committed_result_is_shown(benches):
    json_records = benches("json_records")
    from harness.results import read_result

    for path in FILES:
        result = read_result(path, path.stem.removesuffix("_long").removesuffix("_bfloat16"))
        tables = result.tables()
        assert tables and all(table.rows for table in tables[:1]), path
        for table in tables:
            assert all(len(row) == len(table.head) for row in table.rows), (path, table.title)
            assert all(isinstance(cell, str) for row in table.rows for cell in row), (path, table.title)
            assert table.to_text() and table.to_markdown() and table.to_html()
        assert json_records.from_json(type(result), json_records.to_json(result)) == result, path


def test_records_find_their_kind(benches):
    json_records = benches("json_records")
    from harness.results.data import ClipRecord, WorkersRecord
    from harness.results.operations import FloorRecord, TimeRecord

    value = {"kind": "workers", "videos": "v", "variant": "pyav", "workers": 2, "clips_per_s": 3.0, "old": 1}
    kind = list[ClipRecord | WorkersRecord]
    (found,) = json_records.from_json(kind, [value])
    assert found == WorkersRecord(videos="v", variant="pyav", workers=2, clips_per_s=3.0)
    with pytest.raises(ValueError, match="unknown kind of record 'no'"):
        json_records.from_json(kind, [{"kind": "no"}])
    with pytest.raises(ValueError, match="WorkersRecord: .* missing .*'clips_per_s'"):
        json_records.from_json(kind, [{k: v for k, v in value.items() if k != "clips_per_s"}])
    assert issubclass(TimeRecord, FloorRecord) and TimeRecord.kind == "time"


def test_spreads(benches):
    json_records = benches("json_records")
    assert json_records.Runs.of([3.0, 1.0, 2.0]).runs == [3.0, 1.0, 2.0]
    assert json_records.Runs.of([3.0, 1.0, 2.0]).median == 2.0
    with pytest.raises(ValueError):
        json_records.Spread.of_ratios([1.0], [1.0, 2.0])


def test_a_table_three_ways(benches):
    table = benches("table").Table(
        "Title", ["name", "a rather long head"], [["a<b", "1.5"], ["c", "-"]], "Note"
    )
    assert table.to_text().splitlines() == [
        "Title",
        "      a rather long",
        "name           head",
        "-------------------",
        "a<b             1.5",
        "c                 -",
        "Note",
    ]
    assert table.to_markdown() == (
        "| name | a rather long head |\n| --- | --- |\n| a<b | 1.5 |\n| c | - |\n\nNote\n"
    )
    page = table.to_html()
    assert "<td class=text>a&lt;b</td><td>1.5</td>" in page and '<p class="note">Note</p>' in page


@pytest.mark.parametrize(
    "page",
    [README, *(README.parent / "docs" / f"{name}.md" for name in ("results", "data_at_scale"))],
    ids=lambda page: page.name,
)
def test_pages_are_what_their_results_say(benches, page):
    text = page.read_text()
    assert "<!-- table " in text and benches("readme").rewritten(text) == text


def test_a_changed_readme_is_found(benches, tmp_path, capsys):
    readme, path = benches("readme"), tmp_path / "R.md"
    path.write_text(README.read_text().replace("| torch, encoder-only | ", "| torch, encoder-only | 1", 1))
    assert readme.main(["--check", str(path)]) == 1 and "differs" in capsys.readouterr().out
    assert readme.main([str(path)]) == 0 and readme.main(["--check", str(path)]) == 0


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("stpes bench/results/cpu/progressive.json", "unknown result 'stpes'; known: operations"),
        ("steps none.json", "none.json: not a result of steps"),
        ("steps bench/results/cpu/progressive.json", "not a result of steps: StepRecord"),
    ],
)
def test_a_wrong_marker_is_named(benches, tmp_path, capsys, marker, message):
    path = tmp_path / "R.md"
    path.write_text(f"<!-- table {marker} -->\nold\n<!-- end of table -->\n")
    assert benches("readme").main([str(path)]) == 2
    assert message in capsys.readouterr().err
