"""`make test-rdma`: a virtual machine with software RDMA (Soft-RoCE), in which tests of this checkout run over verbs.

The processor is emulated (QEMU's TCG), so that no privilege, no KVM and no RDMA card is needed; what is shown is that
it works, never how fast. The host's root is shared with the guest read-only; what the guest writes stays in its memory.
"""
