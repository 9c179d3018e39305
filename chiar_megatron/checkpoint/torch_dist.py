"""torch's distributed checkpoint format (megatron-core's `torch_dist`), read and written tensor by tensor.

`dist_checkpointing` loads and saves a whole model in one call; here no more than one tensor is in memory,
and nothing in `.metadata`, a pickle, is called but the classes that describe tensors.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from chiar_megatron.checkpoint.sharded import disk_error
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.tensors import LazyTensor

METADATA = ".metadata"
_REFUSED = re.compile(r"GLOBAL (\S+)")  # in torch's message
_CHECKPOINT = "torch.distributed.checkpoint"
# All that a `.metadata` may name: what describes tensors and where they lie.
_SAFE_NAMES = {
    f"{_CHECKPOINT}.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_CHECKPOINT}.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed._shard.sharded_tensor.metadata": {
        "TensorProperties", "MEM_FORMAT_ENCODING", "ShardedTensorMetadata",
    },
    "torch.distributed._shard.sharding_spec.chunk_sharding_spec": {"ChunkShardingSpec"},
    "torch.distributed._shard.metadata": {"ShardMetadata"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"} | {name for name, kind in vars(torch).items() if type(kind) is torch.dtype},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "builtins": {"set"},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what describes tensors."""
        if name in _SAFE_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"reading it would call {module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """What tensors a folder holds, and where. Raises CheckpointError for a torn or malicious `.metadata`."""
    path = folder / METADATA
    try:
        content = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a torn pickle raises nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is refused or torn: {reason}") from None
    if not isinstance(content, Metadata) or not isinstance(content.storage_data, dict):
        raise CheckpointError(f"{path} is no metadata of a distributed checkpoint")
    for place in content.storage_data.values():
        if not isinstance(place, _StorageInfo) or Path(place.relative_path).name != place.relative_path:
            raise CheckpointError(f"{path} is refused: it names files outside its folder")
    return content


def check_files(folder: Path, metadata: Metadata) -> None:
    """Raise CheckpointError, naming it, for a file that is missing or ends before what should lie in it."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{folder / name} is missing; copy it too") from None
        if size < end:
            raise CheckpointError(f"{folder / name} has {size} bytes, {end} were written; copy it again")


@contextmanager
def nothing_executed() -> Iterator[None]:
    """Within, `dist_checkpointing.load` reads a folder's `.metadata` and small objects with lists of what
    they may name; torch would call whatever they say. Raises CheckpointError, naming it."""

    def metadata_of(self: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def load_bytes(self: DefaultLoadPlanner, item: ReadItem, value: io.BytesIO) -> None:
        name = item.dest_index.fqn
        try:
            content = torch.load(value, weights_only=True)  # megatron-core has registered what it needs
        except pickle.UnpicklingError as error:
            wanted = _REFUSED.search(str(error))
            reason = f"reading it would call {wanted[1]}" if wanted else "it is torn"
            raise CheckpointError(f"the object {name} is refused: {reason}") from None
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], content)
        else:
            assert self.state_dict is not None
            self.state_dict[name] = content

    before = (FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes)
    setattr(FileSystemReader, "read_metadata", metadata_of)
    setattr(DefaultLoadPlanner, "load_bytes", load_bytes)
    try:
        yield
    finally:
        setattr(FileSystemReader, "read_metadata", before[0])
        setattr(DefaultLoadPlanner, "load_bytes", before[1])


def stored_tensors(folder: Path, metadata: Metadata | None = None) -> dict[str, LazyTensor]:
    """Every tensor of the folder by its key, read when asked for."""
    metadata = read_metadata(folder) if metadata is None else metadata
    return {
        key: lazy_slice(folder, metadata, key, (0,) * len(stored.size), tuple(stored.size))
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def lazy_slice(
    folder: Path, metadata: Metadata, key: str, offsets: Sequence[int], sizes: Sequence[int]
) -> LazyTensor:
    """The part of a stored tensor that begins at `offsets`."""
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)

    def load() -> Tensor:
        return _read_slice(folder, metadata, key, tuple(offsets), tuple(sizes))

    return LazyTensor(tuple(sizes), stored.properties.dtype, load)


class _Target:
    """The part of a load planner that a reader talks to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        """Where to copy to."""
        place = self.tensor
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            place = place.narrow(dim, start, length)
        return place

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """Nothing more to do."""


def _read_slice(
    folder: Path, metadata: Metadata, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Tensor:
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    out = torch.empty(sizes, dtype=stored.properties.dtype)
    items, covered = [], 0
    for number, chunk in enumerate(stored.chunks):
        starts = [max(a, b) for a, b in zip(chunk.offsets, offsets, strict=True)]
        ends = [
            min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)
        ]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        if any(length <= 0 for length in lengths):
            continue
        covered += torch.Size(lengths).numel()
        items.append(
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(key, torch.Size(offsets)),
                dest_offsets=torch.Size([s - o for s, o in zip(starts, offsets, strict=True)]),
                storage_index=MetadataIndex(key, chunk.offsets, number),
                storage_offsets=torch.Size([s - o for s, o in zip(starts, chunk.offsets, strict=True)]),
                lengths=torch.Size(lengths),
            )
        )
    if covered != out.numel():
        raise CheckpointError(f"{folder}: {key} has {covered} of {out.numel()} values; copy it again")
    reader = FileSystemReader(folder)
    reader.storage_data = metadata.storage_data
    try:
        reader.read_data(LoadPlan(items), _Target(out)).wait()  # type: ignore[arg-type]
    except Exception as error:  # torch.load raises nearly anything for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:80]
        raise CheckpointError(f"{folder}: {key} is torn; copy the folder again ({reason})") from None
    return out


@dataclass(frozen=True)
class Chunk:
    """One piece of a stored tensor: the key's whole shape, where the piece begins, and what it holds."""

    key: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: LazyTensor


class TorchDistWriter:
    """A folder in the making: chunks in files of a bounded size, then the metadata.

    Each file stands for what one rank would have written, so that torch's own planner makes the metadata.
    """

    def __init__(
        self, folder: Path, chunks: Sequence[Chunk], objects: Sequence[str], file_bytes: int
    ) -> None:
        """objects: keys of empty objects, which megatron-core's layers expect."""
        self.folder = folder
        self.files = _in_files(chunks, file_bytes)
        plans = [SavePlan([_item(chunk) for chunk in file]) for file in self.files]
        plans[0].items.extend(_object_item(key) for key in objects)
        self._planner = _LazyPlanner({(c.key, c.offsets): c.tensor.load for c in chunks})
        self._plans, self._metadata = self._planner.create_global_plan(plans)
        self._writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
        self._plans = self._writer.prepare_global_plan(self._plans)
        self._results: list[list[WriteResult]] = []

    @property
    def file_sizes(self) -> list[int]:
        """Bytes of the tensors in each file."""
        return [sum(map(_bytes, file)) for file in self.files]

    def file_name(self, number: int) -> str:
        """Name of the file of that number."""
        return f"__{number}_0.distcp"

    def write_file(self, number: int, advance: Callable[[int], None], path: Path) -> list[list[Any]]:
        """Write one file; returns where its tensors lie, as plain values for `add_written`. Raises OSError.

        advance: told the bytes of every tensor written. path: as the folder and `file_name` say.
        """
        assert path == self.folder / self.file_name(number)
        self._planner.advance = advance
        try:
            results = self._writer.write_data(self._plans[number], self._planner).wait()
        except RuntimeError as error:
            raise disk_error(error) from error
        return [_plain(result) for result in results]

    def add_written(self, places: list[list[Any]]) -> None:
        """Take note of a file's tensors, in the order of the files."""
        self._results.append([_result(place) for place in places])

    def finish(self) -> None:
        """Write `.metadata`. Raises OSError."""
        self._writer.finish(self._metadata, self._results)


class _LazyPlanner(DefaultSavePlanner):
    """torch's planner, for tensors that are loaded when their turn comes."""

    def __init__(self, loads: Mapping[tuple[str, tuple[int, ...]], Callable[[], Tensor]]) -> None:
        super().__init__(flatten_state_dict=False)
        self._loads = loads
        self.advance: Callable[[int], None] = lambda _: None

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor, loaded now."""
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([None], stream)  # as megatron-core: one item for each object of that key
            return stream
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        tensor = self._loads[write_item.index.fqn, tuple(chunk.offsets)]()
        self.advance(tensor.nbytes)
        return tensor.reshape(chunk.sizes).contiguous()


def _in_files(chunks: Sequence[Chunk], file_bytes: int) -> list[list[Chunk]]:
    files: list[list[Chunk]] = [[]]
    size = 0
    for chunk in chunks:
        own = _bytes(chunk)
        if files[-1] and size + own > file_bytes:
            files.append([])
            size = 0
        files[-1].append(chunk)
        size += own
    return files


def _bytes(chunk: Chunk) -> int:
    return torch.Size(chunk.tensor.shape).numel() * chunk.tensor.dtype.itemsize


def _item(chunk: Chunk) -> WriteItem:
    sizes = (1,) * (len(chunk.whole) - len(chunk.tensor.shape)) + chunk.tensor.shape
    return WriteItem(
        index=MetadataIndex(chunk.key, torch.Size(chunk.offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(sizes)),
            properties=TensorProperties(dtype=chunk.tensor.dtype),
            size=torch.Size(chunk.whole),
        ),
    )


def _object_item(key: str) -> WriteItem:
    return WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO)


def _plain(result: WriteResult) -> list[Any]:
    index, info = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    place = [info.relative_path, info.offset, info.length]
    return [index.fqn, offset, index.index, result.size_in_bytes, *place]


def _result(place: list[Any]) -> WriteResult:
    key, offset, number, size, *where = place
    index = MetadataIndex(key, None if offset is None else torch.Size(offset), number)
    return WriteResult(index=index, size_in_bytes=size, storage_data=_StorageInfo(*where))
