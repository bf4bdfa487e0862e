"""Numbers left by one thread for another. Types and documentation: mailbox.pyi."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free

from mxcore.nixl.mailbox cimport mx_mailbox_free, mx_mailbox_new, mx_mailbox_put, mx_mailbox_take, mx_mailbox_wake


cdef class Mailbox:
    def __cinit__(self):
        self.box = mx_mailbox_new()
        if self.box == NULL:
            raise MemoryError

    def put(self, uint64_t number):
        if not mx_mailbox_put(self.box, number):
            raise MemoryError

    def wake(self):
        mx_mailbox_wake(self.box)

    def take(self, double seconds):
        cdef uint64_t *numbers = NULL
        cdef int64_t longest = <int64_t> (max(seconds, 0.0) * 1e9)
        cdef size_t count, i
        with nogil:
            count = mx_mailbox_take(self.box, longest, &numbers)
        try:
            return [numbers[i] for i in range(count)]
        finally:
            free(numbers)

    def __dealloc__(self):
        mx_mailbox_free(self.box)
