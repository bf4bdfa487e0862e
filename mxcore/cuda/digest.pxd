# cython: language_level=3
from mxcore.cuda.context cimport Context, ContextObject
from mxcore.cuda.driver cimport mx_function

cdef class Kernels(ContextObject):
    cdef bytes image  # `handle` is an mx_module
    cdef const char* text
    cdef char* log  # the compiler's words, while it is at work
    cdef mx_function sum_tiles, sum_seams, stitch
    cdef object __weakref__
    cdef mx_function function(self, bytes name) except NULL

cdef Kernels kernels_of(Context context)
