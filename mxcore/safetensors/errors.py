"""What can be wrong with a safetensors header: one error class a rule, each with its own stable code.

The rules are those of the format (safetensors 0.8), taken strictly. Where this parser refuses what the
`safetensors` package accepts, the class says so under "Stricter than safetensors".

::

    SafetensorsError
    ├── FileTooSmall          MX_SAFETENSORS_FILE_TOO_SMALL
    ├── HeaderTooLarge        MX_SAFETENSORS_HEADER_TOO_LARGE
    ├── HeaderBeyondFile      MX_SAFETENSORS_HEADER_BEYOND_FILE
    ├── HeaderIncomplete      MX_SAFETENSORS_HEADER_INCOMPLETE
    ├── HeaderStart           MX_SAFETENSORS_HEADER_START
    ├── HeaderEncoding        MX_SAFETENSORS_HEADER_ENCODING
    ├── HeaderJson            MX_SAFETENSORS_HEADER_JSON
    ├── DuplicateKey          MX_SAFETENSORS_DUPLICATE_KEY
    ├── MetadataNotStrings    MX_SAFETENSORS_METADATA_NOT_STRINGS
    ├── NameInvalid           MX_SAFETENSORS_NAME
    ├── EntryNotObject        MX_SAFETENSORS_ENTRY_NOT_OBJECT
    ├── FieldUnknown          MX_SAFETENSORS_FIELD_UNKNOWN
    ├── FieldMissing          MX_SAFETENSORS_FIELD_MISSING
    ├── DtypeUnknown          MX_SAFETENSORS_DTYPE
    ├── ShapeInvalid          MX_SAFETENSORS_SHAPE
    ├── OffsetsInvalid        MX_SAFETENSORS_OFFSETS
    ├── IntegerInvalid        MX_SAFETENSORS_INTEGER
    ├── SizeOverflow          MX_SAFETENSORS_SIZE_OVERFLOW
    ├── PartialByte           MX_SAFETENSORS_PARTIAL_BYTE
    ├── SizeMismatch          MX_SAFETENSORS_SIZE_MISMATCH
    ├── RangeBeyondFile       MX_SAFETENSORS_RANGE_BEYOND_FILE
    ├── RangesOverlap         MX_SAFETENSORS_RANGES_OVERLAP
    ├── RangesHole            MX_SAFETENSORS_RANGES_HOLE
    └── DataNotCovered        MX_SAFETENSORS_DATA_NOT_COVERED
"""

from __future__ import annotations

from mxserver.wire import MxError


class SafetensorsError(MxError):
    """A file breaks a rule of the safetensors format; nothing of it was used.

    `file` is its name, `tensor` the tensor's name ("" where no single one is at fault), `offset` the byte in the
    file at which the parser stopped, `detail` what was found there. `rule` says what the format wants.
    """

    code = "MX_SAFETENSORS"
    rule = "the file has to follow the safetensors format"

    def __init__(self, detail: str, *, file: str, tensor: str = "", offset: int = 0) -> None:
        self.detail = detail
        self.file = file
        self.tensor = tensor
        self.offset = offset
        subject = f"tensor {tensor!r}, " if tensor else ""
        super().__init__(f"{file}: {subject}byte {offset}: {detail}; {self.rule}. Write or download the file again")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.detail, self.file, self.tensor, self.offset))


def _rebuild(kind: type[SafetensorsError], detail: str, file: str, tensor: str, offset: int) -> SafetensorsError:
    return kind(detail, file=file, tensor=tensor, offset=offset)


class FileTooSmall(SafetensorsError):
    """The file has fewer than the 8 bytes of the header's length."""

    code = "MX_SAFETENSORS_FILE_TOO_SMALL"
    rule = "a safetensors file begins with 8 bytes of header length"


class HeaderTooLarge(SafetensorsError):
    """The header's length is above 100,000,000 bytes."""

    code = "MX_SAFETENSORS_HEADER_TOO_LARGE"
    rule = "a header has at most 100000000 bytes"


class HeaderBeyondFile(SafetensorsError):
    """The header's length is more than the file has left."""

    code = "MX_SAFETENSORS_HEADER_BEYOND_FILE"
    rule = "the header has to lie within the file"


class HeaderIncomplete(SafetensorsError):
    """The bytes given to the parser end before the header does (the file itself may be whole)."""

    code = "MX_SAFETENSORS_HEADER_INCOMPLETE"
    rule = "the parser needs the first 8 + header length bytes of the file"


class HeaderStart(SafetensorsError):
    """The header does not begin with `{`. Stricter than safetensors, which skips blanks before it."""

    code = "MX_SAFETENSORS_HEADER_START"
    rule = "the header has to begin with '{'"


class HeaderEncoding(SafetensorsError):
    """The header is not valid UTF-8."""

    code = "MX_SAFETENSORS_HEADER_ENCODING"
    rule = "the header has to be UTF-8"


class HeaderJson(SafetensorsError):
    """The header is not valid JSON, or something other than blanks follows it."""

    code = "MX_SAFETENSORS_HEADER_JSON"
    rule = "the header has to be one JSON object, followed by nothing but blanks"


class DuplicateKey(SafetensorsError):
    """A key occurs twice in one object. Stricter than safetensors, which keeps the last tensor or metadata value."""

    code = "MX_SAFETENSORS_DUPLICATE_KEY"
    rule = "no object may have a key twice"


class MetadataNotStrings(SafetensorsError):
    """`__metadata__` is neither an object of strings nor null."""

    code = "MX_SAFETENSORS_METADATA_NOT_STRINGS"
    rule = "__metadata__ has to map strings to strings"


class NameInvalid(SafetensorsError):
    """A tensor's name is empty, has a NUL, or is too long. Stricter than safetensors, which takes any string."""

    code = "MX_SAFETENSORS_NAME"
    rule = "a tensor's name has 1 to 4096 bytes and no NUL"


class EntryNotObject(SafetensorsError):
    """A tensor's entry is not an object. Stricter than safetensors, which takes an array of the three values."""

    code = "MX_SAFETENSORS_ENTRY_NOT_OBJECT"
    rule = "a tensor's entry has to be an object"


class FieldUnknown(SafetensorsError):
    """A tensor's entry has another field than the three known. Stricter than safetensors, which skips it."""

    code = "MX_SAFETENSORS_FIELD_UNKNOWN"
    rule = "a tensor's entry has the fields dtype, shape and data_offsets only"


class FieldMissing(SafetensorsError):
    """A tensor's entry lacks dtype, shape or data_offsets."""

    code = "MX_SAFETENSORS_FIELD_MISSING"
    rule = "a tensor's entry has to have dtype, shape and data_offsets"


class DtypeUnknown(SafetensorsError):
    """The dtype is not a string of safetensors 0.8's list. Stricter than safetensors for `{"U8": null}`."""

    code = "MX_SAFETENSORS_DTYPE"
    rule = "dtype has to be one of safetensors 0.8's dtypes"


class ShapeInvalid(SafetensorsError):
    """The shape is not an array, or has more than 64 dimensions. Stricter than safetensors, which has no bound."""

    code = "MX_SAFETENSORS_SHAPE"
    rule = "shape has to be an array of at most 64 integers"


class OffsetsInvalid(SafetensorsError):
    """data_offsets is not an array of two integers, or its end lies before its begin."""

    code = "MX_SAFETENSORS_OFFSETS"
    rule = "data_offsets has to be [begin, end] with begin <= end"


class IntegerInvalid(SafetensorsError):
    """A number is negative, not an integer, or does not fit into 64 bits."""

    code = "MX_SAFETENSORS_INTEGER"
    rule = "shapes and offsets are integers from 0 to 18446744073709551615"


class SizeOverflow(SafetensorsError):
    """product(shape) times the dtype's bits leaves 64 bits. Stricter than safetensors: also where a 0 hides it."""

    code = "MX_SAFETENSORS_SIZE_OVERFLOW"
    rule = "the product of all dimensions but zeros, times the bits of the dtype, has to fit into 64 bits"


class PartialByte(SafetensorsError):
    """A tensor of a sub-byte dtype does not fill whole bytes."""

    code = "MX_SAFETENSORS_PARTIAL_BYTE"
    rule = "a tensor has to fill whole bytes"


class SizeMismatch(SafetensorsError):
    """end - begin is not the size that dtype and shape make."""

    code = "MX_SAFETENSORS_SIZE_MISMATCH"
    rule = "data_offsets have to span exactly the bytes that dtype and shape make"


class RangeBeyondFile(SafetensorsError):
    """A tensor ends after the file does: the file was cut short, or its header is not its own."""

    code = "MX_SAFETENSORS_RANGE_BEYOND_FILE"
    rule = "every tensor has to lie within the file"


class RangesOverlap(SafetensorsError):
    """Two tensors share bytes."""

    code = "MX_SAFETENSORS_RANGES_OVERLAP"
    rule = "tensors may not overlap"


class RangesHole(SafetensorsError):
    """Bytes between two tensors belong to none."""

    code = "MX_SAFETENSORS_RANGES_HOLE"
    rule = "tensors have to cover the data without a hole"


class DataNotCovered(SafetensorsError):
    """Bytes after the last tensor belong to none."""

    code = "MX_SAFETENSORS_DATA_NOT_COVERED"
    rule = "tensors have to cover the data to the last byte of the file"
