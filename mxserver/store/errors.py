"""What a store raises; the root is `mxserver.wire.errors.MxError`.

::

    StoreError                MX_STORE
    ├── StoreUnusable         MX_STORE_UNUSABLE     at start: the file cannot serve as a store
    │   └── StoreTooNew       MX_STORE_TOO_NEW      a newer version of the server wrote the file
    ├── StoreUnavailable      MX_STORE_UNAVAILABLE  while running: the store does not work at the moment
    │   └── StoreEnded        MX_STORE_ENDED        it will not work again without a restart
    ├── UnknownRecord         MX_UNKNOWN_RECORD     no such (source, worker, rank)
    ├── NotOwner              MX_NOT_OWNER          the record is somebody else's
    └── StoreFull             MX_STORE_FULL         as many records or bytes are stored as the limits allow
"""

from __future__ import annotations

from mxserver.wire import MxError


class StoreError(MxError):
    """Keeping or finding a record failed."""

    code = "MX_STORE"


class StoreUnusable(StoreError):
    """The store cannot be opened; the message names the file, the reason and what to do."""

    code = "MX_STORE_UNUSABLE"


class StoreTooNew(StoreUnusable):
    """A newer version of the server wrote the file; this one would not understand it."""

    code = "MX_STORE_TOO_NEW"


class StoreUnavailable(StoreError):
    """The store does not work at the moment. Must never be treated as "no records".

    Nothing of the call was kept, unless the message says that this is not known: the disk was busy with it when the
    caller's time was over.
    """

    code = "MX_STORE_UNAVAILABLE"


class StoreEnded(StoreUnavailable):
    """What keeps the records has ended with an error that nobody expected; only a restart helps."""

    code = "MX_STORE_ENDED"


class UnknownRecord(StoreError):
    """There is no record of this (source, worker, rank); the worker has to publish (again)."""

    code = "MX_UNKNOWN_RECORD"


class NotOwner(StoreError):
    """The record was published by another caller; only that one may change it."""

    code = "MX_NOT_OWNER"


class StoreFull(StoreError):
    """Nothing of the call was kept: it would exceed a limit, which the message names."""

    code = "MX_STORE_FULL"
