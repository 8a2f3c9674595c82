"""Imports run one way: no circle of files or of rooms, rooms in order, and only public names outside `vmae`.

Imports are read from the source, so those inside functions and under `TYPE_CHECKING` count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import itself and the rooms of lines above its own; those of the second line also one another.
ORDER = (
    ("vmae_kernels",),
    ("vmae.errors", "vmae.settings", "vmae.config", "vmae.masking", "vmae.files", "vmae.flags"),
    ("vmae.model", "vmae.data"),
    ("vmae.checkpoint",),
    ("vmae.targets",),
    ("vmae.train",),
    ("vmae.evaluate", "vmae.planning"),
    ("vmae.tools", "vmae.synthetic"),
    ("vmae",),
    ("vmae.cli",),
    ("vmae.__main__",),
    ("bench", "experiments"),
)
BASE = ORDER[1]
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
OUTSIDE = ("bench", "experiments", "recipes")


def modules(root: Path) -> dict[str, Path]:
    """Path of each module of the tree, by its dotted name."""
    found = {}
    for base, prefix in (
        ("vmae", ""),
        ("kernels/vmae_kernels", "kernels."),
        ("bench", ""),
        ("experiments", ""),
    ):
        for path in sorted((root / base).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removeprefix(prefix)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the tree that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                names = (f"{node.module}.{alias.name}", node.module)
                found |= {next((name for name in names if name in known), "")} - {""}
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: imported(path, known) - {name} for name, path in known.items()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "vmae" else parts[0]


def room_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        own = room_of(module)
        rooms.setdefault(own, set()).update({room_of(other) for other in others} - {own})
    return rooms


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Names along a circle, its first one again at the end; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if circle := visit(other, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


def against_the_order(graph: dict[str, set[str]]) -> list[str]:
    """Imports that run up or across, and rooms that the order does not know."""
    wrong = [f"{room}: add it to ORDER" for room in sorted({*map(room_of, graph)} - LEVELS.keys())]
    for module, others in sorted(graph.items()):
        for other in sorted(others):
            own, room = room_of(module), room_of(other)
            if own == room or {own, room} - LEVELS.keys() or LEVELS[room] < LEVELS[own]:
                continue
            if not (own in BASE and room in BASE):
                wrong.append(f"{module} imports {other}")
    return wrong


def private_uses(path: Path) -> Iterator[str]:
    """Underscore names of `vmae` and `vmae_kernels` that a file uses."""
    tree, bound = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("vmae", "vmae_kernels"):
            bound |= {alias.asname or alias.name for alias in node.names}
            for name in (*node.module.split("."), *(alias.name for alias in node.names)):
                if is_private(name):
                    yield f"{path.name}:{node.lineno}: {node.module} {name}"
        elif isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.split(".")[0] in ("vmae", "vmae_kernels")]
            bound |= {alias.asname or alias.name.split(".")[0] for alias in ours}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in bound:
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    found = import_graph(ROOT)
    assert len(found) > 100 and "vmae.config" in found["vmae.model.pretrainer"]
    return found


def test_no_circle_of_files(graph):
    circle = find_circle(graph)
    assert not circle, " -> ".join(circle)


def test_no_circle_of_rooms(graph):
    circle = find_circle(room_graph(graph))
    assert not circle, " -> ".join(circle)


def test_rooms_are_in_order(graph):
    assert against_the_order(graph) == []


def test_only_public_names_outside():
    files = [path for folder in OUTSIDE for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 20
    assert [use for path in files for use in private_uses(path)] == []


def test_what_is_wrong_is_named(tmp_path):
    texts = {
        "vmae/__init__.py": "",
        "vmae/config.py": "",
        "vmae/model/__init__.py": "def f():\n    from vmae.train.loop import g\n",
        "vmae/train/__init__.py": "",
        "vmae/train/loop.py": "if TYPE_CHECKING:\n    from vmae.model import f\n",
        "vmae/house/__init__.py": "import vmae.config\n",
        "bench/step.py": "from vmae.train import loop as own\nfrom vmae.model import _f\nown.part._g()\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = import_graph(tmp_path)
    assert find_circle(graph) == ["vmae.model", "vmae.train.loop", "vmae.model"]
    assert find_circle(room_graph(graph)) == ["vmae.model", "vmae.train", "vmae.model"]
    assert against_the_order(graph) == ["vmae.house: add it to ORDER", "vmae.model imports vmae.train.loop"]
    assert list(private_uses(tmp_path / "bench/step.py")) == [
        "step.py:2: vmae.model _f",
        "step.py:3: own.part._g",
    ]
