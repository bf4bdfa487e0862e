# cython: language_level=3
"""The JSON that a safetensors header is made of: strings, integers, blanks; UTF-8 (RFC 8259, RFC 3629).

All functions work on a text that ends in one NUL byte after its last: NUL ends every loop, and a NUL within the text
is an error to JSON anyway. None of them recurses, allocates, or needs the GIL.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef inline const uint8_t* skip_blanks(const uint8_t* at) noexcept nogil:
    while at[0] == 0x20 or at[0] == 0x0A or at[0] == 0x0D or at[0] == 0x09:
        at += 1
    return at


cdef inline int32_t hex4(const uint8_t* at) noexcept nogil:
    """The value of four hex digits, or -1. Stops at the first byte that is none, so never reads past the NUL."""
    cdef int32_t value = 0
    cdef uint8_t c
    for _ in range(4):
        c = at[0]
        if 0x30 <= c <= 0x39:
            value = value * 16 + (c - 0x30)
        elif 0x61 <= (c | 0x20) <= 0x66:
            value = value * 16 + ((c | 0x20) - 0x61 + 10)
        else:
            return -1
        at += 1
    return value


cdef inline int32_t escape(const uint8_t* at, int* length) noexcept nogil:
    """The code point of the escape whose backslash is at `at`, and its length in bytes; -1 for none of JSON's.

    A lone surrogate is no code point: refused, as UTF-8 cannot hold it.
    """
    cdef uint8_t kind = at[1]
    cdef int32_t code, low
    length[0] = 2
    if kind == 0x22 or kind == 0x5C or kind == 0x2F:
        return kind
    if kind == 0x62:
        return 0x08
    if kind == 0x66:
        return 0x0C
    if kind == 0x6E:
        return 0x0A
    if kind == 0x72:
        return 0x0D
    if kind == 0x74:
        return 0x09
    if kind != 0x75:
        return -1
    code = hex4(at + 2)
    length[0] = 6
    if 0xD800 <= code <= 0xDBFF:
        if at[6] != 0x5C or at[7] != 0x75:
            return -1
        low = hex4(at + 8)
        if not 0xDC00 <= low <= 0xDFFF:
            return -1
        length[0] = 12
        return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
    if 0xDC00 <= code <= 0xDFFF:
        return -1
    return code


cdef inline const uint8_t* string_end(const uint8_t* at, bint* escaped) noexcept nogil:
    """From the byte after the opening quote to the closing quote; to the offending byte if the string is none."""
    cdef int length
    escaped[0] = False
    while True:
        if at[0] == 0x22 or at[0] < 0x20:
            return at
        if at[0] == 0x5C:
            escaped[0] = True
            if escape(at, &length) < 0:
                return at
            at += length
        else:
            at += 1


cdef inline size_t unescape(const uint8_t* text, size_t length, uint8_t* to) noexcept nogil:
    """Writes the UTF-8 of a string that `string_end` passed; never more bytes than `length`. Returns how many."""
    cdef const uint8_t* end = text + length
    cdef uint8_t* out = to
    cdef int32_t code
    cdef int used
    while text < end:
        if text[0] != 0x5C:
            out[0] = text[0]
            out += 1
            text += 1
            continue
        code = escape(text, &used)
        text += used
        if code < 0x80:
            out[0] = <uint8_t>code
            out += 1
        elif code < 0x800:
            out[0] = <uint8_t>(0xC0 | (code >> 6))
            out[1] = <uint8_t>(0x80 | (code & 0x3F))
            out += 2
        elif code < 0x10000:
            out[0] = <uint8_t>(0xE0 | (code >> 12))
            out[1] = <uint8_t>(0x80 | ((code >> 6) & 0x3F))
            out[2] = <uint8_t>(0x80 | (code & 0x3F))
            out += 3
        else:
            out[0] = <uint8_t>(0xF0 | (code >> 18))
            out[1] = <uint8_t>(0x80 | ((code >> 12) & 0x3F))
            out[2] = <uint8_t>(0x80 | ((code >> 6) & 0x3F))
            out[3] = <uint8_t>(0x80 | (code & 0x3F))
            out += 4
    return out - to


cdef inline const uint8_t* integer_end(const uint8_t* at, uint64_t* value) noexcept nogil:
    """Reads an integer of 0 to 2^64 - 1 in JSON's form; NULL for everything else (-0, 1.0, 1e0, 01, too large)."""
    cdef uint64_t number = 0
    cdef uint32_t digit
    cdef const uint8_t* start = at
    while 0x30 <= at[0] <= 0x39:
        digit = at[0] - 0x30
        if number > <uint64_t>0x1999999999999999 or (number == <uint64_t>0x1999999999999999 and digit > 5):
            return NULL
        number = number * 10 + digit
        at += 1
    if at == start or (start[0] == 0x30 and at - start > 1):
        return NULL
    if at[0] == 0x2E or at[0] == 0x65 or at[0] == 0x45:
        return NULL
    value[0] = number
    return at


cdef inline size_t utf8_error(const uint8_t* text, size_t length) noexcept nogil:
    """Where UTF-8 breaks in the text, or `length` if nowhere; needs no NUL at the end."""
    cdef size_t at = 0
    cdef uint64_t eight
    cdef uint8_t lead, second, low, high
    cdef size_t more, index
    while at < length:
        if length - at >= 8:
            memcpy(&eight, text + at, 8)
            if eight & <uint64_t>0x8080808080808080 == 0:
                at += 8
                continue
        lead = text[at]
        if lead < 0x80:
            at += 1
            continue
        low = 0x80
        high = 0xBF
        if 0xC2 <= lead <= 0xDF:
            more = 1
        elif 0xE0 <= lead <= 0xEF:
            more = 2
            low = 0xA0 if lead == 0xE0 else 0x80
            high = 0x9F if lead == 0xED else 0xBF
        elif 0xF0 <= lead <= 0xF4:
            more = 3
            low = 0x90 if lead == 0xF0 else 0x80
            high = 0x8F if lead == 0xF4 else 0xBF
        else:
            return at
        if length - at <= more:
            return at
        second = text[at + 1]
        if second < low or second > high:
            return at
        for index in range(2, more + 1):
            if text[at + index] & 0xC0 != 0x80:
                return at
        at += more + 1
    return length
