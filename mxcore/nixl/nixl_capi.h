/* NIXL's C interface as a table of functions that is filled at run time from the wheel's libnixl_capi.so.
 *
 * Declarations by hand, from the public interface (nixl 1.4 to 1.5); nothing is linked, so that one build works
 * with and without NIXL on the machine. Handles are opaque pointers. Every function returns a status: 0 success,
 * 1 in progress, below 0 an error.
 */
#ifndef MX_NIXL_CAPI_H
#define MX_NIXL_CAPI_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mailbox.h"
#include "native/clock.h"

enum { MX_NIXL_SUCCESS = 0, MX_NIXL_IN_PROGRESS = 1 };

/* What nixl_capi_create_configured_agent reads. The layout changed between releases: `listen_port` was an int at
 * offset 4, followed by `thread_sync` at 8 and `num_workers` at 12, and became a uint16 at offset 2, which moved
 * `thread_sync` to 4 and `num_workers` to 8. Both are right at once when offsets 4 and 8 both hold the thread
 * sync mode: the port is not used while the listener is off, and a number of workers of 2 does no harm.
 */
typedef struct {
    bool enable_progress_thread;
    bool enable_listen_thread;
    uint16_t listen_port_new;
    uint32_t thread_sync_new; /* the old layout's listen_port */
    uint32_t thread_sync_old; /* the new layout's num_workers */
    uint32_t num_workers_old; /* padding in the new layout */
    uint64_t progress_delay_us;
    uint64_t listen_delay_us;
    bool capture_telemetry;
    uint8_t reserved[31]; /* zero, for fields that a later release may add */
} mx_nixl_agent_config;

enum { MX_NIXL_THREAD_SYNC_RW = 2 };

#define MX_NIXL_FUNCTIONS(F)                                                                                         \
    F(create_configured_agent, (const char *name, const mx_nixl_agent_config *config, void **agent))                 \
    F(destroy_agent, (void *agent))                                                                                  \
    F(get_plugin_params, (void *agent, const char *plugin, void **memory_kinds, void **params))                      \
    F(params_add, (void *params, const char *key, const char *value))                                                \
    F(destroy_params, (void *params))                                                                                \
    F(destroy_mem_list, (void *memory_kinds))                                                                        \
    F(create_backend, (void *agent, const char *plugin, void *params, void **backend))                               \
    F(destroy_backend, (void *backend))                                                                              \
    F(create_opt_args, (void **options))                                                                             \
    F(opt_args_add_backend, (void *options, void *backend))                                                          \
    F(destroy_opt_args, (void *options))                                                                             \
    F(create_reg_dlist, (int memory_kind, void **list, bool sorted))                                                 \
    F(reg_dlist_add_desc,                                                                                            \
      (void *list, uintptr_t address, size_t length, uint64_t device, const void *metadata, size_t metadata_length)) \
    F(destroy_reg_dlist, (void *list))                                                                               \
    F(register_mem, (void *agent, void *list, void *options))                                                        \
    F(deregister_mem, (void *agent, void *list, void *options))                                                      \
    F(get_local_md, (void *agent, void **data, size_t *length))                                                      \
    F(load_remote_md, (void *agent, const void *data, size_t length, char **name))                                   \
    F(invalidate_remote_md, (void *agent, const char *name))                                                         \
    F(create_xfer_dlist, (int memory_kind, void **list, bool sorted))                                                \
    F(xfer_dlist_add_desc, (void *list, uintptr_t address, size_t length, uint64_t device))                          \
    F(destroy_xfer_dlist, (void *list))                                                                              \
    F(create_xfer_req, (void *agent, int operation, void *local, void *remote, const char *remote_agent,             \
                        void **request, void *options))                                                              \
    F(post_xfer_req, (void *agent, void *request, void *options))                                                    \
    F(get_xfer_status, (void *agent, void *request))                                                                 \
    F(release_xfer_req, (void *agent, void *request))                                                                \
    F(destroy_xfer_req, (void *request))                                                                             \
    F(create_notif_map, (void **map))                                                                                \
    F(destroy_notif_map, (void *map))                                                                                \
    F(notif_map_clear, (void *map))                                                                                  \
    F(get_notifs, (void *agent, void *map, void *options))

/* For notifications with a content: without these, holders tell of what they wrote by gRPC alone. */
#define MX_NIXL_NOTIFICATIONS(F)                                                \
    F(opt_args_set_has_notif, (void *options, bool has_notif))                  \
    F(opt_args_set_notif_msg, (void *options, const void *data, size_t length)) \
    F(notif_map_size, (void *map, size_t *agents))                              \
    F(notif_map_get_agent_at, (void *map, size_t index, const char **agent))    \
    F(notif_map_get_notifs_size, (void *map, const char *agent, size_t *count)) \
    F(notif_map_get_notif, (void *map, const char *agent, size_t index, const void **data, size_t *length))

typedef struct {
#define MX_NIXL_MEMBER(name, arguments) int(*name) arguments;
    MX_NIXL_FUNCTIONS(MX_NIXL_MEMBER)
    MX_NIXL_NOTIFICATIONS(MX_NIXL_MEMBER)
#undef MX_NIXL_MEMBER
    bool notifies;                  /* the optional ones are there */
    void (*mem_free)(void *memory); /* only in newer releases: older ones hand out malloc'd memory */
} mx_nixl_table;

/* Fills `table` from the library at `path`. Returns 0, or -1 with the reason in `reason`. The library stays
 * loaded: it has threads and thread-local state that do not survive dlclose. */
static inline int mx_nixl_open(const char *path, mx_nixl_table *table, char *reason, size_t reason_bytes) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *error = dlerror();
        snprintf(reason, reason_bytes, "%s", error != NULL ? error : "dlopen failed");
        return -1;
    }
#define MX_NIXL_RESOLVE(name, arguments)                                                \
    *(void **)&table->name = dlsym(library, "nixl_capi_" #name);                        \
    if (table->name == NULL) {                                                          \
        snprintf(reason, reason_bytes, "%s has no function nixl_capi_%s", path, #name); \
        return -1;                                                                      \
    }
    MX_NIXL_FUNCTIONS(MX_NIXL_RESOLVE)
#undef MX_NIXL_RESOLVE
    table->notifies = true;
#define MX_NIXL_RESOLVE(name, arguments)                         \
    *(void **)&table->name = dlsym(library, "nixl_capi_" #name); \
    table->notifies &= table->name != NULL;
    MX_NIXL_NOTIFICATIONS(MX_NIXL_RESOLVE)
#undef MX_NIXL_RESOLVE
    *(void **)&table->mem_free = dlsym(library, "nixl_capi_mem_free");
    return 0;
}

/* Descriptor lists out of arrays; on failure `list` may exist all the same and is the caller's to destroy. */
static inline int mx_nixl_transfer_list(const mx_nixl_table *table, int memory_kind, const uint64_t *addresses,
                                        const uint64_t *lengths, ptrdiff_t count, uint64_t device, void **list) {
    int status = table->create_xfer_dlist(memory_kind, list, false);
    for (ptrdiff_t i = 0; i < count && status == MX_NIXL_SUCCESS; i++) {
        status = table->xfer_dlist_add_desc(*list, (uintptr_t)addresses[i], (size_t)lengths[i], device);
    }
    return status;
}

static inline int mx_nixl_region_list(const mx_nixl_table *table, int memory_kind, const uint64_t *addresses,
                                      const uint64_t *lengths, ptrdiff_t count, uint64_t device, void **list) {
    int status = table->create_reg_dlist(memory_kind, list, false);
    for (ptrdiff_t i = 0; i < count && status == MX_NIXL_SUCCESS; i++) {
        status = table->reg_dlist_add_desc(*list, (uintptr_t)addresses[i], (size_t)lengths[i], device, NULL, 0);
    }
    return status;
}

enum {
    MX_NIXL_PAUSE_NANOSECONDS = 50 * 1000,
    MX_NIXL_LONGEST_PAUSE_NANOSECONDS = 1000 * 1000,
    MX_NIXL_BUSY_NANOSECONDS = 20 * 1000 /* a round that takes longer has moved something */
};

/* Posts a request; its peer is told `number` once its bytes are there, where NIXL can. */
static inline int mx_nixl_post(const mx_nixl_table *table, void *agent, void *backend, void *request, void *options,
                               const uint32_t *number) {
    void *telling = NULL;
    int status;
    if (number == NULL || !table->notifies) {
        return table->post_xfer_req(agent, request, options);
    }
    status = table->create_opt_args(&telling);
    if (status == MX_NIXL_SUCCESS) {
        status = table->opt_args_add_backend(telling, backend);
    }
    if (status == MX_NIXL_SUCCESS) {
        status = table->opt_args_set_notif_msg(telling, number, sizeof *number);
    }
    if (status == MX_NIXL_SUCCESS) {
        status = table->opt_args_set_has_notif(telling, true);
    }
    if (status == MX_NIXL_SUCCESS) {
        status = table->post_xfer_req(agent, request, telling);
    }
    if (telling != NULL) {
        table->destroy_opt_args(telling);
    }
    return status;
}

/* Puts the numbers that peers have sent into `box`. What cannot be read or kept is left out: it is told by gRPC too. */
static inline void mx_nixl_take_numbers(const mx_nixl_table *table, void *map, mx_mailbox *box) {
    size_t agents = 0, count = 0, length;
    const char *agent;
    const void *data;
    uint32_t number;
    if (table->notif_map_size(map, &agents) != MX_NIXL_SUCCESS) {
        return;
    }
    for (size_t i = 0; i < agents; i++) {
        if (table->notif_map_get_agent_at(map, i, &agent) != MX_NIXL_SUCCESS ||
            table->notif_map_get_notifs_size(map, agent, &count) != MX_NIXL_SUCCESS) {
            continue;
        }
        for (size_t j = 0; j < count; j++) {
            if (table->notif_map_get_notif(map, agent, j, &data, &length) != MX_NIXL_SUCCESS ||
                length != sizeof number) {
                continue;
            }
            memcpy(&number, data, sizeof number);
            mx_mailbox_put(box, number);
        }
    }
}

/* How long to sleep before looking again, when nothing has happened for so long: an eighth of it, within bounds. */
static inline void mx_nixl_pause(int64_t quiet_nanoseconds) {
    int64_t eighth = quiet_nanoseconds / 8;
    if (eighth < MX_NIXL_PAUSE_NANOSECONDS) {
        eighth = MX_NIXL_PAUSE_NANOSECONDS;
    }
    if (eighth > MX_NIXL_LONGEST_PAUSE_NANOSECONDS) {
        eighth = MX_NIXL_LONGEST_PAUSE_NANOSECONDS;
    }
    const struct timespec pause = {0, (long)eighth};
    nanosleep(&pause, NULL);
}

/* Drives an agent without a progress thread until `stopped`: asking for notifications makes all the progress there is.
 * Looking 10,000 times a second costs less than being woken for each of the 20,000 stretches that
 * TCP brings meanwhile, on both sides: a sender has nobody to wake. The kernel's buffers hold what comes in a pause.
 * Where rounds are short, little comes (a slow link, a holder with nothing to give): then 1,000 times. */
static inline void mx_nixl_progress_until(const mx_nixl_table *table, void *agent, void *options, mx_mailbox *box,
                                          const int *stopped) {
    void *map = NULL;
    if (table->create_notif_map(&map) != MX_NIXL_SUCCESS) {
        return;
    }
    int64_t busy = mx_now_ns();
    while (!__atomic_load_n(stopped, __ATOMIC_ACQUIRE)) {
        int64_t began = mx_now_ns(), ended;
        table->get_notifs(agent, map, options); /* a lost peer is told by its transfers */
        if (table->notifies) {
            mx_nixl_take_numbers(table, map, box);
        }
        table->notif_map_clear(map);
        ended = mx_now_ns();
        if (ended - began > MX_NIXL_BUSY_NANOSECONDS) {
            busy = ended;
        }
        mx_nixl_pause(ended - busy);
    }
    table->destroy_notif_map(map);
}

/* Asks after requests until one of them has ended or `longest_nanoseconds` are over; leaves what each answered. */
static inline void mx_nixl_wait_any(const mx_nixl_table *table, void *agent, void *const *requests, ptrdiff_t count,
                                    int *statuses, int64_t longest_nanoseconds) {
    int64_t began = mx_now_ns();
    for (;;) {
        bool ended = false;
        for (ptrdiff_t i = 0; i < count; i++) {
            statuses[i] = table->get_xfer_status(agent, requests[i]);
            ended |= statuses[i] != MX_NIXL_IN_PROGRESS;
        }
        int64_t waited = mx_now_ns() - began;
        if (ended || waited >= longest_nanoseconds) {
            return;
        }
        mx_nixl_pause(waited);
    }
}

static inline void mx_nixl_stop(int *stopped, int value) { __atomic_store_n(stopped, value, __ATOMIC_RELEASE); }

/* Frees what NIXL handed out. */
static inline void mx_nixl_free(const mx_nixl_table *table, void *memory) {
    if (table->mem_free != NULL) {
        table->mem_free(memory);
    } else {
        free(memory);
    }
}

#endif
