"""Models named by their ids on a hub: which folder of the caches they are, and what is said where there is none."""

import os
import re
import sys

import huggingface_hub
import pytest

from experiments import flags as command_line
from experiments import hub
from experiments.train import weights
from tests.experiments.test_flags import TINY, read

ID = "Qwen/Qwen3-0.6B"
HF = "hf/models--Qwen--Qwen3-0.6B"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches, a working folder, and no network."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("a download that nobody asked for"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return str(folder)


def with_main(cache, revision):
    (cache / HF / "refs").mkdir(parents=True, exist_ok=True)
    (cache / HF / "refs" / "main").write_text(revision)


def test_the_snapshot_of_main_in_the_cache_of_hugging_face_is_taken(caches):
    model(caches / HF / "snapshots" / "aaa")
    new = model(caches / HF / "snapshots" / "bbb")
    with_main(caches, "bbb\n")
    assert hub.folder_of("--hf_dir", ID) == new
    model(caches / "outside")
    for other in ("ccc", "../../../outside", ""):
        with_main(caches, other)
        with pytest.raises(ValueError, match="is in no cache"):
            hub.folder_of("--hf_dir", ID)


@pytest.mark.parametrize("place", ["hub/models/Qwen/Qwen3-0___6B", "hub/Qwen/Qwen3-0___6B", "models/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"])
def test_the_cache_of_modelscope_is_looked_into(place, caches):
    model(caches / "ms" / f"{place}x")
    want = model(caches / "ms" / place)
    assert hub.folder_of("--hf_dir", ID) == want


def test_folders_and_paths_are_left_as_they_are(caches):
    model(caches / "here" / "Qwen" / "Qwen3-0.6B")
    for path in (ID, "/nowhere/model", "runs/tiny/hf", "qwen3-0.6b", "", "./a/b"):
        if not hub.ID.fullmatch(path) or os.path.exists(path):
            assert hub.folder_of("model", path) == path


def test_what_is_not_found_is_told_with_the_places_and_downloaded_only_where_asked(caches, monkeypatch):
    with pytest.raises(ValueError) as error:
        hub.folder_of("--hf_dir", ID)
    message = str(error.value)
    assert message.startswith(f"--hf_dir={ID} is no folder here, and as an id it is in no cache: {caches}/{HF}, {caches}/ms/hub/models/")
    assert message.endswith("use --download, or a tool of its hub")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or "folder")
    assert hub.folder_of("--hf_dir", ID, download=True) == "folder"
    assert asked == [(ID, {"allow_patterns": list(hub.FILES)})] and not any("bin" in pattern or "py" in pattern for pattern in hub.FILES)

    def refused(*_, **__):
        raise OSError("404 Client Error\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(ValueError, match=re.escape(f"--hf_dir={ID} could not be downloaded: 404 Client Error; check the id")):
        hub.folder_of("--hf_dir", ID, download=True)


def test_the_command_line_takes_an_id(caches, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main"])
    tiny = TINY.replace("experiments/", f"{os.path.dirname(os.path.dirname(hub.__file__))}/experiments/")
    for arguments, key in (
        (f"--hf_dir={ID}", "--hf_dir"),
        (f"--config.model={ID}", "model"),
        (f"--config.data.tokenizer={ID}", "data.tokenizer"),
    ):
        with pytest.raises(ValueError, match=f"^{key}={ID} is no folder here"):
            read(monkeypatch, tiny, arguments)
    config = read(monkeypatch, tiny, f"--init_from={ID}")  # a run that goes on from its own checkpoint does not need it
    with pytest.raises(ValueError, match=f"^init_from={ID} is no folder here"):
        weights.initial_params(command_line.model_config(config), config)
    want = model(caches / HF / "snapshots" / "bbb")
    with_main(caches, "bbb")
    assert read(monkeypatch, tiny, f"--init_from={ID}").init_from == want
