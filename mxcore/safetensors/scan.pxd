# cython: language_level=3
"""What the scan of a header leaves behind: records of the tensors, or the rule that was broken first."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

ctypedef const uint8_t* Text

# One value a class of safetensors_errors: the table RULES in safetensors_header has the same order.
cdef enum Rule:
    NONE, NO_MEMORY, JSON, START, METADATA, NAME, NOT_OBJECT, UNKNOWN_FIELD, MISSING_FIELD, DTYPE, SHAPE, OFFSETS
    INTEGER, OVERFLOW, PARTIAL, SIZE, BEYOND, OVERLAP, HOLE, UNCOVERED, DUPLICATE

cdef struct Record:
    uint64_t begin
    uint64_t end
    uint32_t name_at  # all positions: bytes from the header's first
    uint32_t name_bytes
    uint32_t shape_at  # the first byte after the bracket
    uint8_t rank
    uint8_t dtype  # the place in DTYPE_BITS
    bint escaped

cdef struct Scan:
    const uint8_t* text  # length bytes and a NUL
    size_t length
    Record* records  # the caller frees it, after a failure too
    size_t count
    size_t capacity
    size_t metadata_at  # the brace of __metadata__, 0 for none
    # what failed first
    Rule rule
    size_t failed_at
    const char* detail  # a format for the two values
    uint64_t value
    uint64_t other
    Record failed  # the tensor's, if its name_at is not 0

cdef Text scan_header(Scan* scan) noexcept nogil
cdef bint order_records(Scan* scan, uint64_t data_bytes) noexcept nogil
cdef Text expect_string(Scan* scan, Text at, Text* start, bint* escaped) noexcept nogil
cdef Text expect_key(Scan* scan, Text at, Text* start, size_t* length, bint* escaped) noexcept nogil
cdef Text next_member(Scan* scan, Text at, uint8_t closing, bint* last) noexcept nogil
