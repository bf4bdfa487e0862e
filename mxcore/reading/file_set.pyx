"""The files of one read: descriptors, mappings, and whether they stay what they were. Documentation: file_set.pyi."""

cimport cython
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.errno cimport EINTR, EINVAL, errno
from libc.stdint cimport int64_t, uint32_t
from posix.fcntl cimport O_NONBLOCK, O_RDONLY, open as c_open
from posix.stat cimport S_ISREG, fstat, struct_stat
from posix.unistd cimport close as c_close

from mxcore.reading.file_set cimport FileSet
from mxcore.reading.read_parts cimport mx_file

import os

from mxcore.errors import FileChanged, StorageError, TruncatedRead
from mxcore.safetensors import is_changed, stamp_of

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC, O_DIRECT

cdef extern from *:
    """
    #include <linux/stat.h>
    #include <sys/syscall.h>
    #include <sys/vfs.h>
    #include <unistd.h>
    /* What O_DIRECT wants on this file, of memory as of offsets; 0: it does not work, -1: the kernel does not say. */
    static int64_t mx_direct_alignment(int fd) {
    #ifdef STATX_DIOALIGN
        struct statx status;
        if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, STATX_DIOALIGN, &status) == 0
            && (status.stx_mask & STATX_DIOALIGN)) {
            __u32 memory = status.stx_dio_mem_align, offset = status.stx_dio_offset_align;
            return memory > offset ? memory : offset;
        }
    #endif
        return -1;
    }
    static int64_t mx_file_system(int fd) {
        struct statfs status;
        return fstatfs(fd, &status) == 0 ? (int64_t)(uint32_t)status.f_type : 0;
    }
    """
    int64_t mx_direct_alignment(int fd) nogil
    int64_t mx_file_system(int fd) nogil

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ, MAP_SHARED
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void* address, size_t length)

cdef enum:
    PAGE_BYTES = 4096

cdef size_t live_descriptors = 0  # both change under the GIL only
cdef size_t live_maps = 0


@cython.final
@cython.auto_pickle(False)
cdef class FileSet:
    def __cinit__(self, paths, stamps=()):
        cdef size_t index
        self.paths = tuple(os.fspath(path) for path in paths)
        self.count = <size_t>len(self.paths)
        self.stamps = []
        self.files = <mx_file*>PyMem_Calloc(self.count + 1, sizeof(mx_file))
        self.sizes = <int64_t*>PyMem_Calloc(self.count + 1, sizeof(int64_t))
        if self.files == NULL or self.sizes == NULL:
            raise MemoryError
        for index in range(self.count):
            self.files[index].fd = self.files[index].direct_fd = -1
            self.files[index].align_bytes = PAGE_BYTES
        for index in range(self.count):
            self.files[index].fd = self.opened(index, 0)
            if self.files[index].fd < 0:
                raise self.error(index, "cannot be opened", errno)
            self.stamps.append(self.stamp(index, stamps[index] if stamps else None))
            self.sizes[index] = self.stamps[index][0]

    def __dealloc__(self):
        if self.files != NULL:
            self.release()
        PyMem_Free(self.files)
        PyMem_Free(self.sizes)

    cdef int opened(self, size_t index, int more) except -2:
        global live_descriptors
        cdef bytes path = os.fsencode(self.paths[index])
        cdef const char* name = path
        cdef int fd
        with nogil:
            fd = c_open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | more)
            while fd < 0 and errno == EINTR:
                fd = c_open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | more)
        if fd >= 0:
            live_descriptors += 1
        return fd

    cdef object error(self, size_t index, str what, int number):
        return StorageError(f"{self.paths[index]}: {what}: {os.strerror(number)}", file=str(self.paths[index]),
                            errno=number)

    cdef object stamp(self, size_t index, expected):
        """Of the file as it was opened: the expected one, where there is one and it is still the same file."""
        cdef struct_stat status
        if fstat(self.files[index].fd, &status) != 0:
            raise self.error(index, "cannot be looked at", errno)
        if not S_ISREG(status.st_mode):
            raise self.error(index, "is no regular file", EINVAL)
        if expected is None:
            return stamp_of(self.files[index].fd)
        if is_changed(expected, self.files[index].fd):
            raise self.changed(index, expected[0], status.st_size, "since its header was read")
        return expected

    cdef int begin(self) except -1:
        """A read begins, for which the files have to stay open: `end` it."""
        if self.closing:
            raise ValueError("these files are closed")
        self.readers += 1
        return 0

    cdef void end(self) noexcept:
        self.readers -= 1
        if self.closing:
            self.release()

    cdef void release(self) noexcept:
        """Closes everything, or has the last read do so: a descriptor that is closed under it may be another file's."""
        global live_descriptors, live_maps
        cdef size_t index
        self.closing = True
        if self.readers:
            return
        for index in range(self.count):
            if self.files[index].map != NULL:
                munmap(self.files[index].map, <size_t>self.sizes[index])
                self.files[index].map = NULL
                live_maps -= 1
            for fd in (self.files[index].fd, self.files[index].direct_fd):
                if fd >= 0:
                    c_close(fd)
                    live_descriptors -= 1
            self.files[index].fd = self.files[index].direct_fd = -1

    def close(self):
        self.release()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.release()

    def __len__(self):
        return self.count

    cdef int require(self, size_t index) except -1:
        if self.closing or index >= self.count or self.files[index].fd < 0:
            raise ValueError(f"file {index} is not open")
        return 0

    def descriptor(self, index):
        self.require(index)
        return self.files[<size_t>index].fd

    def file_system(self, index):
        self.require(index)
        return mx_file_system(self.files[<size_t>index].fd)

    def map(self, index):
        global live_maps
        cdef size_t place = index
        cdef void* address
        self.require(place)
        if self.files[place].map != NULL or self.sizes[place] == 0:
            return
        address = mmap(NULL, <size_t>self.sizes[place], PROT_READ, MAP_SHARED, self.files[place].fd, 0)
        if address == MAP_FAILED:
            raise self.error(place, "cannot be mapped", errno)
        self.files[place].map = <char*>address
        live_maps += 1

    def open_direct(self, index):
        cdef size_t place = index
        cdef int64_t align
        self.require(place)
        if self.files[place].direct_fd >= 0:
            return self.files[place].align_bytes
        align = mx_direct_alignment(self.files[place].fd)
        if align == 0:
            return 0
        self.files[place].direct_fd = self.opened(place, O_DIRECT)
        if self.files[place].direct_fd < 0:
            return 0
        if is_changed(self.stamps[place], self.files[place].direct_fd):
            raise self.changed(place, self.stamps[place][0], os.fstat(self.files[place].direct_fd).st_size,
                               "while it was read")
        if 512 <= align <= PAGE_BYTES:
            self.files[place].align_bytes = align
        return self.files[place].align_bytes

    cdef object changed(self, size_t index, before, now, str when):
        file = str(self.paths[index])
        if now < before:
            return TruncatedRead(f"{file} was cut from {before} to {now} bytes {when}: load again once it is complete",
                                 file=file)
        return FileChanged(f"{file} was written to, or replaced, {when}: load again once it is complete", file=file)

    def check_unchanged(self):
        cdef struct_stat status
        for index in range(self.count):
            if fstat(self.files[<size_t>index].fd, &status) != 0:
                raise self.error(index, "cannot be looked at", errno)
            if is_changed(self.stamps[index], self.files[<size_t>index].fd):
                raise self.changed(index, self.stamps[index][0], status.st_size, "while it was read")


def live_file_descriptors():
    return live_descriptors


def live_mappings():
    return live_maps
