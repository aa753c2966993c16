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
"""The files that a model's folder is read from; others beside them are copies in another form."""
Names = Callable[[], Collection[str]]
_FILES = (".safetensors", ".onnx", ".pt2", ".bin", ".gguf", ".py")
"""Ends of files, which no name of a model has."""


@dataclass(frozen=True)
class HubId:
    """What names a model of the Hub.

    Attributes:
        repo: ORG/NAME.
        part: A folder or a .safetensors file in it; empty for the whole.
        revision: A branch, a tag or a commit; None for the main branch.
    """

    repo: str
    part: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        """As it is written."""
        whole = f"{PREFIX}{self.repo}{f'/{self.part}' if self.part else ''}"
        return f"{whole}@{self.revision}" if self.revision else whole


def local(given: StrPath, *, weights: bool = True, files: Names = tuple) -> str | Path:
    """A path as it is; of a model of the Hub its folder in the cache, downloaded where it lacks.

    Args:
        given: An argument of the user's.
        weights: False where a config is enough.
        files: Tells how the files of an adapter's folder are called, where it may be one.

    Raises:
        LoraFxError: As `fetch`; or nothing has this path, which looks like an id without prefix.
    """
    text = os.fspath(given)
    if text.startswith(PREFIX):
        return fetch(text, weights=weights, files=files)[0]
    like = re.fullmatch(f"{_NAME}/{_NAME}", text) and not text.endswith(_FILES)
    if like and not Path(text).exists() and not Path(text).parent.is_dir():
        raise LoraFxError(f"{text}: no such file or folder", f"of the Hub: {PREFIX}{text}")
    return given if isinstance(given, Path) else text


def parse(text: str) -> HubId:
    """The parts of an id.

    Raises:
        LoraFxError: It is of another form.

    >>> parse("hf:org/name/unet@v1")
    HubId(repo='org/name', part='unet', revision='v1')
    """
    found = _FORM.fullmatch(text)
    if found is None:
        before, colon, after = text.removeprefix(PREFIX).partition(":")
        hint = "for example hf:org/name, hf:org/name@main or hf:org/name/folder"
        if colon and _FORM.fullmatch(PREFIX + before):
            hint = f"leave :{after} out: only one of several ADAPTER[:W] has a weight"
        raise LoraFxError(f"{text!r}: expected hf:ORG/NAME[/PART][@REVISION]", hint)
    return HubId(found[1], found[2].strip("/"), found[3])


def origin(path: StrPath) -> dict[str, str]:
    """What an adapter's config says of a base that is a snapshot: its id and commit; else empty."""
    found = _SNAPSHOT.search(Path(os.path.abspath(path)).as_posix())
    if found is None:
        return {}
    return {"base_model_name_or_path": f"{found[1]}/{found[2]}", "revision": found[3]}


def hub_record(path: StrPath | None) -> dict[str, str]:
    """The same as ORG/NAME@COMMIT, for the record of a merge."""
    named = origin(path) if path else {}
    return {"hub": "@".join(named.values())} if named else {}


def known_as(path: str) -> str:
    """COMMIT/ORG/NAME[/PART] of a snapshot, whose end is its name; any other path as it is."""
    found = _SNAPSHOT.search(Path(os.path.abspath(path)).as_posix())
    return f"{found[3]}/{found[1]}/{found[2]}{found[4] or ''}" if found else path


def fetch(text: str, *, weights: bool = True, files: Names = tuple) -> tuple[Path, str]:
    """Downloads what the cache lacks of a model of the Hub.

    A branch is looked up every time, and a new commit of it is another folder; where the Hub
    cannot be reached, the commit that it had last is taken from the cache.

    Args:
        text: An id, with its prefix.
        weights: False where configs and tokenizers are enough.
        files: Tells how the files of an adapter's folder are called, where it may be one.

    Returns:
        The folder, or the file that was named; and a note: the commit, and what was left there.

    Raises:
        LoraFxError: An id of another form, one that the Hub does not have or does not give, no
            network and not in the cache, or no safetensors in it.
    """
    asked = parse(text)
    hub = _library(text)
    quiet = silenced(levels={"huggingface_hub": logging.CRITICAL})
    own = _own_folders(hub, asked)
    try:
        with quiet, hub.utils.disable_progress_bars(), confined(f"{asked}: the Hub", *own):
            folder, sizes = _downloaded(hub, asked, weights, files())
    except LoraFxError:
        raise
    except Exception as error:  # of the library, of its HTTP client, of the system
        raise _told(asked, hub, error) from error
    left = [n for n in sizes if n.startswith(_inside(asked)) and not (folder / n).exists()]
    said = f"; not downloaded: {some(sorted(left), 5)}" if left else ""
    return folder / asked.part, f"{asked}: commit {folder.name}{said}"


def _own_folders(hub: ModuleType, asked: HubId) -> list[Path]:
    """Where a download of a repository writes: its part of the cache, and that of its locks.

    A commit and an ETag are names of files there, and a server could give any.
    """
    cache, name = Path(hub.constants.HF_HUB_CACHE), f"models--{asked.repo.replace('/', '--')}"
    mark = cache / "CACHEDIR.TAG"  # for programs that make backups
    return [cache / name, cache / ".locks" / name, mark, Path(hub.constants.HF_XET_CACHE)]


def _library(text: str) -> ModuleType:
    parts = (".constants", ".errors", ".utils", "")
    with importing(f"{text}: huggingface_hub", "pip install 'lora-fx[hf]'"):
        return [import_module(f"huggingface_hub{part}") for part in parts][-1]


def _downloaded(
    hub: ModuleType, asked: HubId, weights: bool, files: Collection[str]
) -> tuple[Path, Mapping[str, int]]:
    """The folder of a commit in the cache, and the bytes of every file that the commit has."""
    small = [f"{'*/' * deep}{name}" for name in _SMALL for deep in (0, 1)]
    repo = asked.repo
    with stage(f"asking {hub.constants.ENDPOINT} for {asked}"):
        folder = Path(hub.snapshot_download(repo, revision=asked.revision, allow_patterns=small))
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", folder.name):
        wrong = f"{asked}: the Hub calls its commit {one_line(repr(folder.name), 80)}"
        raise LoraFxError(wrong, "do not use the server that it comes from")
    try:
        tree = hub.get_cached_repo_tree(repo, revision=folder.name)
        sizes = {f.path: f.size for f in tree}
    except hub.errors.CachedRepoTreeNotFoundError:  # another program filled the cache
        found = [p for p in folder.rglob("*") if p.is_file()]
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in found}
    if asked.part and not any(f"{n}/".startswith(f"{asked.part}/") for n in sizes):
        absent = f"{asked}: {asked.part} is not in commit {folder.name}"
        raise LoraFxError(absent, f"it has {some(sorted(sizes), 8)}")
    wanted: list[str] = []
    if weights or asked.part.endswith(".safetensors"):
        wanted = _weights(asked, [*sizes], files)
    missing = [n for n in wanted if not (folder / n).exists()]
    total = human(sum(sizes[n] for n in missing))
    for i, name in enumerate(missing, 1):
        count = f", {i} of {len(missing)} files, {total}B" if len(missing) > 1 else ""
        with stage(f"downloading {name} of {asked}, {human(sizes[name])}B{count}"):
            hub.hf_hub_download(repo, name, revision=folder.name)
    return folder, sizes


def _inside(asked: HubId) -> str:
    """How the names of the files that are asked for begin."""
    folder = asked.part.rpartition("/")[0] if asked.part.endswith(".safetensors") else asked.part
    return f"{folder}/" if folder else ""


def _weights(asked: HubId, names: Sequence[str], adapter_files: Collection[str]) -> list[str]:
    """The files that hold the weights of what is asked for."""
    if asked.part.endswith(".safetensors"):
        return [asked.part]
    start, download = _inside(asked), f"hf download {asked.repo} --local-dir DIR, then give"
    here = [n.removeprefix(start) for n in names if n.startswith(start)]
    top = [n for n in here if "/" not in n]
    files = [n for n in top if n.endswith(".safetensors")]
    if files:
        read = [n for n in files if _WEIGHTS.fullmatch(n) or n in adapter_files]
        return [start + n for n in read or files]
    if pickles := [n for n in top if n.endswith(PICKLES)]:
        why = f"{asked}: its weights are pickles ({some(pickles)}), which can run code and stay"
        raise LoraFxError(why, f"{download} DIR and --trust (trust=True)")
    if deeper := [*dict.fromkeys(n.rpartition("/")[0] for n in here if n.endswith(".safetensors"))]:
        why = f"{asked}: its .safetensors files lie in its folders {some(deeper, 5)}"
        raise LoraFxError(why, f"name one: {replace(asked, part=start + deeper[0])}")
    why = f"{asked}: no .safetensors file; it has {some(here, 5) or 'nothing'}"
    raise LoraFxError(why, f"{download} the file in DIR that you mean")


def _told(asked: HubId, hub: ModuleType, error: Exception) -> LoraFxError:
    """What the library raised, in one line."""
    errors, site, login = hub.errors, hub.constants.ENDPOINT, "hf auth login, or HF_TOKEN=…"
    cause, cache = error.__cause__ or error, hub.constants.HF_HUB_CACHE
    why = f"not whole in the cache, and {site} gives nothing: {type(cause).__name__}: {cause}"
    hint = "is there a network? try again, or give a folder that is on this machine"
    if isinstance(error, errors.GatedRepoError):
        why = "its owner gives access, and you have none"
        hint = f"ask for access at {site}/{asked.repo}, then: {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"no revision {asked.revision!r} in {asked.repo}"
        hint = f"{HubId(asked.repo, asked.part)} is its main branch"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"{site} has no such model, or it is private"
        hint = f"is the name right? a private one asks for a token: {login}"
    elif isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        why = f"{site} refuses the token"
        hint = f"{login} with a token that is valid; unset HF_TOKEN for a public model"
    elif hub.constants.HF_HUB_OFFLINE:
        why = f"not whole in the cache {cache}, and HF_HUB_OFFLINE is set"
        hint = "unset HF_HUB_OFFLINE to download it"
    elif isinstance(error, OSError) and error.errno is not None:
        return explain(error, error.filename or cache)
    return LoraFxError(one_line(f"{asked}: {why}", 400), hint)
