"""What is to be read, cut into jobs. Types and documentation: read_jobs.pyi; the structures: read_parts.h."""

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.stdint cimport int64_t

from mxcore.reading.file_set cimport FileSet
from mxcore.reading.read_jobs cimport _Int64s, JobList
from mxcore.reading.read_parts cimport mx_cursor, mx_file, mx_job, mx_next_piece, mx_part, mx_piece

from mxcore.errors import TruncatedRead

cdef extern from "reading/read_parts.h" nogil:
    enum: MX_SEGMENTS

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sys/mman.h>
    #include <sys/uio.h>
    static inline int mx_mapped_in(char *map, int64_t offset) {
        unsigned char page = 0;
        return map != NULL && mincore(map + offset, 1, &page) == 0 && (page & 1);
    }
    static inline int mx_cached(int fd, int64_t offset) {
        char byte;
        struct iovec one = {&byte, 1};
        posix_fadvise(fd, offset, 1, POSIX_FADV_RANDOM); /* one page, if any, is fetched for having been asked for */
        ssize_t got = preadv2(fd, &one, 1, offset, 0x8 /* RWF_NOWAIT */);
        posix_fadvise(fd, offset, 1, POSIX_FADV_NORMAL);
        return got == 1;
    }
    """
    int mx_mapped_in(char* map, int64_t offset) nogil
    int mx_cached(int fd, int64_t offset) nogil

cdef enum:
    PAGE_BYTES = 4096
    RESIDENT_SAMPLES = 4  # a call into the kernel each, before anything is read: eight took 3 % of a warm load

PART_COLUMNS = 7
cdef int64_t MAX_OFFSET = 0x7FFFFFFFFFFFFFFF


@cython.final
cdef class _Int64s:
    """A view on a one-dimensional buffer of int64, held as long as this object."""
    def __cinit__(self, source, str what):
        PyObject_GetBuffer(source, &self.view, PyBUF_ND | PyBUF_FORMAT)
        self.viewed = True
        if self.view.ndim != 1 or self.view.itemsize != 8 or self.view.format not in (b"q", b"l"):
            raise TypeError(f"{what} has to be a one-dimensional buffer of int64")
        self.values = <const int64_t*>self.view.buf
        self.count = <size_t>(self.view.len // 8)

    def __dealloc__(self):
        if self.viewed:
            PyBuffer_Release(&self.view)


@cython.final
@cython.auto_pickle(False)
cdef class JobList:
    def __cinit__(self, FileSet files not None, parts, *, piece_bytes=8 << 20, gap_bytes=65536, groups=None):
        if not PAGE_BYTES <= piece_bytes <= 1 << 30 or piece_bytes & (piece_bytes - 1):
            raise ValueError(f"piece_bytes is {piece_bytes}, has to be a power of two from {PAGE_BYTES} to {1 << 30}")
        self.files = files
        self.table = _Int64s(parts, "parts")
        if self.table.count % 7:
            raise ValueError(f"{self.table.count} integers are no rows of {PART_COLUMNS}")
        self.parts = <const mx_part*>self.table.values
        self.part_count = self.table.count // 7
        self.limits.piece_bytes = piece_bytes
        self.limits.gap_bytes = gap_bytes
        self.limits.segments = MX_SEGMENTS
        self.check(files)
        if groups is None:
            self.cut(0, self.part_count)
        else:
            self.group(_Int64s(groups, "groups"))

    def __dealloc__(self):
        PyMem_Free(self.jobs)

    def __len__(self):
        return self.job_count

    cdef int check(self, FileSet files) except -1:
        cdef size_t index
        cdef const mx_part* part
        cdef int64_t last, last_to, total = 0
        for index in range(self.part_count):
            part = self.parts + index
            files.require(<size_t>part.file)
            if part.bytes < 1 or part.count < 1 or part.offset < 0 or part.to < 1:
                raise ValueError(f"part {index} is empty or lies nowhere")
            if part.count > 1 and (part.stride < part.bytes or part.to_stride < part.bytes):
                raise ValueError(f"part {index}: its runs overlap")
            if (part.stride and part.count > MAX_OFFSET // max(part.stride, part.to_stride)):
                raise ValueError(f"part {index} is longer than any file")
            last = (part.count - 1) * part.stride
            last_to = (part.count - 1) * part.to_stride
            if last_to > MAX_OFFSET - part.bytes or part.to > MAX_OFFSET - part.bytes - last_to:
                raise ValueError(f"part {index}: its destination is no memory")
            if last > MAX_OFFSET - part.bytes or part.offset > files.sizes[part.file] - part.bytes - last:
                raise TruncatedRead(f"{files.paths[part.file]}: {part.bytes} bytes at {part.offset + last} wanted, but the "
                                    f"file has {files.sizes[part.file]}", file=str(files.paths[part.file]),
                                    offset=part.offset + last, wanted=part.bytes,
                                    got=max(<int64_t>0, files.sizes[part.file] - part.offset - last))
            if part.count > (MAX_OFFSET - total) // part.bytes:
                raise ValueError(f"part {index}: the sum of all is beyond 64 bits")
            total += part.bytes * part.count
        self.total_bytes = total
        return 0

    cdef int add(self, mx_cursor start, int64_t payload, int64_t digest) except -1:
        cdef mx_job* more
        if self.job_count == self.capacity:
            more = <mx_job*>PyMem_Realloc(self.jobs, max(<size_t>64, 2 * self.capacity) * sizeof(mx_job))
            if more == NULL:
                raise MemoryError
            self.jobs = more
            self.capacity = max(<size_t>64, 2 * self.capacity)
        self.jobs[self.job_count].start = start
        self.jobs[self.job_count].payload = payload
        self.jobs[self.job_count].digest = digest
        self.job_count += 1
        return 0

    cdef int64_t payload(self, size_t first, size_t end) noexcept:
        cdef int64_t total = 0
        cdef size_t index
        for index in range(first, end):
            total += self.parts[index].bytes * self.parts[index].count
        return total

    cdef int cut(self, size_t first, size_t end) except -1:
        """A job for each piece."""
        cdef int64_t left = self.payload(first, end)
        cdef mx_cursor at
        cdef mx_piece piece
        at.part = first
        at.run = at.skip = 0
        while left:
            piece = mx_next_piece(self.parts, at, left, &self.limits)
            self.add(at, piece.payload, -1)
            at = piece.next
            left -= piece.payload
        return 0

    cdef int group(self, _Int64s starts) except -1:
        """A job for each group of parts, in the order given, with a digest of its bytes."""
        cdef size_t index
        cdef mx_cursor at
        if starts.count < 1 or starts.values[0] != 0 or starts.values[starts.count - 1] != <int64_t>self.part_count:
            raise ValueError(f"groups has to begin with 0 and to end with the number of parts, {self.part_count}")
        for index in range(starts.count - 1):
            if starts.values[index + 1] <= starts.values[index]:
                raise ValueError(f"group {index} has no parts")
            at.part = <size_t>starts.values[index]
            at.run = at.skip = 0
            self.add(at, self.payload(at.part, <size_t>starts.values[index + 1]), <int64_t>index)
        self.digest_count = <int64_t>(starts.count - 1)
        return 0

    def resident(self, by_reading=False):
        cdef bytearray shares = bytearray(self.job_count)
        cdef size_t index
        cdef int sample, found
        cdef bint reads = by_reading
        cdef mx_file* file
        cdef int64_t place
        cdef mx_piece piece
        for index in range(self.job_count):
            piece = mx_next_piece(self.parts, self.jobs[index].start, self.jobs[index].payload, &self.limits)
            self.files.require(<size_t>piece.file)
            file = &self.files.files[piece.file]
            found = 0
            for sample in range(RESIDENT_SAMPLES):
                place = (piece.offset + (piece.length - 1) * sample // (RESIDENT_SAMPLES - 1)) // PAGE_BYTES * PAGE_BYTES
                found += mx_cached(file.fd, place) if reads else mx_mapped_in(file.map, place)
            shares[index] = 255 * found // RESIDENT_SAMPLES
        return shares
