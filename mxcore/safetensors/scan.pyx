# cython: cdivision=True
"""The grammar of a safetensors header: one pass over its text into records of fixed size, without the GIL.

No recursion and no skipping: whatever the format does not want is refused at its first byte, so that deep nesting
costs nothing. Then the records are put into file order and checked against the data. Declarations: the .pxd.
"""

from cpython.bytes cimport PyBytes_AsString
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport qsort, realloc
from libc.string cimport memcmp, strncmp

from mxcore.safetensors.json cimport integer_end, skip_blanks, string_end, unescape

cdef enum:
    MAX_NAME_BYTES = 4096
    MAX_DIMENSIONS = 64
    DTYPE_COUNT = 22

# safetensors 0.8's list. What real checkpoints are full of comes first: the list is searched from its start.
DTYPE_BITS = {
    "BF16": 16, "F32": 32, "F16": 16, "F8_E4M3": 8, "U8": 8, "I32": 32, "I64": 64, "I8": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U32": 32, "I16": 16, "U16": 16, "F64": 64,
    "U64": 64, "C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}

cdef struct Dtype:
    const char* code
    size_t length
    uint64_t bits

cdef Dtype[DTYPE_COUNT] DTYPES
cdef tuple DTYPE_CODES = tuple([code.encode() for code in DTYPE_BITS])  # keeps alive what DTYPES points to

for _index, _bits in enumerate(DTYPE_BITS.values()):
    DTYPES[_index].code = PyBytes_AsString(DTYPE_CODES[_index])
    DTYPES[_index].length = len(DTYPE_CODES[_index])
    DTYPES[_index].bits = _bits


cdef Text fail(Scan* scan, Rule rule, Text at, const char* detail, uint64_t value=0, uint64_t other=0) noexcept nogil:
    scan.rule = rule
    scan.failed_at = at - scan.text
    scan.detail = detail
    scan.value = value
    scan.other = other
    return NULL


cdef bint is_word(Text text, size_t length, bint escaped, const char* word, size_t word_bytes) noexcept nogil:
    """Whether a string is this word, escapes resolved: an escape has 6 bytes for each byte of ASCII at most."""
    cdef uint8_t[96] plain
    if escaped:
        if length > sizeof(plain):
            return False
        length = unescape(text, length, plain)
        text = plain
    return length == word_bytes and memcmp(text, word, word_bytes) == 0


cdef Text expect_string(Scan* scan, Text at, Text* start, bint* escaped) noexcept nogil:
    """Past the closing quote; `start` is set to the byte after the opening one."""
    if at[0] != 0x22:
        return fail(scan, JSON, at, "a string is missing")
    start[0] = at + 1
    at = string_end(at + 1, escaped)
    if at[0] != 0x22:
        return fail(scan, JSON, at, "a string is not closed, or has a bad escape or a control character")
    return at + 1


cdef Text expect_key(Scan* scan, Text at, Text* start, size_t* length, bint* escaped) noexcept nogil:
    """Past a key and its colon, at the value's first byte."""
    at = expect_string(scan, at, start, escaped)
    if at == NULL:
        return NULL
    length[0] = at - start[0] - 1
    at = skip_blanks(at)
    if at[0] != 0x3A:
        return fail(scan, JSON, at, "a colon is missing")
    return skip_blanks(at + 1)


cdef Text next_member(Scan* scan, Text at, uint8_t closing, bint* last) noexcept nogil:
    """After a value: past the comma at the next one, or past the closing bracket."""
    at = skip_blanks(at)
    if at[0] == closing:
        last[0] = True
        return at + 1
    if at[0] != 0x2C:
        return fail(scan, JSON, at, "a comma or a closing bracket is missing")
    last[0] = False
    return skip_blanks(at + 1)


cdef Text scan_metadata(Scan* scan, Text at) noexcept nogil:
    cdef Text start = NULL
    cdef size_t length = 0
    cdef bint escaped = False
    cdef bint last = False
    scan.metadata_at = at - scan.text
    if strncmp(<const char*>at, b"null", 4) == 0:  # what MLX writes where there is none; the text ends with a NUL
        return at + 4
    if at[0] != 0x7B:
        return fail(scan, METADATA, at, "__metadata__ is not an object")
    at = skip_blanks(at + 1)
    if at[0] == 0x7D:
        return at + 1
    while not last:
        at = expect_key(scan, at, &start, &length, &escaped)
        if at == NULL:
            return NULL
        if at[0] != 0x22:
            return fail(scan, METADATA, at, "a value in __metadata__ is not a string")
        at = expect_string(scan, at, &start, &escaped)
        if at == NULL:
            return NULL
        at = next_member(scan, at, 0x7D, &last)
        if at == NULL:
            return NULL
    return at


cdef Text scan_dtype(Scan* scan, Text at, Record* record) noexcept nogil:
    cdef Text start = NULL
    cdef bint escaped = False
    cdef uint8_t index
    if at[0] != 0x22:
        return fail(scan, DTYPE, at, "dtype is not a string")
    at = expect_string(scan, at, &start, &escaped)
    if at == NULL:
        return NULL
    for index in range(DTYPE_COUNT):
        if is_word(start, at - start - 1, escaped, DTYPES[index].code, DTYPES[index].length):
            record.dtype = index
            return at
    return fail(scan, DTYPE, start, "an unknown dtype")


cdef Text scan_shape(Scan* scan, Text at, Record* record, uint64_t* bits, bint* zero) noexcept nogil:
    """Reads the dimensions; `bits` is multiplied by all that are not zero. `bits` is 0 after an overflow."""
    cdef uint64_t dimension = 0
    cdef bint last = False
    cdef Text end
    if at[0] != 0x5B:
        return fail(scan, SHAPE, at, "shape is not an array")
    at = skip_blanks(at + 1)
    record.shape_at = <uint32_t>(at - scan.text)
    record.rank = 0
    if at[0] == 0x5D:
        return at + 1
    while not last:
        if record.rank == MAX_DIMENSIONS:
            return fail(scan, SHAPE, at, "more than 64 dimensions")
        end = integer_end(at, &dimension)
        if end == NULL:
            return fail(scan, INTEGER, at, "a dimension is not such an integer")
        record.rank += 1
        if dimension == 0:
            zero[0] = True
        elif bits[0] > <uint64_t>0xFFFFFFFFFFFFFFFF // dimension:
            bits[0] = 0
        else:
            bits[0] *= dimension
        at = next_member(scan, end, 0x5D, &last)
        if at == NULL:
            return NULL
    return at


cdef Text scan_offsets(Scan* scan, Text at, Record* record) noexcept nogil:
    cdef Text end
    if at[0] != 0x5B:
        return fail(scan, OFFSETS, at, "data_offsets is not an array")
    at = skip_blanks(at + 1)
    end = integer_end(at, &record.begin)
    if end == NULL:
        return fail(scan, OFFSETS if at[0] == 0x5D else INTEGER, at, "begin is not such an integer")
    at = skip_blanks(end)
    if at[0] != 0x2C:
        return fail(scan, OFFSETS, at, "data_offsets has not two integers")
    at = skip_blanks(at + 1)
    end = integer_end(at, &record.end)
    if end == NULL:
        return fail(scan, INTEGER, at, "end is not such an integer")
    at = skip_blanks(end)
    if at[0] != 0x5D:
        return fail(scan, OFFSETS, at, "data_offsets has not two integers")
    if record.end < record.begin:
        return fail(scan, OFFSETS, at, "data_offsets are [{0}, {1}]", record.begin, record.end)
    return at + 1


cdef Text check_size(Scan* scan, Text at, Record* record, uint64_t factor, bint zero) noexcept nogil:
    """`factor` is the product of all dimensions that are not zero, or 0 if that left 64 bits."""
    cdef uint64_t bits = DTYPES[record.dtype].bits
    if factor == 0 or factor > <uint64_t>0xFFFFFFFFFFFFFFFF // bits:
        return fail(scan, OVERFLOW, at, "the size does not fit into 64 bits")
    bits = 0 if zero else bits * factor
    if bits % 8:
        return fail(scan, PARTIAL, at, "dtype and shape make {0} bits", bits)
    if record.end - record.begin != bits // 8:
        return fail(scan, SIZE, at, "dtype and shape make {0} bytes, data_offsets span {1}", bits // 8,
                    record.end - record.begin)
    return at


cdef Text scan_entry(Scan* scan, Text at, Record* record) noexcept nogil:
    cdef Text start = NULL
    cdef Text value
    cdef size_t length = 0
    cdef bint escaped = False
    cdef bint last = False
    cdef bint zero = False
    cdef uint64_t factor = 1
    cdef int seen = 0
    cdef int field
    if at[0] != 0x7B:
        return fail(scan, NOT_OBJECT, at, "the entry is not an object")
    at = skip_blanks(at + 1)
    if at[0] == 0x7D:
        return fail(scan, MISSING_FIELD, at, "the entry is empty")
    while not last:
        value = expect_key(scan, at, &start, &length, &escaped)
        if value == NULL:
            return NULL
        field = (1 if is_word(start, length, escaped, "dtype", 5) else
                 2 if is_word(start, length, escaped, "shape", 5) else
                 4 if is_word(start, length, escaped, "data_offsets", 12) else 0)
        if field == 0:
            return fail(scan, UNKNOWN_FIELD, start, "an unknown field")
        if seen & field:
            return fail(scan, DUPLICATE, start, "a field occurs twice")
        seen |= field
        if field == 1:
            at = scan_dtype(scan, value, record)
        elif field == 2:
            at = scan_shape(scan, value, record, &factor, &zero)
        else:
            at = scan_offsets(scan, value, record)
        if at != NULL:
            at = next_member(scan, at, 0x7D, &last)
        if at == NULL:
            return NULL
    if seen != 7:
        return fail(scan, MISSING_FIELD, at, "a field is missing")
    return check_size(scan, at, record, factor, zero)


cdef Record* add_record(Scan* scan) noexcept nogil:
    """Room for one more; the number of records is bounded by the header, in which each takes 47 bytes or more."""
    cdef size_t capacity
    cdef void* grown
    if scan.count == scan.capacity:
        capacity = scan.capacity * 2 if scan.capacity else 64 + scan.length // 128
        grown = realloc(scan.records, capacity * sizeof(Record))
        if grown == NULL:
            return NULL
        scan.records = <Record*>grown
        scan.capacity = capacity
    scan.count += 1
    return &scan.records[scan.count - 1]


cdef Text scan_tensor(Scan* scan, Text at, Text start, size_t length, bint escaped) noexcept nogil:
    cdef Record* record
    if length == 0:
        return fail(scan, NAME, start, "the name is empty")
    if length > 6 * MAX_NAME_BYTES or (not escaped and length > MAX_NAME_BYTES):
        return fail(scan, NAME, start, "the name has {0} bytes", length)
    record = add_record(scan)
    if record == NULL:
        return fail(scan, NO_MEMORY, start, "")
    record.name_at = <uint32_t>(start - scan.text)
    record.name_bytes = <uint32_t>length
    record.escaped = escaped
    at = scan_entry(scan, at, record)
    if at == NULL:
        scan.failed = record[0]
    return at


cdef Text scan_header(Scan* scan) noexcept nogil:
    cdef Text at = scan.text
    cdef Text start = NULL
    cdef size_t length = 0
    cdef bint escaped = False
    cdef bint last = False
    if at[0] != 0x7B:
        return fail(scan, START, at, "the header begins with another byte")
    at = skip_blanks(at + 1)
    if at[0] == 0x7D:
        last = True
        at += 1
    while not last:
        at = expect_key(scan, at, &start, &length, &escaped)
        if at == NULL:
            return NULL
        if is_word(start, length, escaped, "__metadata__", 12):
            if scan.metadata_at:
                return fail(scan, DUPLICATE, start, "__metadata__ occurs twice")
            at = scan_metadata(scan, at)
        else:
            at = scan_tensor(scan, at, start, length, escaped)
        if at != NULL:
            at = next_member(scan, at, 0x7D, &last)
        if at == NULL:
            return NULL
    at = skip_blanks(at)
    if at != scan.text + scan.length:
        return fail(scan, JSON, at, "something follows the header's object")
    return at


cdef int compare_records(const void* left, const void* right) noexcept nogil:
    cdef const Record* a = <const Record*>left
    cdef const Record* b = <const Record*>right
    if a.begin != b.begin:
        return -1 if a.begin < b.begin else 1
    if a.end != b.end:
        return -1 if a.end < b.end else 1
    return -1 if a.name_at < b.name_at else 1


cdef bint order_records(Scan* scan, uint64_t data_bytes) noexcept nogil:
    """Sorts the records by place in the file; whether they cover its data exactly once."""
    cdef size_t index
    cdef uint64_t covered = 0
    cdef Record* record
    for index in range(1, scan.count):
        if compare_records(&scan.records[index - 1], &scan.records[index]) > 0:
            qsort(scan.records, scan.count, sizeof(Record), compare_records)
            break
    for index in range(scan.count):
        record = &scan.records[index]
        scan.failed = record[0]
        if record.end > data_bytes:
            fail(scan, BEYOND, scan.text + record.name_at, "it ends at {0} of {1} bytes of data: the file was cut short", record.end,
                 data_bytes)
            return False
        if record.begin != covered:
            fail(scan, OVERLAP if record.begin < covered else HOLE, scan.text + record.name_at,
                 "it begins at {0}, but the one before it ends at {1}", record.begin, covered)
            return False
        covered = record.end
    scan.failed.name_at = 0
    if covered != data_bytes:
        fail(scan, UNCOVERED, scan.text, "the last tensor ends at {0} of {1} bytes of data", covered, data_bytes)
        return False
    return True
