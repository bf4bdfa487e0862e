# cython: language_level=3
"""What read_parts.h declares; see there."""

from libc.stdint cimport int64_t

cdef extern from "reading/read_parts.h" nogil:
    ctypedef struct mx_part:
        int64_t file, offset, bytes, stride, count, to, to_stride
    ctypedef struct mx_cursor:
        size_t part
        int64_t run, skip
    ctypedef struct mx_job:
        mx_cursor start "from"
        int64_t payload, digest
    ctypedef struct mx_piece:
        mx_cursor next
        int64_t file, offset, length, payload
    ctypedef struct mx_limits:
        int64_t piece_bytes, gap_bytes
        size_t segments
    ctypedef struct mx_file:
        int fd, direct_fd
        char* map
        int64_t align_bytes
    mx_piece mx_next_piece(const mx_part* parts, mx_cursor start, int64_t payload, const mx_limits* limits)
