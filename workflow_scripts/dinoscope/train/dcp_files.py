"""Reading of DCP folders: what they hold, and some of their tensors, without running code that a file may carry.

DCP's `.metadata` is a pickle, and unpickling imports and calls whatever a pickle names. Here only the
classes that DCP itself writes are let through. The tensors are torch files, which DCP reads with `weights_only=True`.
"""

import enum
import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from dinoscope.errors import CheckpointError
from dinoscope.train.checkpoint_files import FILES_NAME

__all__ = ["PlainReader", "read_stored", "stored_tensors"]

_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_CLASSES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILESYSTEM, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
}


class PlainReader(dcp.FileSystemReader):
    """DCP's reader of a folder, which refuses a `.metadata` with code in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder holds and where.

        Raises:
            pickle.UnpicklingError: Something else than DCP's own classes is in it.
        """
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _PlainUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds an object of type {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _member(owner: Any, name: str) -> Any:
    """In place of `getattr`, by which Python before 3.11.4 pickles the members of an enumeration."""
    if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"it asks for {name} of {owner!r}, which no checkpoint needs")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Name -> size and number format of every tensor in a DCP folder.

    Raises:
        CheckpointError: It has no .metadata, or one that cannot be read or holds code.
    """
    try:
        entries = PlainReader(folder).read_metadata().state_dict_metadata
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not there or has no .metadata: the checkpoint is incomplete") from None
    except Exception as error:  # whatever a damaged pickle raises
        raise CheckpointError(f"checkpoint {folder} is damaged: its .metadata cannot be read ({error})") from None
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_stored(folder: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Reads some tensors of a DCP folder onto the CPU, each straight into its place; all others stay on the disk.

    Args:
        folder: The DCP folder, written by any number of ranks.
        names: Name wanted -> name in the folder.

    Raises:
        CheckpointError: A name is not there, or files are missing, damaged or cut short.
    """
    stored = stored_tensors(folder)
    if missing := sorted(set(names.values()) - stored.keys()):
        raise CheckpointError(f"checkpoint {folder} lacks tensors: {', '.join(missing[:4])}")
    state = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names.values()}
    if not (folder / FILES_NAME).is_file():  # else its checksums were compared
        _check_items(folder, set(names.values()))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
            dcp.load(state, storage_reader=PlainReader(folder), no_dist=True)
    except (Exception, dcp.api.CheckpointException) as error:  # cut short, missing or damaged shards
        raise CheckpointError(
            f"checkpoint {folder} is damaged: its tensors cannot be read ({_reason(error)}); use another one"
        ) from None
    return {wanted: state.pop(name) for wanted, name in names.items()}


def _check_items(folder: Path, names: set[str]) -> None:
    """Compares the checksums that each stored piece of a tensor, a zip archive, has of its own."""
    for index, place in PlainReader(folder).read_metadata().storage_data.items():
        if index.fqn not in names or place.transform_descriptors:
            continue
        try:
            with open(folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                with zipfile.ZipFile(io.BytesIO(file.read(place.length))) as archive:
                    whole = archive.testzip() is None
        except (OSError, zipfile.BadZipFile, EOFError):
            whole = False
        if not whole:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {place.relative_path} is missing, cut short or no longer what was "
                f"written (tensor {index.fqn}); use another one"
            )


def _reason(error: BaseException) -> str:
    """What went wrong, without the traceback that DCP makes part of it."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200] or type(error).__name__
