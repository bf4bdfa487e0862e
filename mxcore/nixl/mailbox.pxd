"""Declarations of mailbox.h, and the object around it."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

cdef extern from "nixl/mailbox.h" nogil:
    ctypedef struct mx_mailbox:
        pass

    mx_mailbox *mx_mailbox_new()
    void mx_mailbox_free(mx_mailbox *box)
    bint mx_mailbox_put(mx_mailbox *box, uint64_t number)
    void mx_mailbox_wake(mx_mailbox *box)
    size_t mx_mailbox_take(mx_mailbox *box, int64_t longest_nanoseconds, uint64_t **numbers)

cdef class Mailbox:
    cdef mx_mailbox *box
