"""Addresses of servers, as users write them."""

from __future__ import annotations

import re
import urllib.parse

from mxserver.wire.errors import SettingError

DEFAULT_PORT = 8001

_RULE = "must be host:port, http(s)://host:port or grpc(s)://host:port, such as mx-server:8001 or http://[fd00::1]:8001"
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_PLAIN, _TLS = ("http", "grpc"), ("https", "grpcs")
_TARGET = re.compile(r"(dns|ipv4|ipv6|passthrough):(?!\d+/?$)(?://([^/]*)/)?", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?\]")
_BARE_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")


def parse_server_address(text: str) -> str:
    """`host:port`, or `https://host:port` for TLS, out of what users write.

    That is `host`, `host:port`, `http://…` and `grpc://…` (plain), `https://…` and `grpcs://…` (TLS), each with a slash
    at the end or without, or a target of gRPC (`dns:///host:port`, `ipv4:10.0.0.1:8001`) that names one host and port.
    Without a port: 8001. An IPv6 address comes back in brackets.

    Raises:
        SettingError: the text is no such address; the message says which part is wrong.
    """
    address, prefix = text.strip(), ""
    target, scheme = _TARGET.match(address), _SCHEME.match(address)
    if (target or scheme) and "@" in address:
        raise SettingError(f"a server address has no user and no password in it; it {_RULE}")
    if target:
        address = _of_target(text, target[1].lower(), target[2] or "", address[target.end() :])
    elif scheme:
        if scheme[1].lower() not in (*_PLAIN, *_TLS):
            raise SettingError(f"server address {text!r}: the scheme {scheme[1]!r} is not known; it {_RULE}")
        prefix = "https://" if scheme[1].lower() in _TLS else ""
        address = address[scheme.end() :]
    address = address.removesuffix("/")
    if _BARE_IPV6.fullmatch(address):
        return f"{prefix}[{address}]:{DEFAULT_PORT}"
    host, port = address, str(DEFAULT_PORT)
    if not address.endswith("]") and ":" in address:
        host, _, port = address.rpartition(":")
    if not _HOST.fullmatch(host):
        raise SettingError(f"server address {text!r}: {host!r} is no host; it {_RULE}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise SettingError(f"server address {text!r}: {port!r} is no port from 1 to 65535; it {_RULE}")
    return f"{prefix}{host}:{int(port)}"


def _of_target(text: str, resolver: str, authority: str, address: str) -> str:
    """The one host and port of a target of gRPC. Raises SettingError.

    https://github.com/grpc/grpc/blob/master/doc/naming.md
    """
    if authority:
        raise SettingError(f"server address {text!r}: the name server {authority!r} cannot be asked here; it {_RULE}")
    if "," in address:
        raise SettingError(f"server address {text!r} names several hosts, and there is one server; it {_RULE}")
    return urllib.parse.unquote(address) if resolver == "ipv6" else address


def is_host(text: str) -> bool:
    """Whether this is a name or an address alone, IPv6 in brackets or without."""
    return (_HOST.fullmatch(text) or _BARE_IPV6.fullmatch(text.partition("%")[0])) is not None


_NOBODY = "no ModelExpress server answers there: its port is 8001 unless set"
_ADVICE = {  # by scheme: what gRPC says about a wrong address, and what to do
    "https": {
        "WRONG_VERSION_NUMBER": "no TLS is spoken there: write the address without https://",
        "CERTIFICATE_VERIFY_FAILED": "MX_TLS_CA_FILE names the certificate that the server's has to come from",
        "Received http2 header with status": _NOBODY,
    },
    "http": {
        "Socket closed": "if TLS is spoken there, write the address with https://",
        "Failed parsing HTTP/2": _NOBODY,
        "Received http2 header with status": _NOBODY,
    },
}


def with_advice(details: str, address: str) -> str:
    """gRPC's details of a failed call to `address`, with advice if they look like a wrong address."""
    advice = _ADVICE[split_scheme(address)[0]]
    return "; ".join([details, *(advice[sign] for sign in advice if sign in details)])


def split_scheme(address: str) -> tuple[str, str]:
    """("https" or "http", host:port) of what `parse_server_address` returns."""
    return ("https", address.removeprefix("https://")) if address.startswith("https://") else ("http", address)
