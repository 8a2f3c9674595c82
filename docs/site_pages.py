"""Pages of the site that are no file of docs/: README, project files, the notebook, and the Python API.

MkDocs calls the functions named `on_...` (its "hooks"). Modules are found by looking at the packages, so that
the page of a module moves with it.
"""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# page: file of the tree
TEXTS = {
    "index.md": "README.md",
    "project/contributing.md": "CONTRIBUTING.md",
    "project/changelog.md": "CHANGELOG.md",
    "project/kernels.md": "kernels/README.md",
}
NOTEBOOK = "docs/first_steps.ipynb"
PACKAGES = {"vmae": ROOT / "vmae", "vmae_kernels": ROOT / "kernels" / "vmae_kernels"}
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and lay out the navigation."""
    texts = {page: _with_links((ROOT / source).read_text("utf-8"), source) for page, source in TEXTS.items()}
    texts["first_steps.md"] = notebook_page(ROOT / NOTEBOOK)
    api = api_pages()
    for page, text in {**texts, **{f"api/{name}.md": text for name, text in api.items()}}.items():
        files.append(File.generated(config, page, content=text))
    guides = sorted(file.src_uri for file in files.documentation_pages() if "/" not in file.src_uri)
    config.nav = [
        {"Home": "index.md"},
        {"First steps": "first_steps.md"},
        {"Guides": [page for page in guides if page not in ("index.md", "first_steps.md")]},
        {"Python": [{name: f"api/{name}.md"} for name in api]},
        {"Project": [page for page in TEXTS if page.startswith("project/")]},
    ]
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links of docs/*.md to files that are no page of the site."""
    own = (ROOT / "docs" / page.file.src_uri).is_file()
    return _with_links(markdown, f"docs/{page.file.src_uri}") if own else markdown


def _with_links(markdown: str, source: str) -> str:
    """Relative links of the file `source`, as the site has them; one to no page of the site becomes text."""
    page = next((page for page, file in TEXTS.items() if file == source), source.removeprefix("docs/"))

    def change(link: re.Match) -> str:
        if re.match(r"[a-z]+:", link["target"]):
            return link[0]
        path = os.path.normpath(os.path.join(os.path.dirname(source), link["target"]))
        found = next((page for page, file in TEXTS.items() if file == path), None)
        if found is None and path.startswith("docs/"):
            found = path.removeprefix("docs/").replace(".ipynb", ".md")
        if found is None:
            return link["text"]
        found = os.path.relpath(found, os.path.dirname(page) or ".")
        return f"{link['image']}[{link['text']}]({found}{link['anchor'] or ''})"

    parts = _FENCED.split(markdown)  # texts and blocks of code in turn
    return "".join(part if number % 2 else _LINK.sub(change, part) for number, part in enumerate(parts))


def notebook_page(path: Path) -> str:
    """A notebook's text and code; outputs are not kept in the file."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        text, language = "".join(cell["source"]), "python"
        if text.startswith("%%bash\n"):
            text, language = text.removeprefix("%%bash\n"), "bash"
        parts.append(text if cell["cell_type"] == "markdown" else f"```{language}\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def api_pages() -> dict[str, str]:
    """Markdown by page: each package's public names, then each module and subpackage of `vmae`."""
    head = "::: {}\n    options: {{heading_level: 1, members: false}}\n\n"
    names = "".join(f"- [`{path.rpartition('.')[2]}`][{path}]\n" for path in _public_paths("vmae"))
    operations = "\n".join(f"::: {path}\n" for path in _public_paths("vmae_kernels"))
    pages = {
        "vmae": head.format("vmae") + names,
        "vmae_kernels": head.format("vmae_kernels") + operations,
    }
    root = PACKAGES["vmae"]
    for path in sorted(root.glob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            pages[f"vmae.{path.stem}"] = _module_page(f"vmae.{path.stem}", [path])
    for package in sorted(path.parent for path in root.glob("*/__init__.py")):
        modules = [path for path in sorted(package.rglob("*.py")) if path.stem != "__init__"]
        pages[f"vmae.{package.name}"] = _module_page(f"vmae.{package.name}", modules)
    return pages


def _module_page(title: str, modules: list[Path]) -> str:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    if names == [title]:
        return f"::: {title}\n    options: {{heading_level: 1}}\n"
    head = f"::: {title}\n    options: {{heading_level: 1, members: false}}\n\n"
    return head + "\n".join(f"::: {name}\n" for name in names)


def _public_paths(package: str) -> list[str]:
    """Full paths of the names in a package's `__all__`, from its imports; nothing is imported for it."""
    top, *inner = package.split(".")
    homes, public = {}, []
    for node in ast.walk(ast.parse(PACKAGES[top].joinpath(*inner, "__init__.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
            home, *parts = node.module.split(".")
            if node.module == package:  # a subpackage
                inside = {alias.name: f"{package}.{alias.name}" for alias in node.names}
            elif PACKAGES[home].joinpath(*parts).is_dir():
                inside = {path.rpartition(".")[2]: path for path in _public_paths(node.module)}
            else:
                inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            homes |= {alias.name: inside[alias.name] for alias in node.names}
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            public = ast.literal_eval(node.value)
    return [homes[name] for name in public]
