# cython: boundscheck=False, wraparound=False
"""A NIXL agent through `libnixl_capi.so`; signatures and docs in agent.pyi.

Handles that NIXL hands out are owned by the agent, under one guard: `destroy` refuses new calls, waits for those that
are inside NIXL, then releases in order. A transfer that outlives its agent only fails.
"""

import threading
import weakref

cimport cython

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from mxcore.errors import FenceFailed, NixlError
from mxcore.nixl.errors import failure, no_plugin, not_started, peer_lost
from mxcore.nixl.table import load_library

from mxcore.nixl.mailbox cimport Mailbox
from mxcore.nixl.capi cimport (
    MX_NIXL_SUCCESS, MX_NIXL_THREAD_SYNC_RW, mx_nixl_agent_config, mx_nixl_free, mx_nixl_post, mx_nixl_progress_until,
    mx_nixl_region_list, mx_nixl_stop, mx_nixl_table, mx_nixl_transfer_list, mx_nixl_wait_any,
)
from mxcore.nixl.table cimport nixl_table

cdef const mx_nixl_table *nixl = NULL  # until the first agent
cdef object agents = weakref.WeakSet()
cdef Py_ssize_t transfer_count = 0
cdef dict OPERATIONS = {"read": 0, "write": 1}


def live_agents():
    return sum(1 for agent in agents if not agent.destroyed)


def live_transfers():
    return transfer_count


@cython.no_gc
cdef class NixlAgent:
    cdef void *agent
    cdef void *backend_handle
    cdef void *options
    cdef object guard  # a Condition over the four below
    cdef Py_ssize_t calls  # threads inside NIXL
    cdef bint closing
    cdef int stopped  # written and read atomically: ends `keep_progressing`
    cdef dict registrations  # number -> address of the registration list
    cdef set requests  # addresses of transfer requests that NIXL still knows
    cdef Py_ssize_t next_registration
    cdef readonly str name
    cdef readonly str backend
    cdef object __weakref__

    def __cinit__(self, str name not None, *, str backend="UCX", backend_params=None, int progress_delay_us=4000,
                  bint progress_thread=True):
        global nixl
        nixl = nixl_table()
        self.name = name
        self.backend = backend
        self.guard = threading.Condition()  # re-entrant: a garbage collection may release transfers anywhere
        self.registrations = {}
        self.requests = set()
        self.closing = True  # until everything exists: a half-built agent takes no calls
        cdef mx_nixl_agent_config config
        cdef bytes encoded = name.encode()
        cdef const char *c_name = encoded
        cdef int status
        memset(&config, 0, sizeof(config))
        config.enable_progress_thread = progress_thread
        config.thread_sync_new = config.thread_sync_old = MX_NIXL_THREAD_SYNC_RW
        config.num_workers_old = 1
        config.progress_delay_us = progress_delay_us
        with nogil:
            status = nixl.create_configured_agent(c_name, &config, &self.agent)
        if status != MX_NIXL_SUCCESS:
            raise failure("creating the agent", status, name)
        try:
            self._create_backend(backend_params or {})
        except NixlError:
            self._free_handles()
            raise
        self.closing = False
        agents.add(self)

    cdef int _create_backend(self, object extra_params) except -1:
        cdef void *memory_kinds = NULL
        cdef void *params = NULL
        cdef bytes backend = self.backend.encode(), key, value
        cdef const char *c_backend = backend
        cdef int status
        with nogil:
            status = nixl.get_plugin_params(self.agent, c_backend, &memory_kinds, &params)
        if status != MX_NIXL_SUCCESS:
            raise no_plugin(load_library(), self.backend, status)
        nixl.destroy_mem_list(memory_kinds)
        try:
            for name, text in extra_params.items():
                key, value = name.encode(), text.encode()
                nixl.params_add(params, key, value)
            with nogil:
                status = nixl.create_backend(self.agent, c_backend, params, &self.backend_handle)
        finally:
            nixl.destroy_params(params)
        if status != MX_NIXL_SUCCESS:
            raise not_started(self.backend, status)
        status = nixl.create_opt_args(&self.options)
        if status == MX_NIXL_SUCCESS:
            status = nixl.opt_args_add_backend(self.options, self.backend_handle)
        if status != MX_NIXL_SUCCESS:
            raise failure("naming the backend", status, self.name)
        return 0

    cdef int _enter(self) except -1:
        """Every call between `_enter` and `_leave` runs while `destroy` waits; nothing there may raise."""
        with self.guard:
            if self.closing:
                raise NixlError(f"NIXL agent {self.name!r} is destroyed")
            self.calls += 1
        return 0

    cdef int _leave(self) except -1:
        with self.guard:
            self.calls -= 1
            if self.closing and self.calls == 0:
                self.guard.notify_all()
        return 0

    @property
    def destroyed(self):
        return self.agent == NULL

    def register(self, const uint64_t[::1] addresses not None, const uint64_t[::1] lengths not None, *,
                 uint64_t device_index=0, bint device_memory=False):
        cdef Py_ssize_t count = addresses.shape[0]
        if count != lengths.shape[0] or count == 0:
            raise ValueError(f"{count} addresses and {lengths.shape[0]} lengths to register")
        cdef void *regions = NULL
        cdef int status
        self._enter()
        with nogil:
            status = mx_nixl_region_list(nixl, device_memory, &addresses[0], &lengths[0], count, device_index,
                                         &regions)
            if status == MX_NIXL_SUCCESS:
                status = nixl.register_mem(self.agent, regions, self.options)
            if status != MX_NIXL_SUCCESS and regions != NULL:
                nixl.destroy_reg_dlist(regions)
        if status == MX_NIXL_SUCCESS:
            self.next_registration += 1
            self.registrations[self.next_registration] = <uintptr_t> regions
        self._leave()
        if status != MX_NIXL_SUCCESS:
            raise failure(f"registering {count} regions", status, self.name)
        return self.next_registration

    def deregister(self, Py_ssize_t registration):
        cdef int status = MX_NIXL_SUCCESS
        cdef uintptr_t regions
        self._enter()
        regions = self.registrations.pop(registration, 0)
        if regions != 0:
            with nogil:
                status = nixl.deregister_mem(self.agent, <void *> regions, self.options)
                nixl.destroy_reg_dlist(<void *> regions)
        self._leave()
        if status != MX_NIXL_SUCCESS:
            raise failure("deregistering", status, self.name)

    def metadata(self):
        cdef void *data = NULL
        cdef size_t length = 0
        cdef int status
        self._enter()
        with nogil:
            status = nixl.get_local_md(self.agent, &data, &length)
        self._leave()
        if status != MX_NIXL_SUCCESS:
            raise failure("reading its metadata", status, self.name)
        try:
            return (<char *> data)[:length]
        finally:
            mx_nixl_free(nixl, data)

    def load_remote(self, bytes metadata not None):
        cdef char *name = NULL
        cdef const char *data = metadata
        cdef size_t length = len(metadata)
        cdef int status
        self._enter()
        with nogil:
            status = nixl.load_remote_md(self.agent, data, length, &name)
        self._leave()
        if status != MX_NIXL_SUCCESS:
            raise failure(f"loading a peer's metadata of {length} bytes", status, self.name,
                          ": damaged, of another NIXL version or backend, or known under this name already")
        try:
            return name.decode()
        finally:
            mx_nixl_free(nixl, name)

    def forget_remote(self, str remote_agent not None):
        cdef bytes encoded = remote_agent.encode()
        cdef const char *c_name = encoded
        cdef int status
        self._enter()
        with nogil:
            status = nixl.invalidate_remote_md(self.agent, c_name)
        self._leave()
        return status == MX_NIXL_SUCCESS

    def transfer(self, str operation not None, const uint64_t[::1] local_addresses not None,
                 const uint64_t[::1] remote_addresses not None, const uint64_t[::1] lengths not None,
                 str remote_agent not None, *, uint64_t local_device_index=0, uint64_t remote_device_index=0,
                 bint local_device_memory=False, bint remote_device_memory=False):
        cdef Py_ssize_t count = lengths.shape[0]
        if operation not in OPERATIONS or not count == local_addresses.shape[0] == remote_addresses.shape[0] != 0:
            raise ValueError(f"a {operation!r} of {local_addresses.shape[0]} local and {remote_addresses.shape[0]} "
                             f"remote addresses, {count} lengths")
        cdef int c_operation = OPERATIONS[operation], status
        cdef bytes encoded = remote_agent.encode()
        cdef const char *c_remote = encoded
        cdef void *local = NULL
        cdef void *remote = NULL
        cdef void *request = NULL
        cdef Transfer transfer = Transfer.__new__(Transfer, self, operation, remote_agent)
        self._enter()
        with nogil:
            status = mx_nixl_transfer_list(nixl, local_device_memory, &local_addresses[0], &lengths[0], count,
                                           local_device_index, &local)
            if status == MX_NIXL_SUCCESS:
                status = mx_nixl_transfer_list(nixl, remote_device_memory, &remote_addresses[0], &lengths[0], count,
                                               remote_device_index, &remote)
            if status == MX_NIXL_SUCCESS:
                status = nixl.create_xfer_req(self.agent, c_operation, local, remote, c_remote, &request,
                                              self.options)
            if local != NULL:
                nixl.destroy_xfer_dlist(local)
            if remote != NULL:
                nixl.destroy_xfer_dlist(remote)
        if status == MX_NIXL_SUCCESS:
            transfer.request = <uintptr_t> request
            self.requests.add(transfer.request)
        self._leave()
        if status != MX_NIXL_SUCCESS:
            raise failure(f"preparing a {operation} of {count} descriptors with {remote_agent!r}", status,
                          self.name, ": addresses outside of the registered regions, or an unknown peer")
        return transfer

    def keep_progressing(self, Mailbox mailbox not None):
        self._enter()
        with nogil:
            mx_nixl_progress_until(nixl, self.agent, self.options, mailbox.box, &self.stopped)
        self._leave()

    def stop_progressing(self, bint stopped=True):
        mx_nixl_stop(&self.stopped, stopped)

    def wait_any(self, list transfers not None, double seconds):
        cdef Py_ssize_t count = len(transfers), i
        cdef void **requests = <void **> malloc((count + 1) * (sizeof(void *) + sizeof(int)))
        cdef int *statuses = <int *> (requests + count)
        if requests == NULL:
            raise MemoryError
        try:
            for i in range(count):
                requests[i] = <void *> (<Transfer?> transfers[i]).request
                if requests[i] == NULL:
                    raise NixlError(f"NIXL agent {self.name!r}: a transfer that is waited for was released")
            self._enter()
            with nogil:
                mx_nixl_wait_any(nixl, self.agent, requests, count, statuses, <int64_t> (seconds * 1e9))
            self._leave()
            return [i for i in range(count) if (<Transfer> transfers[i])._finished("asking after", statuses[i])]
        finally:
            free(requests)

    cdef void _release_request(self, uintptr_t request) noexcept:
        with nogil:
            nixl.release_xfer_req(self.agent, <void *> request)
            nixl.destroy_xfer_req(<void *> request)

    cdef void _give_back(self, uintptr_t request) noexcept:
        """Frees a request unless the agent is gone, or about to free it itself."""
        with self.guard:
            if self.closing:
                return
            self.requests.discard(request)
            self.calls += 1
        self._release_request(request)
        self._leave()

    cdef int _free_handles(self) noexcept:
        """Destroys the agent and what hangs on it; nobody else is inside NIXL. Returns the worst status."""
        cdef int status = MX_NIXL_SUCCESS
        cdef void *agent = self.agent
        for request in self.requests:
            self._release_request(request)  # a refusal is no news: what is in flight ends with the agent
        self.requests.clear()
        for regions in self.registrations.values():
            nixl.deregister_mem(agent, <void *> <uintptr_t> regions, self.options)
            nixl.destroy_reg_dlist(<void *> <uintptr_t> regions)
        self.registrations.clear()
        if self.options != NULL:
            nixl.destroy_opt_args(self.options)
            self.options = NULL
        if agent != NULL:
            with nogil:
                status = nixl.destroy_agent(agent)
            self.agent = NULL
        if self.backend_handle != NULL:
            nixl.destroy_backend(self.backend_handle)  # frees the handle alone: the engine went with the agent
            self.backend_handle = NULL
        return status

    def destroy(self):
        cdef int status
        with self.guard:
            if self.closing:
                while self.agent != NULL:  # another thread is at it: what returns here is destroyed
                    self.guard.wait()
                return
            self.closing = True
            mx_nixl_stop(&self.stopped, True)
            while self.calls:
                self.guard.wait()
        status = self._free_handles()
        with self.guard:
            self.guard.notify_all()
        if status != MX_NIXL_SUCCESS:
            raise FenceFailed(f"destroying NIXL agent {self.name!r} gave status {status}: its transfers may still run")

    def __dealloc__(self):
        if self.agent != NULL:
            self._free_handles()


@cython.no_gc
cdef class Transfer:
    cdef NixlAgent agent  # the parent, which owns the request
    cdef uintptr_t request
    cdef readonly str operation
    cdef readonly str remote_agent

    def __cinit__(self, NixlAgent agent not None, str operation, str remote_agent):
        global transfer_count
        transfer_count += 1
        self.agent = agent
        self.operation = operation
        self.remote_agent = remote_agent

    def post(self, number=None):
        cdef int status
        cdef uint32_t told = 0 if number is None else number
        cdef const uint32_t *tell = NULL if number is None else &told
        self._enter()
        with nogil:
            status = mx_nixl_post(nixl, self.agent.agent, self.agent.backend_handle, <void *> self.request,
                                  self.agent.options, tell)
        self.agent._leave()
        return self._finished("posting", status)

    def done(self):
        cdef int status
        self._enter()
        with nogil:
            status = nixl.get_xfer_status(self.agent.agent, <void *> self.request)
        self.agent._leave()
        return self._finished("asking after", status)

    cdef int _enter(self) except -1:
        self.agent._enter()
        if self.request == 0:
            self.agent._leave()
            raise NixlError(f"NIXL agent {self.agent.name!r}: the {self.operation} was released")
        return 0

    cdef bint _finished(self, str call, int status) except -1:
        if status < 0:
            raise peer_lost(call, status, self.agent.name, self.operation, self.remote_agent)
        return status == MX_NIXL_SUCCESS

    def release(self):
        cdef uintptr_t request = self.request
        self.request = 0
        if request != 0:
            self.agent._give_back(request)

    def __dealloc__(self):
        global transfer_count
        if self.agent is None:  # __cinit__ refused its arguments
            return
        transfer_count -= 1
        if self.request != 0:
            self.agent._give_back(self.request)
