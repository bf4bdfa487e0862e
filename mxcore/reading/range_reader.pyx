"""Byte ranges of files straight into memory that exists, by threads without the GIL. Documentation: range_reader.pyi.

Ranges are cut into pieces of at most PIECE_BYTES; pieces that follow each other in one file go out as one preadv. All
threads, the calling one too, take the next such group until none is left or one has failed. No thread outlives a call.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from posix.fcntl cimport O_NONBLOCK, O_RDONLY, open as c_open
from posix.stat cimport S_ISREG, fstat, struct_stat
from posix.unistd cimport close as c_close

import os

from mxcore.errors import StorageError, TruncatedRead

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC

cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>
    #include <stddef.h>
    #include <sys/uio.h>
    #include <time.h>
    static inline size_t mx_claim(size_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
    static inline int mx_first(int *flag) { return __atomic_exchange_n(flag, 1, __ATOMIC_ACQ_REL) == 0; }
    static inline int mx_is_set(int *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
    static inline long long mx_milliseconds(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
    }
    /* Signals are for the interpreter's own threads: with all blocked in ours, no read of theirs is interrupted. */
    static inline int mx_start_thread(pthread_t *thread, void *(*run)(void *), void *data) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int failed = pthread_create(thread, NULL, run, data);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return failed;
    }
    """
    ctypedef unsigned long pthread_t
    cdef struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t preadv(int fd, const iovec* parts, int count, long offset) nogil
    int pthread_join(pthread_t thread, void** result) nogil
    size_t mx_claim(size_t* next) nogil
    int mx_first(int* flag) nogil
    int mx_is_set(int* flag) nogil
    long long mx_milliseconds() nogil
    int mx_start_thread(pthread_t* thread, void* (*run)(void*) noexcept nogil, void* data) nogil

cdef enum:
    PIECE_BYTES = 8 * 1024 * 1024  # long enough for the disk, short enough to share a range between threads
    GROUP_PIECES = 64  # parts of one preadv
    MAX_THREADS = 64
    SIGNAL_CHECK_MS = 100

cdef int64_t MAX_OFFSET = 0x7FFFFFFFFFFFFFFF
cdef size_t live_descriptors = 0  # opened here; changes under the GIL only

cdef struct Piece:
    int fd
    int64_t offset  # in the file
    char* to
    size_t length
    size_t range  # the place in the list of ranges

cdef struct Work:
    Piece* pieces
    size_t* groups  # the first piece of each, and the number of pieces
    size_t group_count
    size_t next  # the rest is shared by the threads, through atomics
    int stopped
    # written by who set `stopped` first
    size_t failed_piece
    size_t failed_got
    int error  # 0: the file ended

ctypedef struct Caller:
    long long checked_ms
    bint interrupted


@cython.final
@cython.auto_pickle(False)
cdef class ReadRange:
    cdef readonly object file
    cdef readonly object destination
    cdef readonly int64_t offset
    cdef readonly int64_t length

    def __init__(self, file, offset, length, destination):
        if not 0 <= offset <= MAX_OFFSET or not 0 <= length <= MAX_OFFSET - offset:
            raise ValueError(f"{length} bytes at {offset} are no range of a file")
        self.file = file
        self.offset = offset
        self.length = length
        self.destination = destination

    def __repr__(self):
        return f"ReadRange({self.file!r}, {self.offset}, {self.length}, {self.destination!r})"


cdef void stop(Work* work, size_t piece, size_t got, int error) noexcept nogil:
    if mx_first(&work.stopped):
        work.failed_piece = piece
        work.failed_got = got
        work.error = error


cdef void read_group(Work* work, size_t first, size_t end) noexcept nogil:
    """Reads pieces that follow each other in one file; goes on after short reads and EINTR."""
    cdef iovec[GROUP_PIECES] parts
    cdef size_t done = 0  # bytes of the piece `first`
    cdef size_t index, count
    cdef ssize_t got
    cdef Piece* piece
    while first < end and not mx_is_set(&work.stopped):
        count = end - first
        for index in range(count):
            piece = &work.pieces[first + index]
            parts[index].iov_base = piece.to
            parts[index].iov_len = piece.length
        piece = &work.pieces[first]
        parts[0].iov_base = piece.to + done
        parts[0].iov_len = piece.length - done
        got = preadv(piece.fd, parts, <int>count, piece.offset + <int64_t>done)
        if got < 0 and errno == EINTR:
            continue
        if got <= 0:
            stop(work, first, done, errno if got < 0 else 0)
            return
        done += <size_t>got
        while first < end and done >= work.pieces[first].length:
            done -= work.pieces[first].length
            first += 1


cdef bint read_next(Work* work) noexcept nogil:
    """Whether there was something to do."""
    cdef size_t group
    if mx_is_set(&work.stopped):
        return False
    group = mx_claim(&work.next)
    if group >= work.group_count:
        return False
    read_group(work, work.groups[group], work.groups[group + 1])
    return True


cdef void* run_thread(void* data) noexcept nogil:
    while read_next(<Work*>data):
        pass
    return NULL


cdef int check_signals(Work* work, Caller* caller) except -1:
    """Ctrl-C in the main thread: stops the others and is raised once they have ended."""
    try:
        PyErr_CheckSignals()
    except BaseException:
        caller.interrupted = True
        stop(work, 0, 0, 0)
        raise
    return 0


cdef int run_all(Work* work, size_t threads) except -1:
    """Reads all groups with that many threads, this one included; returns when all have ended."""
    cdef pthread_t[MAX_THREADS] started
    cdef size_t count = 0
    cdef Caller caller
    caller.interrupted = False
    with nogil:
        caller.checked_ms = mx_milliseconds()
        while count + 1 < threads and mx_start_thread(&started[count], run_thread, work) == 0:
            count += 1  # a thread that cannot be made leaves its share to the others
        try:
            while read_next(work):
                if mx_milliseconds() - caller.checked_ms >= SIGNAL_CHECK_MS:
                    caller.checked_ms = mx_milliseconds()
                    with gil:
                        check_signals(work, &caller)
        finally:
            while count:
                count -= 1
                pthread_join(started[count], NULL)
    return 0


cdef struct Target:
    int fd
    char* to


@cython.internal
@cython.final
cdef class Request:
    """What one call holds until all its threads have ended: descriptors, exports of destinations, pieces."""
    cdef list ranges
    cdef dict files  # path → descriptor, opened here
    cdef Py_buffer* views
    cdef size_t view_count
    cdef Target* targets
    cdef Work work

    def __cinit__(self, ranges):
        self.ranges = list(ranges)
        self.files = {}
        self.views = <Py_buffer*>PyMem_Calloc(len(self.ranges) + 1, sizeof(Py_buffer))
        self.targets = <Target*>PyMem_Calloc(len(self.ranges) + 1, sizeof(Target))
        if self.views == NULL or self.targets == NULL:
            raise MemoryError

    def __dealloc__(self):
        self.release()
        PyMem_Free(self.views)
        PyMem_Free(self.targets)
        PyMem_Free(self.work.pieces)
        PyMem_Free(self.work.groups)

    cdef void release(self) noexcept:
        global live_descriptors
        while self.view_count:
            self.view_count -= 1
            PyBuffer_Release(&self.views[self.view_count])
        if self.files:
            for fd in self.files.values():
                c_close(fd)
                live_descriptors -= 1
            self.files.clear()

    cdef int descriptor(self, ReadRange item) except? -1:  # -1 is also what a caller may give for one
        global live_descriptors
        cdef bytes path
        cdef const char* name
        cdef int fd
        if isinstance(item.file, int):
            return item.file
        path = os.fsencode(item.file)
        if path in self.files:
            return self.files[path]
        if b"\0" in path:
            raise StorageError(f"{item.file!r}: a file's name has no NUL", file=os.fsdecode(path))
        name = path
        with nogil:
            fd = c_open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK)  # not to wait for a FIFO's writer
            while fd < 0 and errno == EINTR:
                fd = c_open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        if fd < 0:
            raise StorageError(f"{os.fsdecode(path)}: cannot be opened: {os.strerror(errno)}",
                               file=os.fsdecode(path), offset=item.offset, wanted=item.length)
        self.files[path] = fd
        live_descriptors += 1
        return fd

    cdef char* address(self, ReadRange item) except? NULL:
        """Where the range's bytes go: a raw address, or a buffer that is held until the end and is long enough."""
        cdef Py_buffer* view
        cdef uintptr_t raw
        if PyObject_CheckBuffer(item.destination):
            view = &self.views[self.view_count]
            PyObject_GetBuffer(item.destination, view, PyBUF_WRITABLE)  # and C-contiguous
            self.view_count += 1
            if view.len < item.length:
                raise ValueError(f"{item!r}: the destination has {view.len} bytes")
            return <char*>view.buf
        raw = item.destination
        if item.length and (raw == 0 or <uint64_t>item.length > <uintptr_t>-1 - raw):
            raise ValueError(f"{item!r}: {item.length} bytes at {raw:#x} are no memory")
        return <char*>raw

    cdef int check(self) except -1:
        """Opens the files; finds what is beyond the end of one before anything is allocated or read."""
        cdef ReadRange item
        cdef struct_stat status
        cdef size_t index = 0
        for item in self.ranges:
            self.targets[index].fd = self.descriptor(item)
            self.targets[index].to = self.address(item)
            if fstat(self.targets[index].fd, &status) != 0:
                raise self.error(index, errno, 0)
            # Size 0 says nothing: the files of procfs have it as well. The read finds the end.
            if (S_ISREG(status.st_mode) and status.st_size and item.length
                    and item.length > status.st_size - item.offset):
                raise self.error(index, 0, max(<int64_t>0, <int64_t>status.st_size - item.offset))
            index += 1
        return 0

    cdef int plan(self) except -1:
        """Cuts the ranges into pieces and puts these into groups."""
        cdef Work* work = &self.work
        cdef ReadRange item
        cdef Piece* piece
        cdef size_t pieces = 1
        cdef size_t index = 0
        cdef int64_t done
        for item in self.ranges:
            pieces += <size_t>(item.length // PIECE_BYTES) + 1
        work.pieces = piece = <Piece*>PyMem_Calloc(pieces, sizeof(Piece))
        work.groups = <size_t*>PyMem_Calloc(pieces, sizeof(size_t))
        if work.pieces == NULL or work.groups == NULL:
            raise MemoryError
        for item in self.ranges:
            done = 0
            while done < item.length:
                piece.fd = self.targets[index].fd
                piece.offset = item.offset + done
                piece.to = self.targets[index].to + done
                piece.length = <size_t>min(item.length - done, <int64_t>PIECE_BYTES)
                piece.range = index
                done += piece.length
                self.add_to_group(piece)
                piece += 1
            index += 1
        work.groups[work.group_count] = piece - work.pieces
        return 0

    cdef void add_to_group(self, Piece* piece) noexcept:
        """With the one before, if it goes on where that ends and both are small; else in a group of its own."""
        cdef Work* work = &self.work
        cdef size_t index = piece - work.pieces
        cdef size_t first
        cdef Piece* before
        if work.group_count:
            first = work.groups[work.group_count - 1]
            before = piece - 1
            if (before.fd == piece.fd and before.offset + <int64_t>before.length == piece.offset
                    and index - first < GROUP_PIECES
                    and piece.offset + <int64_t>piece.length - work.pieces[first].offset <= PIECE_BYTES):
                return
        work.groups[work.group_count] = index
        work.group_count += 1

    cdef object error(self, size_t index, int number, int64_t got):
        """Of a file that ended, a thread may have found out far behind its end: its size says where that is now."""
        cdef ReadRange item = self.ranges[index]
        cdef struct_stat status
        if number == 0 and fstat(self.targets[index].fd, &status) == 0 and S_ISREG(status.st_mode) and status.st_size:
            got = max(<int64_t>0, min(got, <int64_t>status.st_size - item.offset))
        file = f"descriptor {item.file}" if isinstance(item.file, int) else os.fsdecode(item.file)
        where = {"file": file, "offset": item.offset, "wanted": item.length, "got": got}
        if number:
            return StorageError(f"{file}: reading {item.length} bytes at {item.offset} failed after {got}: "
                                f"{os.strerror(number)}", **where)
        return TruncatedRead(f"{file}: {item.length} bytes at {item.offset} wanted, but the file ends after {got} "
                             "of them: it is not complete, or was cut short meanwhile", **where)


@cython.final
@cython.auto_pickle(False)
cdef class RangeReader:
    cdef readonly int threads

    def __init__(self, threads=4):
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads is {threads}, has to be 1 to {MAX_THREADS}")
        self.threads = threads

    def read(self, ranges):
        cdef Request request = Request(ranges)
        cdef Work* work = &request.work
        cdef Piece* piece
        cdef ReadRange item
        cdef int64_t total = 0
        try:
            request.check()
            request.plan()
            run_all(work, min(<size_t>self.threads, work.group_count))
            if work.stopped:
                piece = &work.pieces[work.failed_piece]
                item = request.ranges[piece.range]
                raise request.error(piece.range, work.error,
                                    piece.offset + <int64_t>work.failed_got - item.offset)
            for item in request.ranges:
                total += item.length
            return total
        finally:
            request.release()

    def __repr__(self):
        return f"RangeReader(threads={self.threads})"


def live_file_descriptors():
    return live_descriptors
