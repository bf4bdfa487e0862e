"""safetensors' dtype codes: their size, and what torch and numpy call them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DTYPES", "DType"]


class DType(NamedTuple):
    """One dtype. `torch_name` and `numpy_name` are None where the framework has no such type.

    `bits` are an element's, as `TensorInfo.shape` counts elements: a pair of F4 is one, as in torch.
    """

    bits: int
    torch_name: str | None
    numpy_name: str | None


DTYPES: dict[str, DType] = {
    "BOOL": DType(8, "bool", "bool"),
    "F4": DType(8, "float4_e2m1fn_x2", None),
    "F6_E2M3": DType(6, None, None),
    "F6_E3M2": DType(6, None, None),
    "U8": DType(8, "uint8", "uint8"),
    "I8": DType(8, "int8", "int8"),
    "F8_E5M2": DType(8, "float8_e5m2", None),
    "F8_E4M3": DType(8, "float8_e4m3fn", None),
    "F8_E8M0": DType(8, "float8_e8m0fnu", None),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz", None),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz", None),
    "I16": DType(16, "int16", "int16"),
    "U16": DType(16, "uint16", "uint16"),
    "F16": DType(16, "float16", "float16"),
    "BF16": DType(16, "bfloat16", None),
    "I32": DType(32, "int32", "int32"),
    "U32": DType(32, "uint32", "uint32"),
    "F32": DType(32, "float32", "float32"),
    "F64": DType(64, "float64", "float64"),
    "I64": DType(64, "int64", "int64"),
    "U64": DType(64, "uint64", "uint64"),
    "C64": DType(64, "complex64", "complex64"),
}
