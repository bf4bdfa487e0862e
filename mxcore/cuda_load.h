/* Pieces of files into device memory: read into a slot of pinned memory, copied from there while the next one is read.
 *
 * Each thread has a stream and some slots of its own. A slot is used again when the event behind its copies is reached.
 * Runs of 64 KiB and more are copied one by one; where a piece has several smaller ones, one kernel copies them all,
 * which reads the slot where it is: nothing is allocated on the device.
 */
#ifndef MX_CUDA_LOAD_H
#define MX_CUDA_LOAD_H

#include "cuda_driver.h"
#include "cuda_kernels.h"
#include "read_work.h"

#define MX_RECORD_BYTES (MX_SEGMENTS * sizeof(mx_stitch_record))
#define MX_DEVICE_THREADS 64
#define MX_DEVICE_SLOTS 4 /* of one thread, at most */

typedef struct {
    const mx_cuda_table *cuda;
    mx_context context;
    mx_function stitch; /* NULL: slots that kernels cannot read */
    mx_event after;     /* nothing is copied before it; NULL: at once */
    char *slots;
    uint64_t slots_on_device;
    int64_t slot_bytes; /* piece, two pages, records */
    int threads, slots_each;
    mx_stream streams[MX_DEVICE_THREADS];
    mx_event events[MX_DEVICE_THREADS * MX_DEVICE_SLOTS];
    int status; /* of the first call that failed */
    const char *call;
    int64_t copies, launches;
} mx_device_load;

static inline int mx_device_ok(mx_work *work, const char *call, int status) {
    mx_device_load *load = (mx_device_load *)work->run_data;
    if (status == MX_CUDA_SUCCESS) {
        return 1;
    }
    if (__atomic_exchange_n(&work->stopped, 1, __ATOMIC_ACQ_REL) == 0) {
        load->call = call;
        __atomic_store_n(&load->status, status, __ATOMIC_RELEASE);
    }
    return 0;
}

/* The piece's bytes from where `data` says into the slot; NULL after a failure. */
static inline char *mx_device_read(mx_work *work, const mx_piece *piece, char *slot, int direct) {
    if (direct) {
        int64_t mask = work->files[piece->file].align_bytes - 1;
        int64_t begin = piece->offset & ~mask, end = piece->offset + piece->length;
        if (mx_direct_read(work, piece, slot, begin, (end + mask) & ~mask, end - begin, 0) < 0) {
            return NULL;
        }
        return slot + (piece->offset - begin);
    }
    for (int64_t done = 0; done < piece->length;) {
        ssize_t got = pread(work->files[piece->file].fd, slot + done, (size_t)(piece->length - done), piece->offset + done);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            mx_fail(work, piece, done, got < 0 ? errno : 0);
            return NULL;
        }
        done += got;
        mx_add(&work->read_bytes, got);
    }
    return slot;
}

/* Starts all copies of a piece; digests on the way. */
static inline int mx_device_copy(mx_work *work, const mx_piece *piece, char *slot, const char *data, mx_stream stream,
                                 XXH3_state_t *state) {
    mx_device_load *load = (mx_device_load *)work->run_data;
    mx_stitch_record *records = (mx_stitch_record *)(slot + load->slot_bytes - (int64_t)MX_RECORD_BYTES);
    uint64_t on_device = load->slots_on_device - (uint64_t)(uintptr_t)load->slots;
    unsigned count = 0;
    mx_cursor at = piece->from;
    for (int64_t left = piece->payload; left > 0;) {
        const char *from = data + (mx_cursor_offset(work->parts, &at) - piece->offset);
        uint64_t to = (uint64_t)(uintptr_t)mx_cursor_address(work->parts, &at);
        int64_t take = mx_least(left, work->parts[at.part].bytes - at.skip);
        if (state != NULL) {
            mx_digest_update(state, from, (size_t)take);
        }
        if (load->stitch != NULL && piece->segments > 1 && take < MX_STITCH_BYTES) {
            records[count++] = (mx_stitch_record){to, (uint64_t)(uintptr_t)from + on_device, (uint64_t)take};
        } else {
            mx_add(&load->copies, 1);
            if (!mx_device_ok(work, "cuMemcpyHtoDAsync", (int)load->cuda->copy_to_device(to, from, (size_t)take, stream))) {
                return 0;
            }
        }
        mx_cursor_advance(work->parts, &at, take);
        left -= take;
    }
    if (count > 0) {
        uint64_t list = (uint64_t)(uintptr_t)records + on_device;
        void *arguments[] = {&list};
        mx_add(&load->launches, 1);
        return mx_device_ok(work, "cuLaunchKernel", (int)load->cuda->launch(load->stitch, count, 1, 1, MX_BLOCK_THREADS, 1, 1,
                                                                            0, stream, arguments, NULL));
    }
    return 1;
}

/* What one thread does, with the context current. */
static inline void mx_device_run(mx_work *work, int index) {
    mx_device_load *load = (mx_device_load *)work->run_data;
    const mx_cuda_table *cuda = load->cuda;
    mx_stream stream = load->streams[index];
    mx_event *events = load->events + index * load->slots_each;
    char *slots = load->slots + (int64_t)index * load->slots_each * load->slot_bytes;
    int used[MX_DEVICE_SLOTS] = {0}, place = 0;
    int direct = work->way == MX_DIRECT || work->way == MX_URING;
    const mx_job *job;
    size_t number;
    if (load->after != NULL && !mx_device_ok(work, "cuStreamWaitEvent", (int)cuda->stream_wait_event(stream, load->after, 0))) {
        return;
    }
    while ((job = mx_take_job(work, &number)) != NULL) {
        mx_hash hash;
        XXH3_state_t *state = mx_hash_begin(&hash, job);
        mx_cursor at = job->from;
        for (int64_t left = job->payload; left > 0 && !mx_get(&work->stopped);) {
            mx_piece piece = mx_next_piece(work->parts, at, left, &work->limits);
            char *slot = slots + place * load->slot_bytes;
            if (used[place] && !mx_device_ok(work, "cuEventSynchronize", (int)cuda->event_synchronize(events[place]))) {
                return;
            }
            const char *data = mx_device_read(work, &piece, slot, direct);
            if (data == NULL || !mx_device_copy(work, &piece, slot, data, stream, state) ||
                !mx_device_ok(work, "cuEventRecord", (int)cuda->event_record(events[place], stream))) {
                return;
            }
            used[place] = 1;
            place = (place + 1) % load->slots_each;
            mx_done(work, &piece);
            at = piece.next;
            left -= piece.payload;
        }
        if (mx_get(&work->stopped)) {
            return;
        }
        mx_hash_end(work, &hash, job);
        if (index == 0 && work->tick(work->tick_data) != 0) {
            __atomic_store_n(&work->stopped, 1, __ATOMIC_RELEASE);
        }
    }
}

/* Waits for its stream whatever happened: afterwards nothing reads the slots or writes to destinations. */
static inline void mx_device_jobs(mx_work *work, int index) {
    mx_device_load *load = (mx_device_load *)work->run_data;
    mx_context before;
    if (index >= load->threads ||
        !mx_device_ok(work, "cuCtxPushCurrent", (int)load->cuda->context_push(load->context))) {
        return;
    }
    mx_device_run(work, index);
    mx_device_ok(work, "cuStreamSynchronize", (int)load->cuda->stream_synchronize(load->streams[index]));
    load->cuda->context_pop(&before);
}

#endif
