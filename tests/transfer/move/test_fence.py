"""The fence when what it needs fails."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mxcore.errors import CudaError
from mxcore.transfer.move import AgentSession


def test_a_device_that_fails_does_not_keep_the_agent_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise CudaError("cuCtxSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS", status=700)

    session = AgentSession("fence", tls="tcp,self", progress_thread=False)
    monkeypatch.setattr(session, "_device", SimpleNamespace(context=SimpleNamespace(synchronize=fails)))
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        session.fence()
    assert session.fenced
