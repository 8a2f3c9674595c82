"""Every command of the how-tos runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import run_docs  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in run_docs.pages() if run_docs.read_blocks(page)], ids=lambda page: page.stem
)
def test_page(page, tmp_path):
    if missing := run_docs.missing_packages(run_docs.read_blocks(page)):
        pytest.skip(f"{', '.join(missing)} not installed")
    run_docs.run_page(page, tmp_path)


def test_every_block_is_marked():
    """`read_blocks` raises for a block that is neither; pages of facts have no block that is run."""
    how_tos = [page.stem for page in run_docs.pages() if run_docs.read_blocks(page)]
    assert {"own_data", "one_gpu", "eight_gpus", "few_labels", "features", "detection", "hugging_face"} <= {
        *how_tos
    }


def test_the_tests_that_a_page_names_are_there():
    root = Path(__file__).parents[1]
    text = (root / "docs" / "compatibility.md").read_text("utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))
    assert len(named) > 100
    code = {path: (root / path).read_text("utf-8") for path, _ in named}
    assert not [f"{path}::{name}" for path, name in named if f"def {name}(" not in code[path]]


def test_an_unmarked_block_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```bash\nls\n```\n")
    with pytest.raises(ValueError, match=r"page.md:3: the line above"):
        run_docs.read_blocks(page)


def test_blocks_and_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- run -->\n```bash\necho 1\n```\n\n<!-- not run: needs a GPU -->\n```bash\nnvidia-smi\n```\n"
        "\n```yaml\na: 1\n```\n\n<!-- run: json no_such_package -->\n```python\nprint(2)\n```\n"
    )
    first, second = run_docs.read_blocks(page)
    assert (first.line, first.code, first.needs) == (1, "echo 1\n", ())
    assert "print(2)" in second.code and run_docs.missing_packages([first, second]) == ["no_such_package"]


def test_a_failing_block_is_told(tmp_path, monkeypatch):
    page, folder = tmp_path / "page.md", tmp_path / "tree"
    folder.mkdir()
    page.write_text("<!-- run -->\n```bash\npython -c 'print(40 + 2)'\nfalse\necho not reached\n```\n")
    monkeypatch.setattr(run_docs, "copy_tree", lambda folder: None)
    with pytest.raises(AssertionError, match=r"(?s)page.md:1 ended with 1.*\n42\n$"):
        run_docs.run_page(page, folder)


def test_the_script(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- run -->\n```bash\ntest -f setup.py\npython -m vmae --help\n```\n")
    done = subprocess.run([sys.executable, run_docs.__file__, str(page)], capture_output=True, text=True)
    assert done.returncode == 0 and "page.md: 1 blocks ran" in done.stdout, done.stderr
