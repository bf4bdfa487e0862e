"""Device memory of `mx bench peer`'s workers, on the stand-in."""

from __future__ import annotations

from mxbench.fleet.model_memory import DeviceMemory, content_pieces, tensors_of
from tests.cuda.stand_in import StandIn


def test_what_is_written_is_read(loaded: StandIn) -> None:
    memory = DeviceMemory(9 << 20, 0)
    for at, piece in content_pieces(5, memory.size_bytes):
        memory.write(at, piece)
    assert all(memory.read(at, len(piece)) == piece for at, piece in content_pieces(5, memory.size_bytes))
    [tensor] = tensors_of(memory, [(512, 1000)])
    assert (tensor.device_type, tensor.device_index, tensor.address) == ("cuda", 0, memory.address + 512)
    memory.close()
