"""The .pt2 archive: checked JSON members and raw tensors; pickles are read only if trusted.

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

from lora_fx.errors import LoraFxError, one_line, type_of
from lora_fx.files.read import open_input
from lora_fx.files.strict_json import json_object
from lora_fx.fx.pt2.serialised import dtype_of_code
from lora_fx.text import Json, JsonView

AGAIN = "write it again: torch.export.save(program, FILE)"
BROKEN = "the file is damaged or was not written by torch.export.save"


@dataclass(frozen=True)
class TensorPlace:
    """The location of a tensor in an archive.

    Attributes:
        member: The member that holds its bytes.
        dtype: Its dtype.
        sizes: Its sizes.
        strides: Its strides, in elements.
        offset: Its first element in the member.
    """

    member: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass
class Archive:
    """An open .pt2 file.

    Args:
        path: For messages.
        zip: The file.
        root: The folder that every member lies in.
        trust: Whether pickled tensors may be read (by torch.load with weights_only=True).
        meta: Tensors take no values: they are made on the meta device.
        tensors: The tensors that were read, by place, whether they are parameters, and whether
            they require gradients.
    """

    path: str
    zip: zipfile.ZipFile
    root: str
    trust: bool = False
    meta: bool = False
    tensors: dict[tuple[TensorPlace, bool, bool], torch.Tensor] = field(default_factory=dict)
    _raw: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def members(self) -> list[str]:
        """The names of the members below the root folder."""
        return [member.removeprefix(self.root) for member in self.zip.namelist()]

    @property
    def programs(self) -> list[str]:
        """The names of the programs, NAME in models/NAME.json."""
        names = []
        for member in self.members:
            if member.startswith("models/") and member.endswith(".json"):
                names.append(member[len("models/") : -len(".json")])
        return names

    def bad(self, text: str, hint: str = BROKEN) -> LoraFxError:
        """Return an error about this file."""
        return LoraFxError(f"{self.path}: {text}", hint)

    def read(self, member: str) -> bytearray:
        """Read a member's bytes, and check its checksum and length."""
        try:
            info = self.zip.getinfo(self.root + member)
            with self.zip.open(info) as file:
                data = bytearray(file.read())
        except KeyError as e:
            raise self.bad(f"the member {member} is missing") from e
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as e:
            raise self.bad(f"{member} cannot be read: {one_line(e, 120)}") from e
        if len(data) != info.file_size:
            raise self.bad(f"{member} is truncated: {len(data)} of {info.file_size} bytes")
        return data

    def json(self, member: str) -> Json:
        """Read a member as a JSON object."""
        return json_object(bytes(self.read(member)), f"{self.path}: {member}", hint=BROKEN)

    def state(self, folder: str, program: str, kind: str) -> dict[str, torch.Tensor]:
        """Return {name: tensor} of one program; equal views of equal bytes are one tensor.

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
                    f"{member}: the entry of {name!r} is wrong: {one_line(e, 120)}"
                ) from e
        return result

    def _tensor(self, folder: str, name: str, row: JsonView) -> torch.Tensor:
        """Return the tensor that a row of a program's table describes."""
        file = row["path_name"]
        if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", ".."):
            raise self.bad(f"{name!r} is in {file!r}, which cannot be the name of a member")
        member = folder + file
        meta = row.get("tensor_meta")
        if meta is None:
            raise self.bad(
                f"{member} ({name!r}) is a pickled Python object and is never read",
                "save a program that holds only tensors",
            )
        is_parameter = bool(row.get("is_param"))
        if row.get("use_pickle"):
            return self._pickled(member, name, is_parameter)

        place = TensorPlace(
            member,
            dtype_of_code(meta["dtype"]),
            sizes=tuple(_whole_number(size) for size in meta["sizes"]),
            strides=tuple(_whole_number(stride) for stride in meta["strides"]),
            offset=_whole_number(meta["storage_offset"]),
        )
        requires_grad = bool(meta.get("requires_grad"))
        key = (place, is_parameter, requires_grad)
        if key not in self.tensors:
            tensor = self._view(name, place)
            if is_parameter:
                requires_grad = requires_grad and tensor.is_floating_point()
                tensor = torch.nn.Parameter(tensor, requires_grad=requires_grad)
            self.tensors[key] = tensor
        return self.tensors[key]

    def _view(self, name: str, place: TensorPlace) -> torch.Tensor:
        """Return the tensor at a place, as a view of its member's bytes, with checked bounds."""
        sizes = place.sizes
        strides = place.strides
        dtype = place.dtype
        if len(sizes) != len(strides):
            raise self.bad(f"{name!r} has {len(sizes)} sizes but {len(strides)} strides")

        end = 0  # the first element of the member behind the tensor
        if math.prod(sizes):
            steps = [(size - 1) * stride for size, stride in zip(sizes, strides, strict=True)]
            end = place.offset + sum(steps) + 1
        try:
            stored_bytes = self.zip.getinfo(self.root + place.member).file_size
        except KeyError as e:
            raise self.bad(f"the member {place.member} ({name!r}) is missing") from e
        if end * dtype.itemsize > stored_bytes or stored_bytes % dtype.itemsize:
            raise self.bad(
                f"{place.member} has {stored_bytes} bytes, but {name!r}, {dtype} of "
                f"{list(sizes)}, needs {end * dtype.itemsize}"
            )

        if self.meta:
            return torch.empty_strided(sizes, strides, dtype=dtype, device="meta")
        if not end:
            return torch.empty_strided(sizes, strides, dtype=dtype)
        if place.member not in self._raw:
            data = self.read(place.member)
            self._raw[place.member] = torch.frombuffer(data, dtype=torch.uint8)
        return self._raw[place.member].view(dtype).as_strided(sizes, strides, place.offset)

    def _pickled(self, member: str, name: str, is_parameter: bool) -> torch.Tensor:
        """Read a pickled tensor with weights_only=True; raise if pickles are not trusted."""
        if not self.trust:
            raise self.bad(
                f"{member} ({name!r}) is a pickle, which can run code, and is not read",
                "pass --trust to read it as weights only; or save a model of plain tensors",
            )
        data = io.BytesIO(self.read(member))
        try:
            value: object = torch.load(data, map_location="cpu", weights_only=True)
        except Exception as e:  # pickles fail as they like
            raise self.bad(
                f"{member} ({name!r}) holds more than tensors: {one_line(e, 120)}",
                "save a model of plain tensors",
            ) from e
        if not isinstance(value, torch.Tensor):
            raise self.bad(f"{member} ({name!r}) holds {type_of(value)}, not a tensor")
        if is_parameter and not isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(value, requires_grad=value.is_floating_point())
        return value


def _whole_number(value: Any) -> int:
    """Return n of {"as_int": n}; raise for anything else."""
    number = value["as_int"]
    if type(number) is not int or not 0 <= number < 1 << 62:
        raise ValueError(f"{number!r} is not a size")
    return number


def open_archive(path: str, *, trust: bool = False, meta: bool = False) -> Archive:
    """Open a .pt2 file.

    Raises:
        LoraFxError: No such file, no zip, no .pt2 archive, or one of another version.
    """
    opened = _open_zip(path)
    members = opened.namelist()
    root = ""
    if members:
        root = members[0].partition("/")[0] + "/"
    archive = Archive(path, opened, root, trust, meta)

    _check_members(archive)
    _check_format(archive)
    if not archive.programs:
        raise archive.bad("holds no program (models/NAME.json)", AGAIN)
    return archive


def _open_zip(path: str) -> zipfile.ZipFile:
    """Open the zip of a path; the file is closed when the zip is no longer used."""
    file = open_input(path)
    try:
        opened = zipfile.ZipFile(file)
        weakref.finalize(opened, file.close)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        file.close()
        raise LoraFxError(
            f"{path}: not a .pt2 file, or a truncated one: {one_line(e, 120)}", BROKEN
        ) from e
    return opened


def _check_members(archive: Archive) -> None:
    """Raise for a zip that is not a .pt2 archive: one root folder, uncompressed members."""
    infos = archive.zip.infolist()
    members = [info.filename for info in infos]
    if "serialized_exported_program.json" in members:
        raise archive.bad("an archive of an older torch", f"{AGAIN}, with torch 2.9 or newer")
    is_below_root = all(member.startswith(archive.root) for member in members)
    if not is_below_root or "archive_format" not in archive.members:
        raise archive.bad("a zip file, but not a .pt2 archive")
    if len(set(members)) != len(members):
        repeated = next(member for member in members if members.count(member) > 1)
        raise archive.bad(f"the member {repeated} appears twice")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:
            raise archive.bad(
                f"{info.filename} is compressed, but torch stores members uncompressed"
            )


def _check_format(archive: Archive) -> None:
    """Raise for a format, version or byte order that is not supported.

    Members are read only after `_check_members`: a compressed one may be a bomb.
    """
    members = archive.members
    if bytes(archive.read("archive_format")) != b"pt2":
        raise archive.bad("a zip file, but not a .pt2 archive")
    version = b"0"
    if "archive_version" in members:
        version = bytes(archive.read("archive_version"))
    if version != b"0":
        raise archive.bad(f"archive version {one_line(version, 20)}; expected 0", AGAIN)
    if "byteorder" in members and bytes(archive.read("byteorder")) != b"little":
        raise archive.bad("written on a big-endian machine", AGAIN)
