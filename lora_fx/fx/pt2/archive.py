"""The .pt2 archive, read by hand: checked JSON members and raw tensors, and no pickle unasked.

`torch.export.load` runs what a file's pickles say (sample inputs, pickled weights). Here the zip
is opened by Python's own module, sample inputs are left alone, and tensors are built from raw
bytes by what the JSON says of them, their checksums compared.
"""

from __future__ import annotations

import io
import math
import weakref
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.read import json_object, open_input
from lora_fx.fx.pt2.serialised import dtype_of_code
from lora_fx.text import Json, JsonView

MANIFEST = "data/extra/lora_fx.json"
AGAIN = "write it again: torch.export.save(program, FILE)"
BROKEN = "the file is damaged or was not written by torch.export.save"
Place = tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], int]
"""The member that a tensor lies in, its dtype, sizes and strides, and its first element there."""


@dataclass
class Archive:
    """An open .pt2 file.

    Args:
        path: For messages.
        zip: The file.
        root: The folder that every member lies in.
        trust: Whether pickled tensors may be read (by torch.load with weights_only=True).
        meta: Tensors take no values: they are made on the meta device.
    """

    path: str
    zip: zipfile.ZipFile
    root: str
    trust: bool = False
    meta: bool = False
    tensors: dict[tuple[Place, bool, bool], torch.Tensor] = field(default_factory=dict)
    _raw: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def members(self) -> list[str]:
        """Names below the root folder."""
        return [n.removeprefix(self.root) for n in self.zip.namelist()]

    @property
    def programs(self) -> list[str]:
        """Names of the programs, as models/NAME.json."""
        names = [n for n in self.members if n.startswith("models/") and n.endswith(".json")]
        return [n[len("models/") : -len(".json")] for n in names]

    def bad(self, text: str, hint: str = BROKEN) -> LoraFxError:
        """An error about this file."""
        return LoraFxError(f"{self.path}: {text}", hint)

    def read(self, member: str) -> bytearray:
        """A member's bytes, checksum compared."""
        try:
            info = self.zip.getinfo(self.root + member)
            with self.zip.open(info) as f:
                data = bytearray(f.read())
        except KeyError as e:
            raise self.bad(f"the member {member} is missing") from e
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as e:
            raise self.bad(f"{member} cannot be read: {one_line(e, 120)}") from e
        if len(data) != info.file_size:
            raise self.bad(f"{member} is cut: {len(data)} of {info.file_size} bytes")
        return data

    def json(self, member: str) -> Json:
        """A member as a JSON object."""
        return json_object(bytes(self.read(member)), f"{self.path}: {member}", hint=BROKEN)

    def state(self, folder: str, program: str, kind: str) -> dict[str, torch.Tensor]:
        """{name: tensor} of one program; equal bytes read in equal ways are one tensor.

        Args:
            folder: data/weights/ or data/constants/.
            program: Name of the program.
            kind: weights or constants.
        """
        if f"{folder}{program}.pt" in self.members:
            raise self.bad(f"{folder}{program}.pt is a pickle of all {kind}", AGAIN)
        member = f"{folder}{program}_{kind}_config.json"
        rows = self.json(member).get("config")
        if not isinstance(rows, dict):
            raise self.bad(f"{member} has no table of tensors")
        result = {}
        for name, row in rows.items():
            try:
                result[name] = self._tensor(folder, name, row)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
                raise self.bad(
                    f"{member}: {name!r} is described wrongly: {one_line(e, 120)}"
                ) from e
        return result

    def _tensor(self, folder: str, name: str, row: JsonView) -> torch.Tensor:
        file = row["path_name"]
        if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", ".."):
            raise self.bad(f"{name!r} lies in {file!r}, which is no name of a member")
        member, about = folder + file, row.get("tensor_meta")
        if about is None:
            raise self.bad(
                f"{member} ({name!r}) is a pickled Python object and is never read",
                "a program of tensors only can be opened",
            )
        if row.get("use_pickle"):
            return self._pickled(member, name, bool(row.get("is_param")))
        dtype = dtype_of_code(about["dtype"])
        sizes = tuple(_count(n) for n in about["sizes"])
        strides = tuple(_count(n) for n in about["strides"])
        offset = _count(about["storage_offset"])
        param, grad = bool(row.get("is_param")), bool(about.get("requires_grad"))
        key = ((member, dtype, sizes, strides, offset), param, grad)
        if key not in self.tensors:
            made = self._view(name, key[0])
            if param:
                made = torch.nn.Parameter(made, requires_grad=grad and made.is_floating_point())
            self.tensors[key] = made
        return self.tensors[key]

    def _view(self, name: str, place: Place) -> torch.Tensor:
        member, dtype, sizes, strides, offset = place
        if len(sizes) != len(strides):
            raise self.bad(f"{name!r} has {len(sizes)} sizes and {len(strides)} strides")
        steps = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        last = offset + steps + 1 if math.prod(sizes) else 0
        try:
            have = self.zip.getinfo(self.root + member).file_size
        except KeyError as e:
            raise self.bad(f"the member {member} ({name!r}) is missing") from e
        if last * dtype.itemsize > have or have % dtype.itemsize:
            raise self.bad(
                f"{member} has {have} bytes; {name!r}, {dtype} of {list(sizes)}, needs "
                f"{last * dtype.itemsize}"
            )
        if self.meta:
            return torch.empty_strided(sizes, strides, dtype=dtype, device="meta")
        if not last:
            return torch.empty_strided(sizes, strides, dtype=dtype)
        if member not in self._raw:
            self._raw[member] = torch.frombuffer(self.read(member), dtype=torch.uint8)
        return self._raw[member].view(dtype).as_strided(sizes, strides, offset)

    def _pickled(self, member: str, name: str, param: bool) -> torch.Tensor:
        if not self.trust:
            raise self.bad(
                f"{member} ({name!r}) is a pickle, which can run code, and is not read",
                "--trust reads it as weights only; or save a model of plain tensors",
            )
        data = io.BytesIO(self.read(member))
        try:
            value: object = torch.load(data, map_location="cpu", weights_only=True)
        except Exception as e:  # pickles fail as they like
            raise self.bad(
                f"{member} ({name!r}) holds more than tensors: {one_line(e, 120)}",
                "--trust reads tensors only; save a model of plain tensors",
            ) from e
        if not isinstance(value, torch.Tensor):
            raise self.bad(f"{member} ({name!r}) holds a {type(value).__name__}, not a tensor")
        if param and not isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(value, requires_grad=value.is_floating_point())
        return value


def _count(value: Any) -> int:
    """The whole number of {"as_int": n}; anything else is refused."""
    number = value["as_int"]
    if type(number) is not int or not 0 <= number < 1 << 62:
        raise ValueError(f"{number!r} is no size")
    return number


def open_archive(path: str, *, trust: bool = False, meta: bool = False) -> Archive:
    """Open a .pt2 file.

    Raises:
        LoraFxError: No such file, no zip, no .pt2 archive, or one of another version.
    """
    file = open_input(path)
    try:
        opened = zipfile.ZipFile(file)
        weakref.finalize(opened, file.close)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        file.close()
        raise LoraFxError(f"{path}: no .pt2 file, or a cut one: {one_line(e, 120)}", BROKEN) from e
    infos = opened.infolist()
    names = [i.filename for i in infos]
    root = names[0].partition("/")[0] + "/" if names else ""
    archive = Archive(path, opened, root, trust, meta)
    members = archive.members
    if "serialized_exported_program.json" in names:
        raise archive.bad("an archive of an older torch", f"{AGAIN}, with torch 2.9 or newer")
    if not all(n.startswith(root) for n in names) or "archive_format" not in members:
        raise archive.bad("a zip, but no .pt2 archive")
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise archive.bad(f"the member {twice} is there twice")
    packed = next((i.filename for i in infos if i.compress_type != zipfile.ZIP_STORED), None)
    if packed:
        raise archive.bad(f"{packed} is compressed; torch stores members as they are")
    if bytes(archive.read("archive_format")) != b"pt2":  # not earlier: it may be a bomb
        raise archive.bad("a zip, but no .pt2 archive")
    version = bytes(archive.read("archive_version")) if "archive_version" in members else b"0"
    if version != b"0":
        raise archive.bad(f"archive version {one_line(version, 20)}, not 0", AGAIN)
    if "byteorder" in members and bytes(archive.read("byteorder")) != b"little":
        raise archive.bad("written on a big-endian machine", AGAIN)
    if not archive.programs:
        raise archive.bad("holds no program (models/NAME.json)", AGAIN)
    return archive
