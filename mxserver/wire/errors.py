"""The root of all errors that this project raises on purpose.

::

    MxError
    ├── SettingError            MX_SETTING            a setting's value is refused
    ├── WireError
    │   ├── ServerUnreachable   MX_SERVER_UNREACHABLE
    │   ├── ServerRefused       MX_SERVER_REFUSED     the server answered, and said no
    │   ├── MethodMissing       MX_METHOD_MISSING     an older server, which does not know the call
    │   ├── StaleEpoch          MX_STALE_EPOCH        a newer process of this worker has published
    │   ├── ModelNotFound       MX_MODEL_NOT_FOUND    the server, or its provider, has no such model, revision or file
    │   ├── ModelDownloadError  MX_MODEL_DOWNLOAD     the server could not download the model
    │   └── FileRefused         MX_FILE_REFUSED       a file came with a name or bytes that are not allowed
    ├── DiskFull                MX_DISK_FULL          no room here for files from elsewhere
    ├── StoreError              (mxserver.store)
    └── (mxcore.errors)         what the compiled core and the transfer raise
"""

from __future__ import annotations

import re

_CODE_AT_END = re.compile(r" \[MX_[A-Z0-9_]+\]$")


class MxError(Exception):
    """An error with a stable code.

    The message says what failed, where, with which values, and, where there is one, what to do next. Its text ends with
    the code; where the message repeats what a server said, with the code of the server's error, which says more.
    """

    code: str = "MX_ERROR"

    @property
    def stable_code(self) -> str:
        """The code that the text ends with."""
        return str(self).rpartition(" [")[2].removesuffix("]")

    def __str__(self) -> str:
        text = super().__str__()
        return text if _CODE_AT_END.search(text) else f"{text} [{self.code}]"


class SettingError(MxError):
    """A setting has a value that cannot be used; the message names the setting, the value and the rule."""

    code = "MX_SETTING"


class WireError(MxError):
    """A call to a server or to another worker failed."""

    code = "MX_WIRE"


class ServerUnreachable(WireError):
    """No answer from the server within the deadline, or it says that it is unavailable."""

    code = "MX_SERVER_UNREACHABLE"
    late: bool = False
    """Whether the deadline passed without any answer."""


class ServerRefused(WireError):
    """The server answered and refused; the message carries its reason."""

    code = "MX_SERVER_REFUSED"


class MethodMissing(ServerRefused):
    """The server does not know this call: it is older than its caller, or another program."""

    code = "MX_METHOD_MISSING"


class StaleEpoch(ServerRefused):
    """A newer process of this worker has published; this one must not act on the record any more."""

    code = "MX_STALE_EPOCH"


class ModelNotFound(ServerRefused):
    """The server, or the provider that it asked, has no such model, revision or file."""

    code = "MX_MODEL_NOT_FOUND"


class ModelDownloadError(ServerRefused):
    """The server could not download the model; the message carries its reason."""

    code = "MX_MODEL_DOWNLOAD"


class DiskFull(MxError):
    """The disk here has no room for files from elsewhere; the message has the path, the bytes wanted and those free."""

    code = "MX_DISK_FULL"


class FileRefused(WireError):
    """A file of a server has a name that leads elsewhere, or came with other bytes than it should have."""

    code = "MX_FILE_REFUSED"
