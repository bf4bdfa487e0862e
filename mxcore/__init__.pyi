"""The types of what `import mxcore` offers; each name is looked up when it is first used."""

from mxcore.exchange import Fetched as Fetched
from mxcore.exchange import Published as Published
from mxcore.exchange import fetch as fetch
from mxcore.exchange import publish as publish
from mxcore.storage.access import RemoteCheckpoint as RemoteCheckpoint
from mxcore.storage.access import load as load
from mxcore.storage.access import load_file as load_file
from mxcore.storage.access import open_checkpoint as open_checkpoint
from mxcore.storage.access import stream as stream
from mxcore.storage.checkpoint import Checkpoint as Checkpoint
from mxcore.storage.checkpoint import TensorInfo as TensorInfo
from mxcore.storage.load import LoadReport as LoadReport
from mxcore.storage.plan import Want as Want
from mxserver.wire import MxError as MxError

__all__ = [
    "Checkpoint",
    "Fetched",
    "LoadReport",
    "MxError",
    "Published",
    "RemoteCheckpoint",
    "TensorInfo",
    "Want",
    "__version__",
    "fetch",
    "load",
    "load_file",
    "open_checkpoint",
    "publish",
    "stream",
]

__version__: str
