"""Models named by their ids on a hub, such as Qwen/Qwen3-0.6B: found in the caches of this machine, or downloaded if asked for."""

import os
import re

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")  # that a download takes: no code and no pickle files


def folder_of(key, path, download=False):
    """Returns the folder of a model. A path that exists, or that is no id, is returned unchanged, without "~".

    Looks up an id in the caches of huggingface_hub and of ModelScope, without a network, and with `download` gets it from the Hugging Face
    hub. key: the name of the option, for messages. Raises ValueError with the places where an id was not found, or for a failed download.
    """
    path = os.path.expanduser(path)
    if os.path.exists(path) or not ID.fullmatch(path):
        return path
    places = [_hugging_face_cache(path), *_modelscope_caches(path)]
    for place in places:
        if found := _newest(place):
            return found
    if download:
        return _downloaded(key, path)
    looked = ", ".join(places)
    raise ValueError(f"{key}={path} is no folder here, and as an id it is in no cache: {looked}; use --download, or a tool of its hub")


def _hugging_face_cache(name):
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return os.path.join(os.path.expanduser(cache), f"models--{name.replace('/', '--')}")


def _modelscope_caches(name):
    """The folders in which releases of ModelScope keep a model. Some write "___" for a dot."""
    own = os.environ.get("MODELSCOPE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "modelscope")
    names = dict.fromkeys((name, name.replace(".", "___")))
    return [os.path.join(own, *under, each) for under in (("hub", "models"), ("models",), ("hub",), ()) for each in names]


def _newest(place):
    """Returns the folder with the files of a model in a cache, None if it has none: in Hugging Face's cache, the snapshot of "main"."""
    if os.path.isfile(os.path.join(place, "config.json")):
        return place
    try:
        with open(os.path.join(place, "refs", "main"), encoding="utf-8") as file:
            revision = file.read().strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = os.path.join(place, "snapshots", revision)
    return folder if re.fullmatch(r"[\w.-]+", revision) and os.path.isfile(os.path.join(folder, "config.json")) else None


def _downloaded(key, name):
    try:
        from huggingface_hub import snapshot_download  # here, as nothing else needs it
    except ImportError as error:
        raise ValueError(f"{key}={name}: --download needs huggingface_hub; use pip install huggingface_hub") from error
    try:
        return snapshot_download(name, allow_patterns=list(FILES))
    except Exception as error:  # of the network, of the hub, or of the disk
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{key}={name} could not be downloaded: {lines[0]}; check the id, the network and HF_TOKEN") from error
