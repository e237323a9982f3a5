"""Files of the safetensors format, one tensor at a time.

The safetensors library checks every header here. The bytes are read and written by offset instead: its NumPy front end
has no bfloat16 and float8, and it writes a file from tensors that are all in memory, where a shard takes gigabytes.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dsv32_jax.common.reading import parsed_json
from dsv32_jax.errors import UserError

DTYPES: dict[str, Any] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its safetensors dtype, shape, first byte in the file, and how many bytes it has."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str] | None]:
    """The tensors of a file, in the order of their bytes, and its metadata.

    Raises:
      UserError: missing, truncated or corrupt, with the file's name.
    """
    try:
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parsed_json(file.read(size).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: this shard is missing; copy it from the checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: truncated or corrupt ({error}); copy this shard again") from None
    metadata = header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: Entry(value["dtype"], tuple(value["shape"]), 8 + size + begin, end - begin)
        for name, value in entries
        for begin, end in [value["data_offsets"]]
    }, metadata


def read_into(out: np.ndarray, path: Path, entry: Entry) -> None:
    """Reads one tensor into `out`, which has its shape and dtype and is contiguous."""
    with open(path, "rb") as file:
        file.seek(entry.offset)
        if file.readinto(memoryview(out.view(np.uint8).reshape(-1))) != out.nbytes:
            raise UserError(f"{path}: truncated; copy this shard again")


class Writer:
    """A file made from a plan of its tensors, which are then written in any order, whole or in parts."""

    def __init__(self, path: Path, plan: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None):
        """Args: path; name -> (safetensors dtype, shape) in the order of the bytes; the file's metadata."""
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for name, (dtype, shape) in plan.items():
            begin, end = end, end + int(np.prod(shape)) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.path = path
        self.offsets = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in plan}
        self.start = len(text).to_bytes(8, "little") + text
        self.size = len(self.start) + end

    def is_laid_out(self) -> bool:
        """Whether the file exists with the header and the size of this plan, from an earlier run."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        with open(self.path, "rb") as file:
            return file.read(len(self.start)) == self.start

    def lay_out(self) -> None:
        """Makes the file with its header and zeros for the tensors."""
        with open(self.path, "wb") as file:
            file.write(self.start)
            file.truncate(self.size)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor's values."""
        with open(self.path, "r+b") as file:
            file.seek(self.offsets[name])
            file.write(np.ascontiguousarray(array).view(np.uint8).data)

    def sync(self) -> None:
        """Waits until all writes are on the disk."""
        with open(self.path, "r+b") as file:
            os.fsync(file.fileno())
