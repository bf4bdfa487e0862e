"""The safetensors header: strict parser and validator. Types and documentation: header.pyi.

Before anything is allocated, the header's length is checked against the limit and the file. The text is then scanned
once in C (safetensors_scan), the records checked against the file, and only then Python objects are made.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SetItem
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy, memset
from posix.fcntl cimport O_NONBLOCK, O_RDONLY, open as c_open
from posix.stat cimport S_ISREG, fstat, struct_stat
from posix.unistd cimport close as c_close, pread

from mxcore.safetensors.json cimport integer_end, skip_blanks, unescape, utf8_error
from mxcore.safetensors.scan cimport (
    BEYOND, NO_MEMORY, Record, Scan, Text, expect_key, expect_string, next_member, order_records, scan_header,
)

import os

from mxcore.safetensors import errors as safetensors_errors
from mxcore.errors import StorageError, TruncatedRead
from mxcore.safetensors.file_kinds import kind_of_file
from mxcore.safetensors.file_stamp import stamp_of
from mxcore.safetensors.scan import DTYPE_BITS

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC

cdef enum:
    MAX_HEADER_BYTES = 100_000_000
    LENGTH_BYTES = 8

cdef tuple DTYPE_CODES = tuple(DTYPE_BITS)

# In the order of safetensors_scan's enum Rule.
cdef tuple RULES = (
    None, None, safetensors_errors.HeaderJson, safetensors_errors.HeaderStart, safetensors_errors.MetadataNotStrings,
    safetensors_errors.NameInvalid, safetensors_errors.EntryNotObject, safetensors_errors.FieldUnknown,
    safetensors_errors.FieldMissing, safetensors_errors.DtypeUnknown, safetensors_errors.ShapeInvalid,
    safetensors_errors.OffsetsInvalid, safetensors_errors.IntegerInvalid, safetensors_errors.SizeOverflow,
    safetensors_errors.PartialByte, safetensors_errors.SizeMismatch, safetensors_errors.RangeBeyondFile,
    safetensors_errors.RangesOverlap, safetensors_errors.RangesHole, safetensors_errors.DataNotCovered,
    safetensors_errors.DuplicateKey,
)


@cython.final
@cython.no_gc  # holds text and integers only: no cycle can form
@cython.auto_pickle(False)
cdef class TensorEntry:
    cdef readonly str name
    cdef readonly str dtype
    cdef readonly tuple shape
    cdef readonly uint64_t begin
    cdef readonly uint64_t end

    def __init__(self):
        raise TypeError("TensorEntry is made by read_header and parse_header")

    @property
    def size_bytes(self):
        return self.end - self.begin

    def __repr__(self):
        return f"TensorEntry({self.name!r}, {self.dtype}, {list(self.shape)}, [{self.begin}, {self.end}])"


@cython.final
@cython.auto_pickle(False)
cdef class Header:
    cdef readonly tuple tensors
    cdef readonly dict metadata
    cdef readonly uint64_t data_offset
    cdef readonly uint64_t header_bytes
    cdef readonly object stamp
    cdef dict entries

    def __init__(self):
        raise TypeError("Header is made by read_header and parse_header")

    def __len__(self):
        return len(self.tensors)

    def __contains__(self, name):
        return name in self.entries

    def __getitem__(self, name):
        return self.entries[name]

    def __repr__(self):
        return f"Header({len(self.tensors)} tensors, {self.header_bytes} header bytes)"


cdef str to_text(Text text, size_t length, bint escaped):
    cdef uint8_t* plain
    if not escaped:
        return PyUnicode_DecodeUTF8(<const char*>text, length, NULL)
    plain = <uint8_t*>malloc(length)
    if plain == NULL:
        raise MemoryError
    try:
        length = unescape(text, length, plain)
        return PyUnicode_DecodeUTF8(<const char*>plain, length, NULL)
    finally:
        free(plain)


cdef object failure(Scan* scan, str file):
    """The error of the rule that the scan left behind."""
    if scan.rule == NO_MEMORY:
        return MemoryError(f"{file}: no memory for the records of {scan.count} tensors")
    name = to_text(scan.text + scan.failed.name_at, scan.failed.name_bytes, scan.failed.escaped) \
        if scan.failed.name_at else ""
    detail = (<bytes>scan.detail).decode().format(scan.value, scan.other)
    return RULES[<int>scan.rule](detail, file=file, tensor=name, offset=LENGTH_BYTES + scan.failed_at)


cdef tuple read_shape(Text at, int rank):
    """The dimensions, once more: the scan has passed them, and holds only where they begin."""
    cdef tuple shape = PyTuple_New(rank)
    cdef uint64_t dimension = 0
    cdef object number  # one object for both calls below, not a C value that each would convert
    cdef int index
    for index in range(rank):
        at = skip_blanks(integer_end(at, &dimension))
        if at[0] == 0x2C:
            at = skip_blanks(at + 1)
        number = dimension
        Py_INCREF(number)  # PyTuple_SetItem takes it over
        PyTuple_SetItem(shape, index, number)
    return shape


cdef dict read_metadata(Scan* scan, str file):
    """The strings of __metadata__, once more: the scan has passed their form, not that keys are unique."""
    cdef dict metadata = {}
    cdef Text at, start = NULL
    cdef size_t length = 0
    cdef bint escaped = False
    cdef bint last = False
    if scan.metadata_at == 0 or scan.text[scan.metadata_at] != 0x7B:  # there is none, or it is null
        return metadata
    at = skip_blanks(scan.text + scan.metadata_at + 1)
    while not last and at[0] != 0x7D:
        at = expect_key(scan, at, &start, &length, &escaped)
        key = to_text(start, length, escaped)
        if key in metadata:
            raise safetensors_errors.DuplicateKey(f"__metadata__ has {key!r} twice", file=file,
                                                  offset=LENGTH_BYTES + (start - scan.text))
        at = expect_string(scan, at, &start, &escaped)
        metadata[key] = to_text(start, at - start - 1, escaped)
        at = next_member(scan, at, 0x7D, &last)
    return metadata


cdef dict make_entries(Scan* scan, str file):
    """Name to entry, in the order of the records; names have to be unique once their escapes are resolved."""
    cdef dict entries = {}
    cdef Record* record
    cdef TensorEntry entry
    cdef size_t index
    for index in range(scan.count):
        record = &scan.records[index]
        entry = TensorEntry.__new__(TensorEntry)
        entry.name = to_text(scan.text + record.name_at, record.name_bytes, record.escaped)
        if record.escaped and ("\0" in entry.name or len(entry.name.encode()) > 4096):
            raise safetensors_errors.NameInvalid("a NUL, or too long", file=file, tensor=entry.name,
                                                 offset=LENGTH_BYTES + record.name_at)
        if entry.name in entries:
            raise safetensors_errors.DuplicateKey("the name occurs twice", file=file, tensor=entry.name,
                                                  offset=LENGTH_BYTES + record.name_at)
        entry.dtype = DTYPE_CODES[record.dtype]
        entry.shape = read_shape(scan.text + record.shape_at, record.rank)
        entry.begin = record.begin
        entry.end = record.end
        entries[entry.name] = entry
    return entries


cdef Header parse_text(const uint8_t* text, size_t length, uint64_t data_bytes, str file):
    """`text` has `length` bytes and a NUL, and nobody else writes to it."""
    cdef Scan scan
    cdef Header header
    cdef bint scanned, covered
    cdef size_t bad
    memset(&scan, 0, sizeof(scan))
    scan.text = text
    scan.length = length
    try:
        with nogil:
            bad = utf8_error(text, length)
            scanned = bad == length and scan_header(&scan) != NULL
            covered = scanned and order_records(&scan, data_bytes)
        if bad != length:
            raise safetensors_errors.HeaderEncoding(f"0x{text[bad]:02x} is not UTF-8", file=file,
                                                    offset=LENGTH_BYTES + bad)
        if not scanned:
            raise failure(&scan, file)
        entries = make_entries(&scan, file)  # before the next: a name that is there twice overlaps itself
        if not covered:
            raise failure(&scan, file)
        header = Header.__new__(Header)
        header.metadata = read_metadata(&scan, file)
    finally:
        free(scan.records)
    header.entries = entries
    header.tensors = tuple(entries.values())
    header.header_bytes = length
    header.data_offset = LENGTH_BYTES + length
    return header


cdef size_t check_length(const uint8_t* prefix, uint64_t file_bytes, str file) except? 0:
    """The header's length from the file's first 8 bytes (little-endian), within the limit and the file."""
    cdef uint64_t length = 0
    cdef int index
    for index in range(LENGTH_BYTES):
        length |= <uint64_t>prefix[index] << (8 * index)
    if length > MAX_HEADER_BYTES:
        raise safetensors_errors.HeaderTooLarge(
            kind_of_file(prefix[:LENGTH_BYTES]) or f"the header's length is {length}", file=file)
    if length > file_bytes - LENGTH_BYTES:
        raise safetensors_errors.HeaderBeyondFile(
            kind_of_file(prefix[:LENGTH_BYTES])
            or f"the header's length is {length}, the file has {file_bytes} bytes: it was cut short", file=file)
    if length == 0:
        raise safetensors_errors.HeaderStart("8 zeros: the file's room was made, and never filled", file=file,
                                             offset=LENGTH_BYTES)
    return <size_t>length


def parse_header(data, file_bytes, *, file="<memory>"):
    cdef Py_buffer view
    cdef uint64_t total = file_bytes
    cdef size_t length
    cdef uint8_t* text = NULL
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if total < LENGTH_BYTES:
            raise safetensors_errors.FileTooSmall(f"the file has {total} bytes", file=file)
        if view.len < LENGTH_BYTES:
            raise safetensors_errors.HeaderIncomplete(f"{view.len} bytes were given", file=file)
        length = check_length(<const uint8_t*>view.buf, total, file)
        if <size_t>view.len - LENGTH_BYTES < length:
            raise safetensors_errors.HeaderIncomplete(
                f"{view.len} bytes were given of {LENGTH_BYTES + length}", file=file)
        # A copy: `data` may be a mapping or a bytearray that somebody writes to meanwhile, and it has no NUL.
        text = <uint8_t*>malloc(length + 1)
        if text == NULL:
            raise MemoryError
        memcpy(text, <const uint8_t*>view.buf + LENGTH_BYTES, length)
        text[length] = 0
        return parse_text(text, length, total - LENGTH_BYTES - length, file)
    finally:
        free(text)
        PyBuffer_Release(&view)


cdef int read_exactly(int fd, uint8_t* to, size_t wanted, uint64_t offset, str file) except -1:
    cdef size_t got = 0
    cdef Py_ssize_t count
    cdef int error = 0
    with nogil:
        while got < wanted:
            count = pread(fd, to + got, wanted - got, <long>(offset + got))
            if count > 0:
                got += count
            elif count == 0 or errno != EINTR:
                error = 0 if count == 0 else errno
                break
    if error:
        raise StorageError(f"{file}: reading {wanted} bytes at {offset} failed: {os.strerror(error)}")
    if got < wanted:
        raise TruncatedRead(f"{file}: {wanted} bytes at {offset} wanted, {got} read: the file was cut short meanwhile")
    return 0


def read_header(path):
    cdef bytes encoded = os.fsencode(path)
    cdef const char* name = encoded
    cdef str file = os.fsdecode(encoded)
    cdef struct_stat status
    cdef uint8_t[LENGTH_BYTES] prefix
    cdef uint8_t* text = NULL
    cdef size_t length
    cdef int fd
    cdef Header header
    if b"\0" in encoded:
        raise StorageError(f"{file!r}: a file's name has no NUL")
    with nogil:
        fd = c_open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK)  # not to wait for a FIFO's writer
    if fd < 0:
        raise StorageError(f"{file}: cannot be opened: {os.strerror(errno)}")
    try:
        if fstat(fd, &status) != 0:
            raise StorageError(f"{file}: its size cannot be read: {os.strerror(errno)}")
        if not S_ISREG(status.st_mode):
            raise StorageError(f"{file}: not a regular file")
        stamp = stamp_of(fd)  # before the first read: what is written later has another
        if status.st_size < LENGTH_BYTES:
            raise safetensors_errors.FileTooSmall(f"the file has {status.st_size} bytes", file=file)
        read_exactly(fd, prefix, LENGTH_BYTES, 0, file)
        length = check_length(prefix, status.st_size, file)
        text = <uint8_t*>malloc(length + 1)
        if text == NULL:
            raise MemoryError
        read_exactly(fd, text, length, LENGTH_BYTES, file)
        text[length] = 0
        header = parse_text(text, length, <uint64_t>status.st_size - LENGTH_BYTES - length, file)
        header.stamp = stamp
        return header
    finally:
        free(text)
        c_close(fd)
