"""A stand-in for the CUDA runtime, with which ONNX Runtime's CUDA provider makes sessions.

`libonnxruntime_providers_cuda.so` of onnxruntime-gpu is real: its kernels, its partitioning, its
fusions and its checks of CUDA graphs are those of a machine with a GPU. The libraries of NVIDIA
that it needs are built here. They allocate memory of the host and run no kernel, so a session can
be made and asked where its nodes are, and its numbers mean nothing.

The folder may be on LD_LIBRARY_PATH of child processes only. Tried with onnxruntime-gpu 1.31.1,
whose libraries are those of CUDA 13.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = {"libcudart": "runtime.c", "libcublas": "blas.c", "libcublasLt": "blas.c",
           "libcuda": "driver.c", "libnvinfer": "inference.c"}  # fmt: skip
"""A library of NVIDIA and the file with those of its functions that return more than 0."""
TOOLS = ("cc", "nm", "readelf")
LIBRARIES_OF_NVIDIA = re.compile(r"\[(lib(?:cu|nv)\w+\.so\.\d+)\]")
UNDEFINED = re.compile(r"U (\w+)(?:@(\S+))?")
UNVERSIONED = {"libcuda": re.compile(r"cu[A-Z]"), "libnvinfer": re.compile(r"\w*(Infer|Plugin)"),
               "libnvonnxparser": re.compile(r"create\w+Parser")}  # fmt: skip
"""Functions of these libraries bear no version; all others bear their library's name."""
NONE = re.compile("$")


class CannotBuild(Exception):
    """This machine has no compiler, or this ONNX Runtime has no CUDA provider."""


def provider_library(name: str = "cuda") -> Path:
    """The library of the CUDA provider, or of TensorRT's.

    Raises:
        CannotBuild: The installed onnxruntime has none.
    """
    package = find_spec("onnxruntime")
    if package is None or package.origin is None:
        raise CannotBuild("onnxruntime is not installed")
    library = Path(package.origin).parent / "capi" / f"libonnxruntime_providers_{name}.so"
    if not library.exists():
        raise CannotBuild(
            f"this build of onnxruntime has no provider {name}: install onnxruntime-gpu"
        )
    return library


def build(folder: Path) -> Path:
    """Build all libraries that the CUDA provider needs into a folder, and return the folder.

    Raises:
        CannotBuild: There is no CUDA provider, no compiler, or the compiler fails.
    """
    return _build(folder, [provider_library()])


def build_for_registry(folder: Path) -> Path:
    """Build what build does, and what TensorRT's provider needs; see registry.py.

    Raises:
        CannotBuild: As build.
    """
    return _build(folder, [provider_library(), provider_library("tensorrt")])


def _build(folder: Path, providers: Sequence[Path]) -> Path:
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise CannotBuild(f"{tool} is not installed: install gcc and binutils")

    undefined: dict[tuple[str, str], None] = {}
    needed: dict[str, None] = {}
    for provider in providers:
        printed = _printed("nm", "-D", "--undefined-only", provider)
        undefined.update(dict.fromkeys(UNDEFINED.findall(printed)))
        needed.update(
            dict.fromkeys(LIBRARIES_OF_NVIDIA.findall(_printed("readelf", "-d", provider)))
        )
    folder.mkdir(parents=True, exist_ok=True)
    for library in needed:
        unversioned = UNVERSIONED.get(library.partition(".")[0], NONE)
        functions = [
            function
            for function, version in undefined
            if version == library or (not version and unversioned.match(function))
        ]
        _compile(folder, library, functions)
    return folder


def _compile(folder: Path, library: str, functions: list[str]) -> None:
    """Write one library's source, and compile it with the version that its symbols bear."""
    written = SOURCES.get(library.partition(".")[0])
    source = (HERE / written).read_text() if written else ""
    for function in functions:
        if not re.search(rf"\b{function}\(", source):
            source += f"int {function}() {{ return 0; }}\n"
    code = folder / f"{library}.c"
    code.write_text(source)
    versions = folder / f"{library}.map"
    versions.write_text(f"{library} {{ global: *; }};\n")
    options = ["-w", "-shared", "-fPIC"]
    options += [f"-Wl,-soname,{library}", f"-Wl,--version-script={versions}"]
    _printed("cc", *options, "-o", folder / library, code)


def _printed(*command: str | Path) -> str:
    """The standard output of a command.

    Raises:
        CannotBuild: The command fails.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def environment(folder: Path) -> Mapping[str, str]:
    """The variables of this process, with the stand-in first among the folders of libraries."""
    folders = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(folders)}


def run_with(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a child process that sees the stand-in."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(folder), capture_output=True, text=True)
