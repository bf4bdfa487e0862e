"""Declarations of nixl_capi.h: NIXL's C interface as a table of functions."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t

from mxcore.nixl.mailbox cimport mx_mailbox

cdef extern from "nixl/nixl_capi.h" nogil:
    enum: MX_NIXL_SUCCESS
    enum: MX_NIXL_THREAD_SYNC_RW

    ctypedef struct mx_nixl_agent_config:
        bint enable_progress_thread
        unsigned int thread_sync_new
        unsigned int thread_sync_old
        unsigned int num_workers_old
        uint64_t progress_delay_us

    ctypedef struct mx_nixl_table:
        int (*create_configured_agent)(const char *, const mx_nixl_agent_config *, void **) noexcept nogil
        int (*destroy_agent)(void *) noexcept nogil
        int (*get_plugin_params)(void *, const char *, void **, void **) noexcept nogil
        int (*params_add)(void *, const char *, const char *) noexcept nogil
        int (*destroy_params)(void *) noexcept nogil
        int (*destroy_mem_list)(void *) noexcept nogil
        int (*create_backend)(void *, const char *, void *, void **) noexcept nogil
        int (*destroy_backend)(void *) noexcept nogil
        int (*create_opt_args)(void **) noexcept nogil
        int (*opt_args_add_backend)(void *, void *) noexcept nogil
        int (*destroy_opt_args)(void *) noexcept nogil
        int (*create_reg_dlist)(int, void **, bint) noexcept nogil
        int (*reg_dlist_add_desc)(void *, uintptr_t, size_t, uint64_t, const void *, size_t) noexcept nogil
        int (*destroy_reg_dlist)(void *) noexcept nogil
        int (*register_mem)(void *, void *, void *) noexcept nogil
        int (*deregister_mem)(void *, void *, void *) noexcept nogil
        int (*get_local_md)(void *, void **, size_t *) noexcept nogil
        int (*load_remote_md)(void *, const void *, size_t, char **) noexcept nogil
        int (*invalidate_remote_md)(void *, const char *) noexcept nogil
        int (*create_xfer_dlist)(int, void **, bint) noexcept nogil
        int (*xfer_dlist_add_desc)(void *, uintptr_t, size_t, uint64_t) noexcept nogil
        int (*destroy_xfer_dlist)(void *) noexcept nogil
        int (*create_xfer_req)(void *, int, void *, void *, const char *, void **, void *) noexcept nogil
        int (*post_xfer_req)(void *, void *, void *) noexcept nogil
        int (*get_xfer_status)(void *, void *) noexcept nogil
        int (*release_xfer_req)(void *, void *) noexcept nogil
        int (*destroy_xfer_req)(void *) noexcept nogil
        int (*create_notif_map)(void **) noexcept nogil
        int (*destroy_notif_map)(void *) noexcept nogil
        int (*notif_map_clear)(void *) noexcept nogil
        int (*get_notifs)(void *, void *, void *) noexcept nogil
        bint notifies
        void (*mem_free)(void *) noexcept nogil

    int mx_nixl_open(const char *path, mx_nixl_table *table, char *reason, size_t reason_bytes)
    int mx_nixl_transfer_list(const mx_nixl_table *table, int memory_kind, const uint64_t *addresses,
                              const uint64_t *lengths, Py_ssize_t count, uint64_t device, void **list)
    int mx_nixl_region_list(const mx_nixl_table *table, int memory_kind, const uint64_t *addresses,
                            const uint64_t *lengths, Py_ssize_t count, uint64_t device, void **list)
    int mx_nixl_post(const mx_nixl_table *table, void *agent, void *backend, void *request, void *options,
                     const uint32_t *number)
    void mx_nixl_progress_until(const mx_nixl_table *table, void *agent, void *options, mx_mailbox *box,
                                const int *stopped)
    void mx_nixl_wait_any(const mx_nixl_table *table, void *agent, void *const *requests, Py_ssize_t count,
                          int *statuses, int64_t longest_nanoseconds)
    void mx_nixl_stop(int *stopped, int value)
    void mx_nixl_free(const mx_nixl_table *table, void *memory)
