"""The environment as C libraries see it, changed beside threads that read it. Documentation: c_environment.pyi."""

from libc.stdlib cimport getenv

import os

cdef extern from "process/environment_store.h":
    char* mx_environment_copy(const char* entry)
    int mx_environment_store(const char* name, char* entry)

cdef dict _entries = {}  # what was ever put: its address. Bounded by the values that there are, never freed


def c_getenv(str name not None):
    cdef bytes encoded = os.fsencode(name)
    cdef const char* found = getenv(encoded)
    return None if found == NULL else os.fsdecode(<bytes>found)


def c_setenv(str name not None, str value):
    cdef bytes encoded = os.fsencode(name)
    if not encoded or b"=" in encoded or b"\0" in encoded or (value is not None and "\0" in value):
        raise ValueError(f"{name!r} = {value!r} cannot be in an environment")
    cdef bytes entry = encoded if value is None else encoded + b"=" + os.fsencode(value)
    cdef char* kept
    if entry not in _entries:
        kept = mx_environment_copy(entry)
        if kept == NULL:
            raise MemoryError
        _entries[entry] = <size_t>kept
    if mx_environment_store(encoded, <char*><size_t>_entries[entry]):
        raise MemoryError
