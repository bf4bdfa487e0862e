# cython: language_level=3
from mxcore.cuda_driver cimport mx_function, mx_module
from mxcore.cuda_stream cimport Context

cdef class Kernels:
    cdef readonly Context context
    cdef mx_module module
    cdef mx_function sum_tiles, sum_seams, stitch
    cdef object __weakref__
    cdef mx_function function(self, bytes name) except NULL

cdef Kernels kernels_of(Context context)
