"""NIXL's functions, for the compiled modules that call them. Filled at the first use, never changed afterwards."""

from mxcore.nixl.capi cimport mx_nixl_table

cdef const mx_nixl_table* nixl_table() except NULL  # raises NixlMissing
