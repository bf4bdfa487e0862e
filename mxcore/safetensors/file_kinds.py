"""What a file is that is no safetensors file, told by its first 8 bytes: what people put there by mistake."""

from __future__ import annotations

__all__ = ["kind_of_file"]

_LFS = "it is a pointer of Git LFS and not the file itself: run git lfs pull in the repository it comes from"
_HTML = "it is an HTML page: a server answered with a page, such as one to log in, instead of the file"
_KINDS = (
    (b"version ", _LFS),
    (b"PK\x03\x04", "it is a zip archive, as torch.save writes: a .bin or .pt file under another name"),
    (b"\x80", "it is a pickle, as torch.save wrote before 1.6: a .bin or .pt file under another name"),
    (b"GGUF", "it is a GGUF file (llama.cpp) under another name"),
    (b"<!DOCTYP", _HTML),
    (b"<!doctyp", _HTML),
    (b"<html", _HTML),
    (b"<HTML", _HTML),
    (b"<?xml", "it is an XML document: a store answered with an error instead of the file"),
    (b'{"', "it is JSON: an index, or a server's answer instead of the file"),
    (b"\x89HDF", "it is an HDF5 file under another name"),
    (b"\x1f\x8b", "it is compressed with gzip"),
)
_PICKLES = b"\x02\x03\x04\x05"  # the protocols that torch has used


def kind_of_file(first_bytes: bytes) -> str:
    """A sentence about a file that begins so; "" where it is not known."""
    for begin, kind in _KINDS:
        if first_bytes.startswith(begin) and (begin != b"\x80" or first_bytes[1] in _PICKLES):
            return kind
    return ""
