"""The table of NIXL's functions out of the wheel's library; signatures and docs in table.pyi."""

import threading

from mxcore.errors import NixlMissing
from mxcore.nixl.library import NIXL_PACKAGES, library_candidates

from mxcore.nixl.capi cimport mx_nixl_open, mx_nixl_table

cdef mx_nixl_table table
cdef object load_lock = threading.Lock()
cdef object library_path = None  # until it is loaded


cdef const mx_nixl_table* nixl_table() except NULL:
    load_library()
    return &table


def notifies():
    return nixl_table().notifies


def load_library():
    global library_path
    cdef char reason[512]
    with load_lock:
        if library_path is not None:
            return library_path
        attempts = []
        for path in library_candidates():
            encoded = path.encode()
            if mx_nixl_open(encoded, &table, reason, sizeof(reason)) == 0:
                library_path = path
                return path
            attempts.append(f"{path}: {reason.decode('utf-8', 'replace')}")
        raise NixlMissing(
            "no usable NIXL library; looked beside the packages "
            f"{' and '.join(NIXL_PACKAGES)} and on the loader's path ({'; '.join(attempts)}). "
            "Install nixl-cu12 or nixl-cu13"
        )
