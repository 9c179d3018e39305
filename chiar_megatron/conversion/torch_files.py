"""Files of `torch.save`, read and written tensor by tensor, nothing in them executed.

Reading gives the file's own structure of dicts and lists, with a `StoredTensor` for every tensor: where it
lies, to be read when asked for. No file is mapped into memory, so a limit on memory is kept by any number of
them.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from chiar_megatron.config.fields import nearest_name
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.tensors import LazyTensor, read_values

_REFUSED = re.compile(r"GLOBAL (\S+)")
_PIECE_BYTES = 1 << 22
_ALIGNMENT = 64  # of tensors in a file, as torch.save aligns them
_STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.bool: torch.BoolStorage, torch.uint8: torch.ByteStorage,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor(LazyTensor):
    """A tensor in a file; `read` gives parts of it."""

    read: Callable[[int, int], Tensor]
    """A copy of so many of its values, 1-D, from the first one named on, in their order."""
    place: object
    """Equal for two tensors that are the same numbers in the file."""


def read_torch_file(path: Path, accepted: Sequence[Any] = ()) -> dict[str, Any]:
    """The dict in a `torch.save`d file, with `StoredTensor`s.

    accepted: as `read_torch_value`'s. Raises CheckpointError as that does, and for what is no dict.
    """
    content = read_torch_value(path, accepted)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def read_torch_value(path: Path, accepted: Sequence[Any] = ()) -> Any:
    """What was given to `torch.save`, with `StoredTensor`s.

    accepted: classes that its pickle may name besides torch's own, or (class, "name in the file") pairs.
    Raises CheckpointError, naming it, for what would call anything else; for a file that is missing or torn.
    """
    if not path.is_file():
        what = "is a folder, not a file of torch.save" if path.is_dir() else "does not exist"
        folder = path.parent
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise CheckpointError(f"{path} {what}{'' if path.exists() else nearest_name(path.name, names)}")
    try:
        is_zip = zipfile.is_zipfile(path)  # since torch 1.6; older ones are read as a whole
        if is_zip:
            _check_structure(path)
        with _only_globals(accepted):
            content = torch.load(path, map_location="meta" if is_zip else "cpu", weights_only=True)
        return _with_places(content, path, _records(path) if is_zip else None)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        wanted = _REFUSED.search(str(error))
        if wanted is None:
            raise CheckpointError(f"{path} is no PyTorch checkpoint, or is torn: copy it again") from None
        raise CheckpointError(
            f"{path} is refused: reading it would call {wanted[1]}, and only tensors and plain values are "
            "read; save it again without that object"
        ) from None
    except Exception as error:  # torch.load raises nearly anything for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:80]
        raise CheckpointError(
            f"{path} is no PyTorch checkpoint, or is torn: copy it again ({reason})"
        ) from None


@contextmanager
def _only_globals(classes: Sequence[Any]) -> Iterator[None]:
    """Within, `weights_only` loading accepts these classes and torch's own, and no others (megatron-core has
    torch accept more, for its files); afterwards what it accepted before."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(list(classes))
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


@dataclass
class _Record:
    """A tensor's numbers, as the directory of a file tells of them."""

    name: str
    begin: int
    size: int
    crc: int
    """0 where it was not computed (`torch.serialization.set_crc32_options(False)`)."""
    is_checked: bool = False

    def check(self, path: Path) -> None:
        """Raise CheckpointError if the numbers are not those that were written; read once, in pieces."""
        if self.is_checked or self.crc == 0:
            return
        found, left = 0, self.size
        with path.open("rb") as file:
            file.seek(self.begin)
            while left and (piece := file.read(min(left, _PIECE_BYTES))):
                found, left = zlib.crc32(piece, found), left - len(piece)
        if found != self.crc:
            raise CheckpointError(f"{path} is damaged: {self.name} is not what was written; copy it again")
        self.is_checked = True


def _check_structure(path: Path) -> None:
    """Raise CheckpointError for a file that torch.save did not write so, tensors' numbers left aside."""
    with zipfile.ZipFile(path) as records:
        for record in records.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path} was compressed, which torch.save never does")
            if record.CRC and "/data/" not in record.filename:
                records.read(record)  # compares it with its checksum


def _records(path: Path) -> dict[int, _Record]:
    """A file's tensors by where their numbers begin."""
    reader = torch._C.PyTorchFileReader(str(path))
    names = reader.get_all_records()
    if "byteorder" in names and reader.get_record("byteorder") != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine; save it again on another")
    with zipfile.ZipFile(path) as records:
        told = {record.filename.partition("/")[2]: record for record in records.infolist()}
    offset = reader.get_record_offset  # type: ignore[attr-defined]
    found = [
        _Record(name, offset(name), told[name].file_size, told[name].CRC)
        for name in names
        if name.startswith("data/")
    ]
    return {record.begin: record for record in found}


def _with_places(value: Any, path: Path, records: Mapping[int, _Record] | None) -> Any:
    """The same structure with StoredTensors. records: where those that meta tensors stand for may lie in the
    file; None: the tensors are real."""
    if isinstance(value, Tensor):
        return _stored(value, path, records)
    if isinstance(value, dict):
        return {key: _with_places(item, path, records) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_places(item, path, records) for item in value)
    return value


def _stored(tensor: Tensor, path: Path, records: Mapping[int, _Record] | None) -> StoredTensor | None:
    """None for a tensor of another layout (sparse, quantised): it is of no use here."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return None
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if records is None:
        whole = tensor.detach()
        part = lambda start, count: whole.reshape(-1)[start : start + count].clone()  # noqa: E731
        place: object = (whole.data_ptr(), shape, tensor.stride())
        return StoredTensor(shape, dtype, lambda: whole, part, place)
    begin = tensor.untyped_storage()._checkpoint_offset
    assert begin is not None, "torch.load on the meta device tells where a tensor lies"
    record = records.get(begin)
    if record is None and tensor.numel() > 0:  # torch reckons the place, not looking into the directory
        raise CheckpointError(
            f"{path} was packed by another program than torch.save; load it and save it by torch.save again"
        )
    stride, first = tensor.stride(), int(tensor.storage_offset())

    def values(start: int, count: int) -> Tensor:
        if record is not None:
            record.check(path)
        return read_values(path, begin + start * dtype.itemsize, dtype, count)

    def read(start: int, count: int) -> Tensor:
        if tensor.is_contiguous():
            return values(first + start, count)
        return load().reshape(-1)[start : start + count].clone()

    def load() -> Tensor:
        if tensor.is_contiguous():
            return values(first, tensor.numel()).view(shape)
        span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        return values(first, span).as_strided(shape, stride)

    return StoredTensor(shape, dtype, load, read, (path, begin, shape, stride, first))


def write_torch_file(path: Path, content: Any, advance: Callable[[int], None] = lambda _: None) -> None:
    """What `torch.save` writes, with no more than one tensor in memory. Raises OSError.

    content: plain values, dicts and lists, with a `LazyTensor` for every tensor; the same one twice is stored
    once. advance: told the bytes of every tensor written.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(content)
    with path.open("wb") as file:
        steady = _Steady(file)
        writer = torch._C.PyTorchFileWriter(cast(IO[bytes], steady), True, _ALIGNMENT)
        for name, text in (("data.pkl", stream.getvalue()), ("byteorder", b"little")):
            writer.write_record(name, text, len(text))
        for storage in pickler.storages.values():
            tensor = storage.tensor.load().detach().contiguous()
            own = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            writer.write_record(f"data/{storage.number}", own.untyped_storage(), own.nbytes)  # type: ignore[arg-type]
            steady.check()
            advance(own.nbytes)
        writer.write_end_of_file()
        steady.check()


def save_small(path: Path, content: Any) -> None:
    """`torch.save` of what is small, by way of memory: of a full disk torch says nothing of use. Raises
    OSError."""
    stream = io.BytesIO()
    torch.save(content, stream)
    path.write_bytes(stream.getbuffer())


class _Steady:
    """A file that fails only when asked: torch's writer still writes when it is taken down, and an exception
    then ends the process."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, content: memoryview) -> int:
        """After the first failure, nothing."""
        try:
            if self._error is None:
                self._file.write(content)
        except OSError as error:
            self._error = error
        return len(content)

    def check(self) -> None:
        """Raises OSError if writing has failed."""
        if self._error is not None:
            raise self._error


def in_memory(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already, for `write_torch_file`."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True)
class _Storage:
    """Stands for a tensor's numbers in a pickle."""

    number: int
    tensor: LazyTensor


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.storages: dict[int, _Storage] = {}

    def persistent_id(self, value: Any) -> Any:
        """torch's for a tensor's storage."""
        if not isinstance(value, _Storage):
            return None
        numel = torch.Size(value.tensor.shape).numel()
        return "storage", _STORAGES[value.tensor.dtype], str(value.number), "cpu", numel

    def reducer_override(self, value: Any) -> Any:
        """A tensor as torch pickles it."""
        if not isinstance(value, LazyTensor):
            return NotImplemented
        storage = self.storages.setdefault(id(value), _Storage(len(self.storages), value))
        stride = torch.empty(value.shape, device="meta").stride()
        arguments: tuple[Any, ...] = (storage, 0, value.shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def tensors_of(state: Any, path: Path, what: str) -> Mapping[str, StoredTensor]:
    """The tensors of a state dict by name. Raises CheckpointError for what is no plain dict of tensors."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: {what} is a {type(state).__name__}, not a dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise CheckpointError(f"{path}: {what} entry {str(name)[:60]!r} is no plain tensor")
    return state


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors hold the same; read only where they lie apart."""
    return first.place == second.place or (
        first.shape == second.shape and torch.equal(first.load(), second.load())
    )
