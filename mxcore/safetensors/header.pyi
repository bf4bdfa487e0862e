"""The safetensors header: strict parser and validator, compiled.

Format: https://github.com/huggingface/safetensors (0.8), taken strictly; each rule is a class of
`mxcore.safetensors.errors`. All functions may be called from several threads at once.
"""

import os
from typing import final

from typing_extensions import Buffer

from mxcore.safetensors.file_stamp import FileStamp

@final
class TensorEntry:
    """One tensor of a file. Made by the parser only; immutable.

    `dtype` is safetensors' code ("BF16"), `shape` the dimensions (elements), `begin` and `end` bytes from the
    header's `data_offset` on. A tensor may begin at any byte: it need not be aligned to its dtype.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def size_bytes(self) -> int:
        """end - begin."""

@final
class Header:
    """A validated header. Made by the parser only.

    `tensors` are in file order: by begin, then end, then place in the header. Together they cover the data exactly
    once. `metadata` is `__metadata__`, empty where there is none. `header_bytes` is the length of the JSON with its
    padding, `data_offset` the data's first byte in the file: 8 + `header_bytes`. `stamp` is the file's (`file_stamp`)
    when `read_header` opened it, None from `parse_header`.
    """

    @property
    def tensors(self) -> tuple[TensorEntry, ...]: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def data_offset(self) -> int: ...
    @property
    def header_bytes(self) -> int: ...
    @property
    def stamp(self) -> FileStamp | None: ...
    def __len__(self) -> int: ...
    def __contains__(self, name: object) -> bool: ...
    def __getitem__(self, name: str) -> TensorEntry:
        """The tensor of that name; KeyError if there is none."""

def parse_header(data: Buffer, file_bytes: int, *, file: str = "<memory>") -> Header:
    """Parses the first bytes of a file: `data` has at least its 8 + header length bytes, C-contiguous.

    `file_bytes` is the size of the whole file, against which the tensors are checked; `file` names it in errors.
    Allocates nothing until the header's length is within the limit, the file and `data`. The bytes are copied first,
    so that `data` may be a shared mapping.

    Raises a subclass of SafetensorsError for a broken rule, BufferError or TypeError for what is no such buffer,
    OverflowError for a `file_bytes` that is no 64-bit size.
    """

def read_header(path: str | bytes | os.PathLike[str]) -> Header:
    """Reads and parses the header of a file; two reads, no mapping. The file's size is taken once, when opened.

    Raises a subclass of SafetensorsError for a broken rule, StorageError if the file cannot be opened or read or is
    not a regular file, TruncatedRead if it shrinks meanwhile.
    """
