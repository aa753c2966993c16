"""The stand-in for the CUDA runtime, and the files that it is asked about: once in a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda import stand_in


@pytest.fixture(scope="session")
def stand_in_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libraries; a skip where they cannot be built, which `python -m tests.cuda` fails at."""
    try:
        return stand_in.build(tmp_path_factory.mktemp("stand_in"))
    except stand_in.CannotBuild as error:
        pytest.skip(f"no stand-in for the CUDA runtime: {error}")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exported files, because some modes export the file of another mode again."""
    return tmp_path_factory.mktemp("files")
