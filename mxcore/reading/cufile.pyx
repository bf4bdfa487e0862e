"""libcufile's functions, opened at first use, its driver, and files registered with it; docs in cufile.pyi.

cuFile falls back to reads through host memory without a word (compatibility mode), of its own accord too where its kernel
module does not take a file. So its driver is opened with that forbidden, and closed with the last file.
"""

cimport cython
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.errno cimport errno
from libc.stdint cimport int64_t, uintptr_t

from mxcore.cuda.context cimport Context
from mxcore.cuda.driver cimport MX_CUDA_SUCCESS, check
from mxcore.reading.cufile cimport FileHandles
from mxcore.reading.file_set cimport FileSet

import os
import sys
import threading
import warnings
from pathlib import Path

from mxcore.reading.cufile_status import status_text
from mxcore.errors import CuFileError, CuFileMissing

CANDIDATES = ("libcufile.so.0", "/usr/local/cuda/lib64/libcufile.so.0")
BLOCK_BYTES, LEAST_BYTES = MX_CUFILE_BLOCK, MX_CUFILE_LEAST

cdef mx_cufile_table functions
cdef object library_lock = threading.Lock()
cdef object library_path = None  # until it is loaded
cdef bint stand_in_loaded = False

cdef object driver_lock = threading.Lock()
cdef int driver_users = 0  # under the lock
cdef object driver_refused = ""  # why it is not opened again: after a failed opening libcufile 1.20 spins for ever


cdef int check_cufile(mx_cufile_error status, str call, str what="") except -1:
    if status.err == 0:
        return 0
    text = status_text(status.err)
    if status.err == MX_CUFILE_CUDA_DRIVER_ERROR:
        text = f"{text}, CUDA's {status.cu_err}"
    raise CuFileError(f"{call} failed with {text}" + (f"; {what}" if what else ""), status=status.err)


def candidates():
    """By the loader's own search, then in the wheels that torch with CUDA brings along."""
    found = list(CANDIDATES)
    for folder in sys.path:
        for pattern in ("nvidia/cufile/lib/libcufile.so.0", "nvidia/cu[0-9]*/lib/libcufile.so.0"):
            found += [str(path) for path in sorted(Path(folder or ".").glob(pattern))]
    return found


cdef int open_first(object paths, bint stand_in) except -1:
    """Under the lock."""
    global library_path, stand_in_loaded
    cdef char reason[512]
    attempts = []
    for path in paths:
        encoded = path.encode()
        if mx_cufile_open(encoded, stand_in, &functions, reason, sizeof(reason)) == 0:
            library_path, stand_in_loaded = path, stand_in
            return 0
        attempts.append(reason.decode("utf-8", "replace"))
    raise CuFileMissing(f"no usable libcufile ({'; '.join(attempts)}). It comes with CUDA 12.9 and later, or with the wheel "
                        "nvidia-cufile")


def load_library():
    with library_lock:
        if library_path is None:
            open_first(candidates(), False)
        return library_path


def _load_stand_in(path):
    with library_lock:
        if library_path is not None:
            raise CuFileError(f"{library_path} is loaded already")
        open_first([path], True)


def library_file():
    path = load_library()
    if "/" not in path:
        with open("/proc/self/maps") as maps:
            for line in maps:
                name = line.rstrip().rpartition(" ")[2]
                if os.path.basename(name).startswith("libcufile.so"):
                    return name
    return path


def version():
    cdef int number = 0
    load_library()
    check_cufile(functions.version(&number), "cuFileGetVersion")
    return number // 1000, number % 1000 // 10


cdef int open_driver() except -1:
    """Under the lock."""
    cdef mx_cufile_error status
    cdef mx_cufile_properties properties
    cdef unsigned int flags
    if functions.use_count() > 0:
        raise CuFileError("another library of this process has opened cuFile's driver: how it reads is not ours to say")
    check_cufile(functions.set_flag(MX_CUFILE_ALLOW_COMPAT_MODE, False), "cuFileSetParameterBool")
    with nogil:
        status = functions.open()
    check_cufile(status, "cuFileDriverOpen")
    try:
        with nogil:
            status = functions.properties(&properties)
        check_cufile(status, "cuFileDriverGetProperties")
        flags = mx_cufile_control_flags(&properties)
        if flags & ~<unsigned int>MX_CUFILE_POLLS:
            raise CuFileError(f"cuFile's driver opened in compatibility mode (control flags {flags:#x}): bytes would pass "
                              "host memory")
    except CuFileError:
        with nogil:
            functions.close()
        raise
    return 0


cdef int take_driver() except -1:
    global driver_users, driver_refused
    load_library()
    with driver_lock:
        if driver_refused:
            raise CuFileError(driver_refused)
        if driver_users == 0:
            try:
                open_driver()
            except CuFileError as error:
                driver_refused = error.args[0]  # without its code
                raise
        driver_users += 1
    return 0


cdef object give_driver_back():
    """What closing it said, or None."""
    global driver_users, driver_refused
    cdef mx_cufile_error status
    with driver_lock:
        driver_users -= 1
        if driver_users > 0:
            return None
        with nogil:
            status = functions.close()
        try:
            check_cufile(status, "cuFileDriverClose")
        except CuFileError as error:
            driver_refused = error.args[0]  # without its code
            return error
    return None


def driver_is_open():
    return driver_users > 0


def _forget_refusal():
    """For tests: the stand-in opens again after a failure."""
    global driver_refused
    driver_refused = ""


@cython.final
@cython.no_gc  # the descriptors are needed to the end
@cython.auto_pickle(False)
cdef class FileHandles:
    def __cinit__(self, FileSet files not None):
        self.files = files
        self.count = files.count
        self.reads.handles = <void**>PyMem_Calloc(self.count + 1, sizeof(void*))
        if self.reads.handles == NULL:
            raise MemoryError
        take_driver()
        self.holds_driver = True
        self.reads.cufile = &functions

    def __dealloc__(self):
        if self.reads.handles != NULL:
            said = self.release()
            if said is not None and warnings is not None:
                warnings.warn(f"{said}: device memory of cuFile's may have leaked", ResourceWarning)
        PyMem_Free(self.reads.handles)

    cdef object release(self):
        cdef size_t index
        for index in range(self.count):
            self.deregister(index)
        if not self.holds_driver:
            return None
        self.holds_driver = False
        return give_driver_back()

    def close(self):
        said = self.release()
        if said is not None:
            raise said

    cdef int require(self, size_t index) except -1:
        if not self.holds_driver:
            raise ValueError("these handles are closed")
        return self.files.require(index)

    def register(self, index):
        cdef size_t place = index
        cdef void* handle = NULL
        cdef mx_cufile_error status
        cdef int fd
        self.require(place)
        if self.reads.handles[place] != NULL:
            return
        path = self.files.paths[place]
        if not self.files.open_direct(place):
            raise CuFileError(f"{path}: its file system has no O_DIRECT")
        fd = self.files.files[place].direct_fd
        with nogil:
            status = mx_cufile_register(&functions, fd, &handle)
        check_cufile(status, "cuFileHandleRegister", path)
        self.reads.handles[place] = handle

    def deregister(self, index):
        cdef size_t place = index
        cdef void* handle
        if place >= self.count:
            raise ValueError(f"there is no file {place}")
        handle = self.reads.handles[place]
        self.reads.handles[place] = NULL
        if handle != NULL:
            with nogil:
                functions.handle_deregister(handle)

    def registered(self, index):
        cdef size_t place = index
        return place < self.count and self.reads.handles[place] != NULL

    def read(self, Context context not None, index, address, size_bytes, offset):
        cdef size_t place = index
        cdef size_t wanted = size_bytes
        cdef uintptr_t to = address
        cdef off_t begin = offset
        cdef Py_ssize_t got = 0
        cdef int error = 0
        cdef int status
        self.require(place)
        if self.reads.handles[place] == NULL:
            raise ValueError(f"{self.files.paths[place]} is not registered")
        if begin % MX_CUFILE_BLOCK or wanted % MX_CUFILE_BLOCK:
            raise ValueError(f"{wanted} bytes at {begin} are no whole blocks")
        with nogil:
            status = context.enter()
            if status == MX_CUDA_SUCCESS:
                got = functions.read(self.reads.handles[place], <void*>to, wanted, begin, 0)
                error = errno
                status = context.leave(status)
        check(status, "cuCtxPushCurrent", f"device {context.ordinal}")
        if got != <Py_ssize_t>wanted:
            raise self.read_failure(<int64_t>place, begin, <int64_t>wanted, got, error)

    cdef int begin(self) except -1:
        if not self.holds_driver:
            raise ValueError("these handles are closed")
        self.reads.bytes = 0
        self.reads.given_up = 0
        self.reads.failures = 0
        return 0

    cdef list left(self):
        return [self.reads.left[place] for place in range(self.reads.failures)]

    def failure(self):
        if self.reads.failures == 0:
            return None
        return self.read_failure(self.reads.file, self.reads.offset, self.reads.wanted, self.reads.result, self.reads.error)

    cdef object read_failure(self, int64_t file, int64_t offset, int64_t wanted, int64_t result, int error):
        what = f"{self.files.paths[file]}: cuFileRead of {wanted} bytes at {offset}"
        if result >= 0:
            return CuFileError(f"{what} gave {result}")
        if result == -1:
            return CuFileError(f"{what} failed: {os.strerror(error)}")
        return CuFileError(f"{what} failed with {status_text(-result)}", status=-result)
