"""What workers and the server share: protocol, calls, names of settings, errors. A worker imports this alone."""

from __future__ import annotations

from mxserver.wire import environment
from mxserver.wire.address import is_host, parse_server_address, split_scheme
from mxserver.wire.environment import (
    BY_NAME,
    VARIABLES,
    is_kubernetes_value,
    misspelt,
    setting,
    unprotected,
    warnings_for,
    without_effect,
)
from mxserver.wire.errors import (
    DiskFull,
    FileRefused,
    MethodMissing,
    ModelDownloadError,
    ModelNotFound,
    MxError,
    ServerRefused,
    ServerUnreachable,
    SettingError,
    StaleEpoch,
    WireError,
)
from mxserver.wire.extras import install_command
from mxserver.wire.file_locks import locks_work
from mxserver.wire.left_out import left_out
from mxserver.wire.nearest_name import nearest, unknown_key
from mxserver.wire.relative_path import open_regular_below, path_problem
from mxserver.wire.removed_names import REMOVED
from mxserver.wire.unique_path import remove_leftovers, unique_beside
from mxserver.wire.unused_names import UNUSED
from mxserver.wire.weight_files import INDEX_SUFFIX, WeightFiles, says_what_belongs, weight_files, weight_files_in

__all__ = [
    "BY_NAME",
    "INDEX_SUFFIX",
    "REMOVED",
    "UNUSED",
    "VARIABLES",
    "DiskFull",
    "FileRefused",
    "MethodMissing",
    "ModelDownloadError",
    "ModelNotFound",
    "MxError",
    "ServerRefused",
    "ServerUnreachable",
    "SettingError",
    "StaleEpoch",
    "WeightFiles",
    "WireError",
    "environment",
    "install_command",
    "is_host",
    "is_kubernetes_value",
    "left_out",
    "locks_work",
    "misspelt",
    "nearest",
    "open_regular_below",
    "parse_server_address",
    "path_problem",
    "remove_leftovers",
    "says_what_belongs",
    "setting",
    "split_scheme",
    "unique_beside",
    "unknown_key",
    "unprotected",
    "warnings_for",
    "weight_files",
    "weight_files_in",
    "without_effect",
]
