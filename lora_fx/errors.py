"""The errors that users see, and blocks that silence the output of libraries."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import logging
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import UnionType
from typing import Generic, TypeVar

from lora_fx.patching import alone
from lora_fx.python_spelling import in_python

T = TypeVar("T")


class LoraFxError(Exception):
    """An error that the user can correct: one line that says what is wrong, and a hint.

    Both are written in the command line's spelling, and `str` has them in Python's.

    Args:
        message: What was found and what was expected, naming the file and the tensor.
        hint: What to do about it, one line.
        exit_code: 2 for refused or misused input, 1 where the input was good and the answer is no.
    """

    def __init__(self, message: str, hint: str, *, exit_code: int = 2) -> None:
        self.message = visible(message, lines=True)
        self.hint = visible(hint, lines=True)
        super().__init__(self.message)
        self.exit_code = exit_code
        self.told = False  # True once a command has shown it in its JSON

    def __str__(self) -> str:
        """The message and the hint for a traceback, with options in Python's spelling."""
        message = in_python(self.message)
        if not self.hint:
            return message
        return f"{message}\nHint: {in_python(self.hint)}"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the error for another process, since the default would pass `args` alone."""
        return type(self).__new__, (type(self), self.message), self.__dict__


def expect(
    value: object, kind: type | tuple[type, ...] | UnionType, name: str, wanted: str, hint: str
) -> None:
    """Raise for an argument of another type.

    Raises:
        LoraFxError: Names the argument, its type and what was wanted.
    """
    if not isinstance(value, kind):
        raise LoraFxError(f"{name} is {type_of(value)}, not {wanted}", hint)


def type_of(value: object) -> str:
    """Return the name of a value's type with its article.

    >>> type_of(1), type_of("x")
    ('an int', 'a str')
    """
    name = type(value).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    return f"{article} {name}"


def expect_path(value: object, name: str, hint: str) -> None:
    """Raise for an argument that is not a path; see `expect`."""
    expect(value, (str, os.PathLike), name, "a path", hint)


@dataclass(frozen=True)
class NoSay(Generic[T]):
    """Options without effect in some cases: it is an error to give one of them then.

    An option that permits something (--force, --trust) is no such option: it is given ahead, for
    what may come. Nor is a flag that is False, which asks for nothing.

    Attributes:
        options: The names of the options.
        where: All that was asked for → whether they have no effect there.
        decides: What decides instead, in words that follow "has no effect"; `{0}` is all that was
            asked for.
        hint: What to do.
    """

    options: tuple[str, ...]
    where: Callable[[T], bool]
    decides: str
    hint: str = "leave it out"


def refuse_no_say(rules: Iterable[NoSay[T]], asked: T, spelled: Mapping[str, str]) -> None:
    """Raise for the first option that was given and has no effect.

    Args:
        rules: The rules of the verb.
        asked: All that was asked for, defaults among it.
        spelled: The name of each option that was given → how the user writes it.

    Raises:
        LoraFxError: Names the option, and what decides instead.
    """
    for rule in rules:
        option = next((spelled[name] for name in rule.options if name in spelled), None)
        if option is not None and rule.where(asked):
            raise LoraFxError(f"{option} has no effect {rule.decides.format(asked)}", rule.hint)


def given_options(asked: Mapping[str, object]) -> dict[str, str]:
    """Return the names of the options given to a public function, each as Python spells it."""
    return {name: name for name, value in asked.items() if value is not None and value is not False}


class CaptureError(LoraFxError):
    """The model could not be captured as a graph; the message has the line of the user's code."""


class NoEffectError(LoraFxError):
    """The inputs were valid and the answer is no: nothing changed, or two models differ."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint, exit_code=1)


class DeadTargetError(NoEffectError):
    """No gradient reaches a target."""


class NoMemberError(LoraFxError, AttributeError):
    """An AttributeError with a hint: the object lacks an attribute, so hasattr is False."""


class LeftOutError(LoraFxError, ImportError):
    """An import of a module that the installed distribution of lora-fx leaves out."""


class MisfitError(LoraFxError):
    """An adapter does not fit a model, most likely because it was made for another model."""

    def __init__(
        self, message: str, hint: str = "check that the adapter was trained on this model"
    ) -> None:
        super().__init__(message, hint)


class MistakeError(LoraFxError):
    """A bug in lora-fx, which no user can correct."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "report this: it is a mistake of lora-fx")


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; handled like Ctrl-C, so that the same clean-up runs."""


def stamp(number: int = 1) -> dict[str, int]:
    """Return the first JSON fields of every file that lora-fx writes: its format number.

    lora-fx 0.1 reads `version`, and later ones `format` where it is there.
    """
    return {"version": number, "format": number}


def check_format(data: Mapping[str, object], where: str, known: int = 1) -> None:
    """Check the format number of a file that lora-fx wrote.

    Args:
        data: Its JSON, with `format`, or with `version` as 0.1 wrote it.
        where: The file, for messages.
        known: The highest number that this lora-fx reads.

    Raises:
        LoraFxError: A later lora-fx wrote the file, or there is no such number.
    """
    number = data.get("format", data.get("version"))
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise LoraFxError(
            f"{where}: format {number!r}; expected a whole number from 1 to {known}",
            "check whether the file was edited",
        )
    if number > known:
        raise LoraFxError(
            f"{where}: format {number}; this lora-fx reads formats up to {known}",
            "update lora-fx: a later version wrote the file",
        )


def visible(text: object, *, lines: bool = False) -> str:
    r"""Return the text with control, format and lone surrogate characters as their codes.

    Names from files are not trusted: they may move a terminal's cursor, or turn the direction of
    text.

    Args:
        text: The text.
        lines: Ends of lines stay.

    >>> visible("a\u202eb\n")
    'a\\u202eb\\u000a'
    """
    text = str(text)
    if text.isprintable():
        return text
    plain = " \n" if lines else " "
    return "".join(
        character if character.isprintable() or character in plain else _code(character)
        for character in text
    )


def _code(character: str) -> str:
    """Return the code of a non-printable character; a space of any width is unchanged."""
    if unicodedata.category(character) == "Zs":
        return character
    number = ord(character)
    if number < 0x10000:
        return f"\\u{number:04x}"
    return f"\\U{number:08x}"


def one_line(text: object, limit: int = 300) -> str:
    """Fold `text` to one line of at most `limit` characters, without terminal colours."""
    line = visible(" ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(text)).split()))
    if len(line) <= limit:
        return line
    return line[: limit - 1] + "…"


# Hints with what was meant, most likely.


def near(
    name: str,
    names: Iterable[str],
    none: str = "run lora-fx targets MODEL for the names",
    *,
    cutoff: float = 0.4,
    folder: str = "",
) -> str:
    """Return a hint with the nearest known names (in `folder`), or `none` if no name is near.

    >>> near("fd", ["fc", "head"])
    'did you mean fc?'
    """
    import difflib

    close = difflib.get_close_matches(name, list(names), n=3, cutoff=cutoff)
    if not close:
        return none
    *first_names, last_name = (os.path.join(folder, close_name) for close_name in close)
    if not first_names:
        return f"did you mean {last_name}?"
    return f"did you mean {', '.join(first_names)} or {last_name}?"


def lead_between(names: Iterable[str], others: Iterable[str]) -> tuple[str, str]:
    """Return the prefix in which a name differs from one of the others, and which has it.

    Returns:
        "lack" where the others lack it, "add" where they have it before the name, and the prefix;
        two empty texts where none would make two names fit.

    >>> lead_between(["fc.weight"], ["model.fc.weight"])
    ('add', 'model.')
    """
    for name, other in itertools.product(names, others):
        if name.endswith(f".{other}"):
            return "lack", name.removesuffix(other)
        if other.endswith(f".{name}"):
            return "add", other.removesuffix(name)
    return "", ""


def expect_name(name: str, names: Collection[str], what: str, none: str) -> None:
    """Raise for an unknown name.

    Args:
        name: The name.
        names: The known names; the nearest of them is the hint.
        what: The beginning of the message, such as "unknown variant".
        none: The hint where no known name is near.
    """
    if name not in names:
        raise LoraFxError(f"{what} {name!r}", near(name, names, none))


def near_path(path: str | os.PathLike[str], none: str = "check the path") -> str:
    """Return a hint with the nearest names in the folder of a missing path, or `none`."""
    folder, name = os.path.split(os.fspath(path).rstrip("/\\"))
    if folder.startswith("~") or name == "~":
        return "replace ~ by the home folder, with os.path.expanduser(path)"
    try:
        siblings = os.listdir(folder or ".")[:_SIBLINGS]
    except (OSError, ValueError):
        return none
    cut_at_space = [sibling for sibling in siblings if sibling.startswith(f"{name} ")]
    if name and len(cut_at_space) == 1:
        return f"quote a path with a space: '{os.path.join(folder, cut_at_space[0])}'"
    other_names = [sibling for sibling in siblings if sibling != name]
    return near(name, other_names, none, cutoff=0.7, folder=folder)


_SIBLINGS = 2000
"""The most names of a folder that are compared; a hundred thousand would take a second."""


def expect_file(path: str | os.PathLike[str], none: str) -> None:
    """Raise for the path of a missing file; the hint is from `near_path`."""
    if not os.path.isfile(path):
        raise LoraFxError(f"{os.fspath(path)}: no such file", near_path(path, none))


# Errors of the operating system.


_WHY = {
    errno.ENOSPC: ("disk full", "free space, or write to another disk"),
    errno.EDQUOT: ("disk quota exceeded", "free space, or write to another disk"),
    errno.EFBIG: ("larger than the file system allows", "write to another file system"),
    errno.EROFS: ("the file system is read-only", "write to another folder"),
    errno.EACCES: ("permission denied", "check its owner and its permissions"),
    errno.EPERM: ("not permitted", "check its owner and its permissions"),
    errno.EIO: ("input/output error", "check the disk and the connection to it"),
    errno.ENOENT: ("no such file or folder", "check the path"),
    errno.EISDIR: ("is a folder", "check the path"),
    errno.ENOTDIR: ("a part of the path is not a folder", "check the path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
    errno.EBUSY: ("in use by the system", "choose another output; this one may be a mount point"),
    errno.EMFILE: ("too many open files", "raise the limit: ulimit -n"),
    errno.ENFILE: ("too many open files", "close other programs"),
    errno.ESTALE: ("stale file handle", "the network file system was remounted: try again"),
}


def explain(error: OSError, path: str | os.PathLike[str]) -> LoraFxError:
    """Return a one-line LoraFxError for an OSError at `path`."""
    why, hint = _WHY.get(error.errno or 0, ("", "check the free space and the permissions"))
    if error.errno == errno.ENOENT:
        if error.filename is None:  # no file: no room for temporary ones
            why = error.strerror or why
            hint = "free space, or name another folder in TMPDIR"
        else:
            missing = error.filename if isinstance(error.filename, str) else path
            hint = near_path(missing, hint)
    why = why or error.strerror or str(error) or type(error).__name__
    return LoraFxError(f"{os.fspath(path)}: {one_line(why)}", hint)


@contextlib.contextmanager
def explained(
    path: str | os.PathLike[str], only: tuple[int, ...] = (), *, itself: bool = False
) -> Iterator[None]:
    """A block whose OSErrors become LoraFxErrors.

    Each error names its own file, or `path` if it has none.

    Args:
        path: The file or folder that is worked on.
        only: The errno values to handle; all of them if empty.
        itself: Name `path` even if the error names another file, such as a temporary one.
    """
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        named = path if itself else error.filename or path
        raise explain(error, named) from error


@contextlib.contextmanager
def retold(
    what: str,
    hint: str,
    kinds: type[Exception] | tuple[type[Exception], ...] = Exception,
    *,
    most: int = 300,
    named: bool = False,
) -> Iterator[None]:
    """A block whose errors from a library become LoraFxErrors, with the library's own text.

    Args:
        what: What failed, naming the file and the tensor.
        hint: What to do about it, one line.
        kinds: The errors that are meant. Libraries whose errors have no common base raise any.
        most: The most characters of the library's own text.
        named: Put the name of the error's class before its text.
    """
    try:
        yield
    except LoraFxError:
        raise
    except kinds as error:
        text = str(error)
        if named:
            text = f"{type(error).__name__}: {error}"
        raise LoraFxError(f"{what}: {one_line(text, most)}", hint) from error


def importing(what: str, hint: str) -> AbstractContextManager[None]:
    """A block that imports a library that lora-fx does not install.

    Args:
        what: Who needs the library, and its name.
        hint: How to install it.
    """
    return retold(f"{what} cannot be imported", hint, ImportError, most=120)


# Blocks in which libraries say nothing: no warning, no log below a level, nothing printed.


@contextlib.contextmanager
def silenced(
    redirect: Callable[[io.StringIO], contextlib.AbstractContextManager[object]] | None = None,
    levels: Mapping[str, int] | None = None,
) -> Iterator[None]:
    """A block without warnings, even if the user turns warnings into errors; see `alone`.

    Args:
        redirect: contextlib.redirect_stdout or redirect_stderr, for what is printed there.
        levels: Name of a logger → the least level that it writes.
    """
    redirected = (redirect or contextlib.nullcontext)(io.StringIO())
    with alone(), _levels(levels or {}), warnings.catch_warnings(), redirected:
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _levels(levels: Mapping[str, int]) -> Iterator[None]:
    """A block in which loggers, by name, have other least levels."""
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    levels_before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in levels_before.items():
            logger.setLevel(level)
