"""Models and adapters of the Hugging Face Hub by id, as folders of its cache.

`hf:ORG/NAME[/PART][@REVISION]` is downloaded by huggingface_hub: its cache, its login (HF_TOKEN or
`hf auth login`), its endpoint and its switch HF_HUB_OFFLINE are the user's. Taken are safetensors,
JSON, and files of tokenizers and chat templates; pickles, code and whatever else lies there stay.
No other argument opens a socket, and no name that stands in a file is ever looked up.

A snapshot lies in models--ORG--NAME/snapshots/COMMIT, so that its path says what it is: that is
where the base's name in an adapter's config and the record of a merge have it from.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from lora_fx.errors import LoraFxError, explain, importing, one_line, silenced
from lora_fx.files.checkpoint import PICKLES
from lora_fx.files.sealed import confined
from lora_fx.progress import stage
from lora_fx.text import StrPath, human, some

PREFIX = "hf:"
_NAME = r"(?!\.+(?:/|@|$))[\w.-]+"
_REVISION = r"(?!\.+(?:/|$))[^\s/\\:@\0]+(?:/(?!\.+(?:/|$))[^\s/\\:@\0]+)*"
"""A branch, a tag or a commit: huggingface_hub makes a path of it."""
_FORM = re.compile(rf"hf:({_NAME}/{_NAME})((?:/{_NAME})*)(?:@({_REVISION}))?")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(/.*)?$")
_SMALL = (
    "*.json", "*.jinja", "*.tiktoken", "*.spm", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""Configs, indexes, tokenizers and chat templates, wherever they lie in a repository."""
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors")
"""The files that a model is read from; others next to them are copies in another form."""
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
Names = Callable[[], Collection[str]]
_FILES = (".safetensors", ".onnx", ".pt2", ".bin", ".gguf", ".py")
"""Ends of files, which no name of a model has."""


@dataclass(frozen=True)
class HubId:
    """The parts of a model's id on the Hub.

    Attributes:
        repo: ORG/NAME.
        part: A folder or a .safetensors file in it; empty for the whole.
        revision: A branch, a tag or a commit; None for the main branch.
    """

    repo: str
    part: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        """The id as a user writes it, with its prefix."""
        text = f"{PREFIX}{self.repo}"
        if self.part:
            text += f"/{self.part}"
        if self.revision:
            text += f"@{self.revision}"
        return text

    @property
    def names_file(self) -> bool:
        """True where the part is one .safetensors file."""
        return self.part.endswith(".safetensors")

    @property
    def folder(self) -> str:
        """The folder of the repository that is asked for, with a slash at its end; or empty."""
        folder = self.part
        if self.names_file:
            folder = self.part.rpartition("/")[0]
        return f"{folder}/" if folder else ""


def local(path: StrPath, *, weights: bool = True, files: Names = tuple) -> str | Path:
    """A local path for a path or an id of the Hub; downloads what the cache lacks.

    Args:
        path: An argument of the user's.
        weights: False where a config is enough.
        files: Gives the file names of an adapter's folder, if the path may be an adapter.

    Raises:
        LoraFxError: As `fetch`; or the path does not exist and looks like an id without its prefix.
    """
    text = os.fspath(path)
    if text.startswith(PREFIX):
        return fetch(text, weights=weights, files=files)[0]
    looks_like_id = re.fullmatch(f"{_NAME}/{_NAME}", text) and not text.endswith(_FILES)
    if looks_like_id and not Path(text).exists() and not Path(text).parent.is_dir():
        raise LoraFxError(
            f"{text}: no such file or folder", f"for a repository of the Hub, write {PREFIX}{text}"
        )
    return path if isinstance(path, Path) else text


def parse(text: str) -> HubId:
    """The parts of an id.

    Raises:
        LoraFxError: It is of another form.

    >>> parse("hf:org/name/unet@v1")
    HubId(repo='org/name', part='unet', revision='v1')
    """
    match = _FORM.fullmatch(text)
    if match is None:
        before, colon, after = text.removeprefix(PREFIX).partition(":")
        hint = "for example hf:org/name, hf:org/name@main or hf:org/name/folder"
        if colon and _FORM.fullmatch(PREFIX + before):
            hint = f"leave :{after} out: a weight is allowed only with several ADAPTER[:W]"
        raise LoraFxError(f"{text!r}: expected hf:ORG/NAME[/PART][@REVISION]", hint)
    repo, part, revision = match.groups()
    return HubId(repo, part.strip("/"), revision)


def origin(path: StrPath) -> dict[str, str]:
    """The fields of an adapter's config for a base from the Hub: id and commit; else empty."""
    match = _SNAPSHOT.search(_absolute(path))
    if match is None:
        return {}
    organisation, name, commit, _ = match.groups()
    return {"base_model_name_or_path": f"{organisation}/{name}", "revision": commit}


def hub_record(path: StrPath | None) -> dict[str, str]:
    """The same as ORG/NAME@COMMIT, for the record of a merge."""
    if not path:
        return {}
    snapshot = origin(path)
    if not snapshot:
        return {}
    return {"hub": "@".join(snapshot.values())}


def known_as(path: str) -> str:
    """COMMIT/ORG/NAME[/PART] of a snapshot, whose end is its name; any other path as it is."""
    match = _SNAPSHOT.search(_absolute(path))
    if match is None:
        return path
    organisation, name, commit, part = match.groups(default="")
    return f"{commit}/{organisation}/{name}{part}"


def _absolute(path: StrPath) -> str:
    """An absolute path with slashes, as `_SNAPSHOT` reads it."""
    return Path(os.path.abspath(path)).as_posix()


def fetch(text: str, *, weights: bool = True, files: Names = tuple) -> tuple[Path, str]:
    """Download what the cache lacks of a model of the Hub.

    A branch is looked up every time, and a new commit of it is another folder; where the Hub
    cannot be reached, the commit that it had last is taken from the cache.

    Args:
        text: An id, with its prefix.
        weights: False where configs and tokenizers are enough.
        files: Gives the file names of an adapter's folder, if the path may be an adapter.

    Returns:
        The folder, or the file that was named; and a note: the commit, and what was left there.

    Raises:
        LoraFxError: A malformed id, a repository that is missing or not accessible, no network and
            not in the cache, or no safetensors in it.
    """
    hub_id = parse(text)
    hub = _library(text)
    quiet = silenced(levels={"huggingface_hub": logging.CRITICAL})
    writable = _writable_paths(hub, hub_id)
    try:
        with quiet, hub.utils.disable_progress_bars(), confined(f"{hub_id}: the Hub", *writable):
            folder, sizes = _download(hub, hub_id, weights, files())
    except LoraFxError:
        raise
    except Exception as error:  # of the library, of its HTTP client, of the system
        raise _as_lora_fx_error(hub_id, hub, error) from error

    note = f"{hub_id}: commit {folder.name}"
    absent = [
        name for name in sizes if name.startswith(hub_id.folder) and not (folder / name).exists()
    ]
    if absent:
        note += f"; not downloaded: {some(sorted(absent), 5)}"
    return folder / hub_id.part, note


def _writable_paths(hub: ModuleType, hub_id: HubId) -> list[Path]:
    """The folders that a download may write: the repository's cache, and its locks.

    A commit and an ETag are names of files there, and a server could give any.
    """
    cache = Path(hub.constants.HF_HUB_CACHE)
    name = f"models--{hub_id.repo.replace('/', '--')}"
    mark = cache / "CACHEDIR.TAG"  # for programs that make backups
    return [cache / name, cache / ".locks" / name, mark, Path(hub.constants.HF_XET_CACHE)]


def _library(text: str) -> ModuleType:
    """huggingface_hub, with the modules that are read here."""
    with importing(f"{text}: huggingface_hub", "pip install 'lora-fx[hf]'"):
        for module in ("constants", "errors", "utils"):
            import_module(f"huggingface_hub.{module}")
        return import_module("huggingface_hub")


def _download(
    hub: ModuleType, hub_id: HubId, weights: bool, adapter_files: Collection[str]
) -> tuple[Path, Mapping[str, int]]:
    """Download what the cache lacks of a commit.

    Returns:
        The folder of the commit in the cache, and the bytes of every file that the commit has.
    """
    folder = _download_small_files(hub, hub_id)
    sizes = _sizes(hub, hub_id, folder)
    if hub_id.part and not any(f"{name}/".startswith(f"{hub_id.part}/") for name in sizes):
        raise LoraFxError(
            f"{hub_id}: {hub_id.part} is not in commit {folder.name}",
            f"choose one of its files or folders: {some(sorted(sizes), 8)}",
        )
    if weights or hub_id.names_file:
        names = _weight_files(hub_id, list(sizes), adapter_files)
        _download_files(hub, hub_id, folder, {name: sizes[name] for name in names})
    return folder, sizes


def _download_small_files(hub: ModuleType, hub_id: HubId) -> Path:
    """Download configs, indexes and tokenizers; returns the folder of the commit in the cache."""
    patterns: list[str] = []
    for name in _SMALL:
        patterns += [name, f"*/{name}"]
    with stage(f"asking {hub.constants.ENDPOINT} for {hub_id}"):
        folder = Path(
            hub.snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=patterns)
        )
    if not _COMMIT.fullmatch(folder.name):
        raise LoraFxError(
            f"{hub_id}: the Hub gives the commit {one_line(repr(folder.name), 80)}; expected a "
            "hash",
            "do not use this server",
        )
    return folder


def _sizes(hub: ModuleType, hub_id: HubId, folder: Path) -> dict[str, int]:
    """The bytes of every file of a commit, by name."""
    try:
        tree = hub.get_cached_repo_tree(hub_id.repo, revision=folder.name)
        return {file.path: file.size for file in tree}
    except hub.errors.CachedRepoTreeNotFoundError:  # another program filled the cache
        cached = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in cached}


def _download_files(hub: ModuleType, hub_id: HubId, folder: Path, sizes: Mapping[str, int]) -> None:
    """Download those of some files, by name and bytes, that the folder of the commit lacks."""
    missing = [name for name in sizes if not (folder / name).exists()]
    total = human(sum(sizes[name] for name in missing))
    for number, name in enumerate(missing, 1):
        progress = f"downloading {name} of {hub_id}, {human(sizes[name])}B"
        if len(missing) > 1:
            progress += f", {number} of {len(missing)} files, {total}B"
        with stage(progress):
            hub.hf_hub_download(hub_id.repo, name, revision=folder.name)


def _weight_files(hub_id: HubId, names: Sequence[str], adapter_files: Collection[str]) -> list[str]:
    """The files of a commit that hold the requested weights.

    1. The file that the id names.
    2. The .safetensors files that a reader of the folder opens: a model's or an adapter's.
    3. All .safetensors files of the folder.

    Args:
        hub_id: What is asked for.
        names: All files of the commit.
        adapter_files: How the files of an adapter's folder are called.

    Raises:
        LoraFxError: The folder has no .safetensors file; says what it has.
    """
    if hub_id.names_file:
        return [hub_id.part]

    start = hub_id.folder
    inside = [name.removeprefix(start) for name in names if name.startswith(start)]
    safetensors = [name for name in inside if name.endswith(".safetensors")]
    at_top = [name for name in safetensors if "/" not in name]
    if not at_top:
        raise _without_weights(hub_id, inside, safetensors)
    usual = [name for name in at_top if _WEIGHTS.fullmatch(name) or name in adapter_files]
    return [start + name for name in usual or at_top]


def _without_weights(
    hub_id: HubId, inside: Sequence[str], safetensors: Sequence[str]
) -> LoraFxError:
    """The error of a folder that has no .safetensors file.

    Args:
        hub_id: What is asked for.
        inside: The files in the folder and below it, by their names in it.
        safetensors: Those of them that are .safetensors files, all in folders below.
    """
    download = f"hf download {hub_id.repo} --local-dir DIR, then give"
    pickles = [name for name in inside if "/" not in name and name.endswith(PICKLES)]
    if pickles:
        why = (
            f"{hub_id}: its weights are pickles ({some(pickles)}), which can run code and are not "
            "downloaded"
        )
        return LoraFxError(why, f"{download} DIR and --trust (trust=True)")
    if safetensors:
        folders = list(dict.fromkeys(name.rpartition("/")[0] for name in safetensors))
        why = f"{hub_id}: its .safetensors files are in its folders {some(folders, 5)}"
        example = replace(hub_id, part=hub_id.folder + folders[0])
        return LoraFxError(why, f"give one of the folders: {example}")
    why = f"{hub_id}: no .safetensors file; it has {some(inside, 5) or 'nothing'}"
    return LoraFxError(why, f"{download} the right file in DIR")


def _as_lora_fx_error(hub_id: HubId, hub: ModuleType, error: Exception) -> LoraFxError:
    """The error of the library in one line, with a hint."""
    errors = hub.errors
    site = hub.constants.ENDPOINT
    cache = hub.constants.HF_HUB_CACHE
    login = "hf auth login, or HF_TOKEN=…"
    if isinstance(error, errors.GatedRepoError):
        why = "its owner restricts access, and you have none"
        hint = f"ask for access at {site}/{hub_id.repo}, then: {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"no revision {hub_id.revision!r} in {hub_id.repo}"
        hint = f"use its main branch: {HubId(hub_id.repo, hub_id.part)}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"{site} has no such model, or it is private"
        hint = f"check the name; a private model needs a token: {login}"
    elif isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        why = f"{site} rejects the token"
        hint = f"{login} with a token that is valid; unset HF_TOKEN for a public model"
    elif hub.constants.HF_HUB_OFFLINE:
        why = f"not complete in the cache {cache}, and HF_HUB_OFFLINE is set"
        hint = "unset HF_HUB_OFFLINE to download it"
    elif isinstance(error, OSError) and error.errno is not None:
        return explain(error, error.filename or cache)
    else:
        cause = error.__cause__ or error
        why = (
            f"not complete in the cache, and {site} cannot be reached: {type(cause).__name__}: "
            f"{cause}"
        )
        hint = "check the network and try again, or give a local folder"
    return LoraFxError(one_line(f"{hub_id}: {why}", 400), hint)
