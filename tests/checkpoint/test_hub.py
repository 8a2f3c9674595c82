"""Names of the Hugging Face hub: what they mean, and their download from a hub that the test serves."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server import Hub, serve

from vmae import InputError, ModelConfig, build_classifier
from vmae.checkpoint import hub, read_checkpoint
from vmae.checkpoint import huggingface as hf
from vmae.checkpoint.folder import find_weights, folder_beside
from vmae.checkpoint.hub_names import HubName, is_hub_name, parse_hub_name, proposal
from vmae.cli import main
from vmae.targets.image_encoder import find_image_model

ROOT = Path(__file__).resolve().parents[2]
REPO, PATH = "OpenGVLab/VideoMAE2", "distill/vit_tiny_k710.pth"
FILE = f"hub:{REPO}/{PATH}"
TINY = ModelConfig(img_size=32, num_frames=4, embed_dim=24, depth=1, num_heads=2)


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:a/b", HubName("a/b")),
        ("hub:a/b/", HubName("a/b")),
        ("hub://a/b", HubName("a/b")),
        ("hub:OpenGVLab/VideoMAEv2-Base", HubName("OpenGVLab/VideoMAEv2-Base")),
        ("hub:a/b@v1.0", HubName("a/b", "v1.0")),
        ("hub:a/b/c/d.pth", HubName("a/b", None, "c/d.pth")),
        ("hub:a/b@main/c.pth", HubName("a/b", "main", "c.pth")),
        ("hub:a/b@refs/pr/3/c/d.pth", HubName("a/b", "refs/pr/3", "c/d.pth")),
        ("hub:a/b@feature%2Fx/c.pth", HubName("a/b", "feature/x", "c.pth")),
        ("hub:a/b/c@d.pth", HubName("a/b", None, "c@d.pth")),
        ("hf://a/b/c.pth", HubName("a/b", None, "c.pth")),
        ("hf:/a/b/c.pth", HubName("a/b", None, "c.pth")),
        ("hf://models/a/b", HubName("a/b")),
        ("https://huggingface.co/a/b", HubName("a/b")),
        ("https://huggingface.co/a/b/tree/main", HubName("a/b")),
        ("https://huggingface.co/a/b/resolve/main/c/d.pth?download=true", HubName("a/b", None, "c/d.pth")),
        ("https:/huggingface.co/a/b/blob/v1/c.pth", HubName("a/b", "v1", "c.pth")),
        ("https://hf.co/a/b/blob/refs%2Fpr%2F1/c%20d.pth", HubName("a/b", "refs/pr/1", "c d.pth")),
    ],
)
def test_names_and_addresses(text, expected):
    assert is_hub_name(text) and parse_hub_name(text) == expected
    assert parse_hub_name(str(expected)) == expected  # its own form is read again
    assert parse_hub_name(Path(text)) == expected  # a path loses a slash, nothing more


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hub:", "no name of the Hugging Face hub; its forms are hub:OWNER/NAME"),
        ("hub:bert", "no name of the Hugging Face hub"),
        ("hub:a/b@", "no name of the Hugging Face hub"),
        ("hub:a b/c", "no name of the Hugging Face hub"),
        ("hub:../b", "no name of the Hugging Face hub"),
        ("hub:a/b--c", "no name of the Hugging Face hub"),
        ("hub:a/b/../c.pth", "'../c.pth' is none inside of a repository"),
        ("hub:a/b/c//d.pth", "is none inside of a repository"),
        ("hub:a/b/c\\..\\d.pth", "is none inside of a repository"),
        ("hub:a/b@../c.pth", "is no revision"),
        ("hub:datasets/a/b", "only models are read from the hub"),
        ("https://huggingface.co/datasets/a/b/resolve/main/x.pth", "only models are read from the hub"),
        ("https://github.com/a/b/x.pth", "an address outside of the Hugging Face hub: download the file"),
        (
            "http://huggingface.co.evil.com/a/b/resolve/main/x.pth",
            "an address outside of the Hugging Face hub",
        ),
    ],
)
def test_what_is_no_name(text, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        find_weights(text)
    assert "\n" not in str(caught.value)


def test_a_missing_path_that_looks_like_a_name_gets_the_form_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for text in ("OpenGVLab/VideoMAEv2-Base", f"{REPO}/{PATH}"):
        with pytest.raises(
            InputError, match=re.escape(f"{text} does not exist; of the Hugging Face hub: hub:{text}")
        ):
            find_weights(text)
    for text in ("runs/mine", "gone.pth", "a/gone.pth", "/a/b", "./a/b", "../a/b"):
        assert proposal(text) == ""


# --- a hub on loopback --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A file as the published ones, and a folder."""
    torch.manual_seed(0)
    model = build_classifier(TINY, 3)
    file = io.BytesIO()
    torch.save({"module": model.state_dict()}, file)
    return {PATH: file.getvalue(), "README.md": b"# weights", "modeling.py": b"raise SystemExit('executed')"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("folder")
    torch.manual_seed(1)
    hf.save_pretrained(build_classifier(TINY, 3), path, list("abc"))
    return {file.name: file.read_bytes() for file in path.iterdir()} | {"modeling.py": b"raise SystemExit"}


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def served(cache, monkeypatch) -> Hub:
    """A hub, with the library set to it as its environment variables would."""
    pytest.importorskip("huggingface_hub", minversion="1.0")  # older ones copy the constants
    from huggingface_hub import constants

    with serve() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.setattr(hub, "_WAITS", (0.0, 0.0))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub.forget()
        yield found
    hub.forget()


def refused(name: str = FILE) -> str:
    """The one line with which a name is refused."""
    hub.forget()
    with pytest.raises(InputError) as caught:
        find_weights(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_comes_once(served, files, cache):
    commit = served.repo(REPO).commit(files)
    path = find_weights(FILE)
    assert path.read_bytes() == files[PATH] and path.is_relative_to(cache)
    assert path.parts[-3:] == (commit, "distill", "vit_tiny_k710.pth")
    assert read_checkpoint(FILE, preset=None).state["head.weight"].shape == (3, 24)
    hub.forget()
    assert find_weights(FILE) == path and len(served.bodies()) == 1
    asked = {path for _, path, _, _ in served.asked if "/resolve/" in path}
    assert asked == {
        f"/{REPO}/resolve/main/{PATH}",
        f"/{REPO}/resolve/{commit}/{PATH}",
    }  # nothing else, no code
    assert [p.name for p in cache.rglob("*.incomplete")] == []


def test_a_moved_branch_is_followed_and_a_revision_is_not(served, files):
    first = served.repo(REPO).commit(files, "main", "v1")
    assert find_weights(FILE).parts[-3] == first
    second = served.repo(REPO).commit({PATH: b"other" * 50})
    assert find_weights(FILE).parts[-3] == first  # one process sees one version
    hub.forget()
    assert find_weights(FILE).parts[-3] == second
    for revision in (first, "v1"):
        assert find_weights(f"hub:{REPO}@{revision}/{PATH}").parts[-3] == first
    asked = len(served.asked)
    hub.forget()
    assert find_weights(f"hub:{REPO}@{first}/{PATH}").parts[-3] == first and len(served.asked) == asked
    served.repo(REPO).commit(files, "refs/pr/1")
    assert find_weights(f"hub:{REPO}@refs/pr/1/{PATH}").read_bytes() == files[PATH]


def test_a_repository_as_a_folder(served, folder):
    commit = served.repo("a/b").commit({**folder, "README.md": b"x", "pytorch_model.bin": b"not taken"})
    path = find_weights("hub:a/b")
    assert path.name == commit
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    source = read_checkpoint("hub:a/b")
    assert source.settings["class_names"] == ["a", "b", "c"] and source.path == path
    assert len(served.bodies()) == 1


def test_a_folder_is_of_one_commit(served, folder):
    """A repository that moves on between its config.json and its weights."""
    commit = served.repo("a/b").commit(folder)
    served.after = {
        "config.json": lambda: served.repo("a/b").commit({**folder, "model.safetensors": b"other"})
    }
    path = find_weights("hub:a/b")
    assert path.name == commit and (path / "model.safetensors").read_bytes() == folder["model.safetensors"]
    assert served.repo("a/b").refs["main"] != commit


def test_the_weights_of_other_models_are_not_fetched(served, folder):
    config = folder["config.json"].replace(b'"videomae"', b'"vivit"')
    served.repo("a/b").commit({**folder, "config.json": config})
    assert refused("hub:a/b") == (
        "hub:a/b: its config.json is of model_type 'vivit', not of a VideoMAE; the weights were not fetched"
    )
    assert not served.bodies()


def test_models_of_other_kinds_come_where_they_are_asked_for(served, folder):
    """Teachers of images; a run that goes on takes the cached one, whatever came to the repository since."""
    config = folder["config.json"].replace(b'"videomae"', b'"dinov2"')
    commit = served.repo("a/b").commit({**folder, "config.json": config})
    path = find_image_model("hub:a/b")
    assert path is not None and path.name == commit and (path / "model.safetensors").is_file()
    assert refused("hub:a/b").endswith("not of a VideoMAE; the weights were not fetched")
    assert hub.cached("hub:a/b") == path
    served.repo("a/b").commit(folder)
    hub.forget()
    assert find_image_model("hub:a/b") is None


def test_a_folder_in_a_repository_and_old_weights(served, folder, tmp_path):
    state = io.BytesIO()
    torch.save(hf.to_huggingface(build_classifier(TINY, 3).state_dict(), hf.CLASSIFICATION), state)
    served.repo("a/b").commit(
        {"sub/x/config.json": folder["config.json"], "sub/x/pytorch_model.bin": state.getvalue()}
    )
    source = read_checkpoint("hub:a/b/sub/x")
    assert source.path.parts[-2:] == ("sub", "x") and source.settings["num_classes"] == 3
    assert "has no config.json" in refused("hub:a/b")
    assert "hub:a/b/sub/x/pytorch_model.bin" in refused("hub:a/b/sub")


def test_shards_come_by_their_index(served, tmp_path):
    pytest.importorskip("safetensors")
    write_shards(build_classifier(TINY, 3), tmp_path)
    content = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    served.repo("a/b").commit(content)
    assert read_checkpoint("hub:a/b").state["head.weight"].shape == (3, 24)
    assert sorted(name for name, _ in served.bodies()) == [f"model-{n}.safetensors" for n in "12"]
    del content["model-2.safetensors"]
    served.repo("a/c").commit(content)
    line = refused("hub:a/c")
    assert (
        "model.safetensors.index.json names model-2.safetensors, which the repository does not have" in line
    )
    content["model.safetensors.index.json"] = b'{"weight_map": {"x": "../../y.safetensors"}}'
    served.repo("a/d").commit(content)
    assert "'../../y.safetensors', which is no file of weights in its own folder: refused" in refused(
        "hub:a/d"
    )
    assert not any("y.safetensors" in path for _, path, _, _ in served.asked)


def write_shards(model: torch.nn.Module, folder: Path) -> None:
    """A folder of transformers with its weights in two files."""
    import json

    from safetensors.torch import load_file, save_file

    hf.save_pretrained(model, folder, list("abc"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    where = {
        name: f"model-{1 + (number >= len(names) // 2)}.safetensors" for number, name in enumerate(names)
    }
    for file in set(where.values()):
        save_file({name: state[name] for name in names if where[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- broken downloads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_connection_goes_on(served, files, caplog, reset):
    served.repo(REPO).commit(files)
    served.cut, served.reset = [1000, 2000], reset
    assert find_weights(FILE).read_bytes() == files[PATH]
    spans = [span for _, span in served.bodies()]
    assert spans[0] is None and len(spans) == 3
    starts = [int(span.removeprefix("bytes=").rstrip("-")) for span in spans[1:]]
    assert 0 < starts[0] <= 1000 < starts[1] <= 3000
    assert caplog.text.count("going on") == 2


def test_a_download_that_ends_is_gone_on_with_by_the_next_process(served, files, cache):
    served.repo(REPO).commit(files)
    served.cut = [2000, 0, 0, 0, 0, 0]
    line = refused()
    assert re.search(r"the connection broke \(.+\); 2000 bytes of .* are kept: start again, it goes on", line)
    (part,) = cache.rglob("*.incomplete")
    assert part.read_bytes() == files[PATH][:2000]
    served.cut, before = [], len(served.bodies())
    hub.forget()
    assert find_weights(FILE).read_bytes() == files[PATH]
    assert [span for _, span in served.bodies()[before:]] == ["bytes=2000-"] and not part.exists()


def test_a_server_that_says_nothing(served, files, monkeypatch):
    served.repo(REPO).commit(files)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    served.pause = 0.15
    assert re.search(
        r"the connection broke \(.*timed out.*\); 0 bytes of .* are kept: start again", refused()
    )


def test_other_bytes_than_the_hub_names_are_refused(served, files, cache):
    served.repo(REPO).commit(files)
    name = Path(PATH).name
    served.lie = {name: files[PATH][:-1] + b"?"}
    assert "are not those of the hub (their SHA-256 differs) and were deleted: start again" in refused()
    served.lie = {name: files[PATH] + b"?"}
    assert "are not those of the hub" in refused()
    assert not [*cache.rglob("*.incomplete"), *cache.rglob("*.pth")]
    served.lie = {}
    hub.forget()
    assert find_weights(FILE).read_bytes() == files[PATH]


def test_a_damaged_rest_of_an_earlier_download_is_not_kept(served, files, cache):
    served.repo(REPO).commit(files)
    digest = hashlib.sha256(files[PATH]).hexdigest()
    part = cache / "models--OpenGVLab--VideoMAE2" / "blobs" / f"{digest}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"?" * 100)
    assert "their SHA-256 differs" in refused() and not part.exists()
    part.write_bytes(b"?" * (len(files[PATH]) + 1))
    hub.forget()
    assert find_weights(FILE).read_bytes() == files[PATH]


def test_a_full_disc_and_a_cache_that_cannot_be_written(served, files, cache, monkeypatch):
    served.repo(REPO).commit(files)
    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        assert re.search(r"MB are to come, 10 bytes are free in .*cache; HF_HOME names another", refused())
    assert not served.bodies()
    cache.parent.mkdir(exist_ok=True)
    if cache.exists():
        shutil.rmtree(cache)
    cache.write_text("a file")
    line = refused()
    assert "cannot be written (" in line and "HF_HOME names another place" in line


# --- refusals -----------------------------------------------------------------------------------------------


def test_unknown_repository_file_and_revision(served, files):
    served.repo(REPO).commit(files, "main", "v1")
    line = refused("hub:OpenGVLab/Nothing/x.pth")
    assert (
        f"no such repository at {served.endpoint}/OpenGVLab/Nothing, or a private one: check the name" in line
    )
    assert "`hf auth login`" in line
    line = refused(f"hub:{REPO}/distill/vit_tiny_k71.pth")
    assert line == f"{served.endpoint}/{REPO} has no distill/vit_tiny_k71.pth; it has {FILE}"
    line = refused(f"hub:{REPO}/x/{Path(PATH).name}")
    assert line.endswith(f"it has {FILE}")
    line = refused(f"hub:{REPO}")
    assert line == f"{served.endpoint}/{REPO} has no config.json; it has {FILE}"
    line = refused(f"hub:{REPO}@v2/{PATH}")
    assert line == f"{served.endpoint}/{REPO} has no revision v2; it has main, v1"
    assert not any(path.endswith(".py") for _, path, _, _ in served.asked)


def test_a_gated_repository(served, files, monkeypatch):
    repo = served.repo("a/gated")
    repo.commit({"x.pth": files[PATH]})
    repo.gated = True
    line = refused("hub:a/gated/x.pth")
    assert line == (
        f"hub:a/gated/x.pth: it is gated: log in at {served.endpoint}/a/gated, accept its licence; then run "
        "`hf auth login` here (or set HF_TOKEN)"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    line = refused("hub:a/gated/x.pth")
    assert "the token that is set has no access yet" in line and "hf_other" not in line
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refused("hub:a/gated/x.pth")
    assert "the hub refuses the token that is set (401): `hf auth login` sets another" in line
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.forget()
    assert find_weights("hub:a/gated/x.pth").read_bytes() == files[PATH]
    tokens = {token for _, _, _, token in served.asked}
    assert "Bearer hf_right" in tokens and {token for _, _, _, token in served.storage} == {
        None
    }  # another host


def test_a_private_repository(served, files, monkeypatch):
    served.repo("private/x").commit({"x.pth": files[PATH]})
    assert "or a private one" in refused("hub:private/x/x.pth")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the token that is set can't read it" in refused("hub:private/x/x.pth")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.forget()
    assert find_weights("hub:private/x/x.pth").read_bytes() == files[PATH]


def test_without_network(served, files, folder, monkeypatch, caplog):
    served.repo(REPO).commit(files)
    commit = served.repo("a/b").commit(folder)
    here, there = find_weights(FILE), find_weights("hub:a/b")
    dead = "http://127.0.0.1:9"
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library.constants, "ENDPOINT", dead)
    template = dead + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(library.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert find_weights(FILE) == here and find_weights("hub:a/b") == there and there.name == commit
    assert f"taken from the cache; {dead} cannot be reached (Connection refused)" in caplog.text
    line = refused("hub:a/other")
    assert f"{dead} cannot be reached (Connection refused), and the cache" in line
    assert line.endswith("does not have config.json")


def test_a_hub_that_is_ill(served, files, caplog):
    served.repo(REPO).commit(files)
    served.status = 503
    assert "the hub answers with error 503: try again later, and the cache" in refused()
    assert len(served.asked) == 3  # asked again, as for a moment's failure
    served.status = 0
    hub.forget()
    path = find_weights(FILE)
    served.status = 503
    hub.forget()
    assert (
        find_weights(FILE) == path and "taken from the cache; the hub answers with error 503" in caplog.text
    )


def test_offline(served, files, folder, monkeypatch, caplog):
    served.repo(REPO).commit(files)
    served.repo("a/b").commit(folder)
    library = pytest.importorskip("huggingface_hub")
    offline = lambda value: monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", value)  # noqa: E731
    offline(True)
    assert "HF_HUB_OFFLINE is set: the hub is not asked, and the cache" in refused()
    assert refused("hub:a/b").endswith("does not have config.json") and not served.asked
    offline(False)
    hub.forget()
    paths = find_weights(FILE), find_weights("hub:a/b")
    asked = len(served.asked)
    offline(True)
    hub.forget()
    assert (find_weights(FILE), find_weights("hub:a/b")) == paths and len(served.asked) == asked
    assert "taken from the cache" not in caplog.text  # as asked for: nothing to say


def test_half_a_folder_in_the_cache(served, folder, monkeypatch):
    """A download killed between config.json and the weights is no folder offline, and goes on online."""
    served.repo("a/b").commit(folder)
    served.cut = [0] * 6
    assert "the connection broke" in refused("hub:a/b")
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("hub:a/b") and hub.cached("hub:a/b") is None
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", False)
    served.cut = []
    hub.forget()
    path = find_weights("hub:a/b")
    assert hub.cached("hub:a/b") == path and hub.cached("hub:a/c") is None


def test_without_the_package(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        InputError, match=re.escape(f"{FILE} needs the huggingface_hub package: pip install 'vmae[hub]'")
    ):
        find_weights(FILE)
    assert hub.cached(FILE) is None


def test_a_server_that_is_no_hub(served, tmp_path):
    """A login page of a hotel answers everything with a page."""
    served.repo("a/b").commit({"config.json": b"{}"})
    served.no_commit = True
    line = refused("hub:a/b")
    assert "does not answer as a hub does: check HF_ENDPOINT, proxy and login pages" in line


# --- several processes and the commands ---------------------------------------------------------------------


def test_one_of_several_processes_downloads(served, files):
    """Threads with sessions of their own stand for the ranks of a machine: the lock is of the file system."""
    served.repo(REPO).commit(files)
    served.pause = 0.2
    name, found = parse_hub_name(FILE), []
    library = pytest.importorskip("huggingface_hub")
    ranks = [
        threading.Thread(target=lambda: found.append(hub.Repository(library, name).fetch())) for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(found) == 4 and len(set(found)) == 1 and found[0].read_bytes() == files[PATH]
    assert len(served.bodies()) == 1


def test_pictures_of_named_models_are_not_put_into_the_cache(tmp_path, monkeypatch):
    assert folder_beside(FILE) == Path()
    (tmp_path / "w.pth").write_bytes(b"x")
    assert folder_beside(tmp_path / "w.pth") == tmp_path


def test_convert_takes_a_name(served, folder, files, tmp_path, capsys):
    served.repo("a/b").commit(folder)
    served.repo(REPO).commit(files)
    assert main(["convert", "hub:a/b", str(tmp_path / "out.pth")]) == 0
    assert "hub:a/b: " in capsys.readouterr().out and (tmp_path / "out.pth").is_file()
    assert main(["convert", FILE, str(tmp_path / "x.pth"), "--model", "vit_tiny"]) == 2
    assert "is no folder of transformers" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_with_what_it_began_with(
    served, folder, files, cache, tmp_path, labelled_world, capsys
):
    """Its settings keep the name. The cached copy counts, the hub is not asked, and neither a repository that
    has moved on nor one that is gone changes anything."""
    served.repo("a/b").commit(folder)
    run = ["finetune", "--data", str(labelled_world / "train.txt"), "--init", "hub:a/b", "--new-head"]
    run += ["--output", str(tmp_path / "run"), "--batch-size", "2", "--device", "cpu", "--workers", "0"]
    run += ["--stride", "1", "--no-flip", "--no-tensorboard"]
    assert main([*run, "--steps", "1"]) == 0
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "init: hub:a/b\n" in settings
    served.repo("a/b").commit({"config.json": b"{}"})
    asked = len(served.asked)
    hub.forget()
    assert main([*run, "--steps", "2"]) == 0
    said = capsys.readouterr()
    assert len(served.asked) == asked and "resuming from" in said.out + said.err
    assert "setting changed: init" not in said.out + said.err
    shutil.rmtree(cache)
    served.repos.clear()
    hub.forget()
    assert main([*run, "--steps", "3"]) == 2
    assert "no such repository" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_of_one_machine_and_the_environment(served, files, cache, tmp_path):
    """Two processes at once, set up by environment variables alone."""
    served.repo(REPO).commit(files)
    served.pause = 1.0
    code = f"from vmae.checkpoint.folder import find_weights; print(find_weights({FILE!r}))"
    env = {**os.environ, "HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "home")}
    paths = (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        env.pop(name, None)
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {rank.communicate()[0].strip() for rank in ranks}
    assert len(paths) == 1 and len(served.bodies()) == 1
    assert Path(paths.pop()).is_relative_to(tmp_path / "home" / "hub")
