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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from chiar_megatron.config.fields import nearest_name
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.tensors import LazyTensor, read_values

_REFUSED = re.compile(r"GLOBAL (\S+)")
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
            with zipfile.ZipFile(path) as records:
                if any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist()):
                    raise CheckpointError(f"{path} was compressed, which torch.save never does")
        with _only_globals(accepted):
            content = torch.load(path, map_location="meta" if is_zip else "cpu", weights_only=True)
        return _with_places(content, path, _begins(path) if is_zip else None)
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


def _begins(path: Path) -> set[int]:
    """Where in a file the tensors' numbers begin, by its directory."""
    records = torch._C.PyTorchFileReader(str(path))
    names = records.get_all_records()
    if "byteorder" in names and records.get_record("byteorder") != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine; save it again on another")
    offset = records.get_record_offset  # type: ignore[attr-defined]
    return {offset(name) for name in names if name.startswith("data/")}


def _with_places(value: Any, path: Path, begins: AbstractSet[int] | None) -> Any:
    """The same structure with StoredTensors. begins: where those that meta tensors stand for may lie in the
    file; None: the tensors are real."""
    if isinstance(value, Tensor):
        return _stored(value, path, begins)
    if isinstance(value, dict):
        return {key: _with_places(item, path, begins) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_places(item, path, begins) for item in value)
    return value


def _stored(tensor: Tensor, path: Path, begins: AbstractSet[int] | None) -> StoredTensor | None:
    """None for a tensor of another layout (sparse, quantised): it is of no use here."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return None
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if begins is None:
        whole = tensor.detach()
        part = lambda start, count: whole.reshape(-1)[start : start + count].clone()  # noqa: E731
        place: object = (whole.data_ptr(), shape, tensor.stride())
        return StoredTensor(shape, dtype, lambda: whole, part, place)
    begin = tensor.untyped_storage()._checkpoint_offset
    assert begin is not None, "torch.load on the meta device tells where a tensor lies"
    if begin not in begins and tensor.numel() > 0:  # torch reckons the place, not looking into the directory
        raise CheckpointError(
            f"{path} was packed by another program than torch.save; load it and save it by torch.save again"
        )
    stride, first = tensor.stride(), int(tensor.storage_offset())

    def values(start: int, count: int) -> Tensor:
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
        try:
            writer = torch._C.PyTorchFileWriter(file, True, _ALIGNMENT)
            for name, text in (("data.pkl", stream.getvalue()), ("byteorder", b"little")):
                writer.write_record(name, text, len(text))
            for storage in pickler.storages.values():
                tensor = storage.tensor.load().detach().contiguous()
                own = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
                writer.write_record(f"data/{storage.number}", own.untyped_storage(), own.nbytes)  # type: ignore[arg-type]
                advance(own.nbytes)
            writer.write_end_of_file()
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


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
