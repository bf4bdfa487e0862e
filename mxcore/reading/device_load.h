/* Pieces of files into device memory: read into a slot of pinned memory, copied from there while the next one is read.
 *
 * Each thread has a stream and some slots of its own. A slot is used again when the event behind its copies is reached.
 * Runs of 64 KiB and more are copied one by one; where a piece has several smaller ones, one kernel copies them all,
 * which reads the slot where it is: nothing is allocated on the device. Long runs of files that cuFile reads pass no
 * slot (cufile_read.h).
 */
#ifndef MX_CUDA_LOAD_H
#define MX_CUDA_LOAD_H

#include "cuda/cuda_driver.h"
#include "cuda/cuda_kernels.h"
#include "cufile_read.h"

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
    mx_cufile_reads *reads; /* NULL: everything passes the slots */
} mx_device_load;

/* What one thread has of it. */
typedef struct {
    mx_stream stream;
    mx_event *events;
    char *slots;
    int used[MX_DEVICE_SLOTS], place, direct;
} mx_device_lane;

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
        ssize_t got =
            pread(work->files[piece->file].fd, slot + done, (size_t)(piece->length - done), piece->offset + done);
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
                                 mx_xxh3 *state) {
    mx_device_load *load = (mx_device_load *)work->run_data;
    mx_stitch_record *records = (mx_stitch_record *)(slot + load->slot_bytes - (int64_t)MX_RECORD_BYTES);
    uint64_t on_device = load->slots_on_device - (uint64_t)(uintptr_t)load->slots;
    unsigned count = 0;
    mx_cursor at = piece->from;
    for (int64_t left = piece->payload; left > 0;) {
        mx_run run = mx_next_run(work->parts, &at, &left);
        const char *from = data + (run.offset - piece->offset);
        uint64_t to = (uint64_t)(uintptr_t)run.to;
        size_t bytes = (size_t)run.bytes;
        if (state != NULL) {
            mx_xxh3_update(state, from, bytes);
        }
        if (load->stitch != NULL && piece->segments > 1 && bytes < MX_STITCH_BYTES) {
            records[count++] = (mx_stitch_record){to, (uint64_t)(uintptr_t)from + on_device, bytes};
            continue;
        }
        mx_add(&load->copies, 1);
        if (!mx_device_ok(work, "cuMemcpyHtoDAsync", (int)load->cuda->copy_to_device(to, from, bytes, stream))) {
            return 0;
        }
    }
    if (count > 0) {
        uint64_t list = (uint64_t)(uintptr_t)records + on_device;
        void *arguments[] = {&list};
        mx_add(&load->launches, 1);
        return mx_device_ok(
            work, "cuLaunchKernel",
            (int)load->cuda->launch(load->stitch, count, 1, 1, MX_BLOCK_THREADS, 1, 1, 0, stream, arguments, NULL));
    }
    return 1;
}

/* A piece by way of the lane's next slot; 0 after a failure. */
static inline int mx_device_piece(mx_work *work, mx_device_lane *lane, const mx_piece *piece, mx_xxh3 *state) {
    mx_device_load *load = (mx_device_load *)work->run_data;
    const mx_cuda_table *cuda = load->cuda;
    char *slot = lane->slots + lane->place * load->slot_bytes;
    mx_event event = lane->events[lane->place];
    if (lane->used[lane->place] && !mx_device_ok(work, "cuEventSynchronize", (int)cuda->event_synchronize(event))) {
        return 0;
    }
    const char *data = mx_device_read(work, piece, slot, lane->direct);
    if (data == NULL || !mx_device_copy(work, piece, slot, data, lane->stream, state) ||
        !mx_device_ok(work, "cuEventRecord", (int)cuda->event_record(event, lane->stream))) {
        return 0;
    }
    lane->used[lane->place] = 1;
    lane->place = (lane->place + 1) % load->slots_each;
    return 1;
}

/* A piece of which cuFile reads the long runs, and the lane what is between their whole blocks; 0 after a failure of
 * the lane. After one of cuFile's the job is left. */
static inline int mx_device_straight(mx_work *work, mx_device_lane *lane, const mx_piece *piece, int64_t job) {
    mx_cufile_reads *reads = ((mx_device_load *)work->run_data)->reads;
    mx_piece rest = {.file = piece->file};
    mx_cursor at = piece->from;
    int64_t straight = 0;
    for (int64_t left = piece->payload; left > 0;) {
        mx_cursor here = at;
        mx_run run = mx_next_run(work->parts, &at, &left);
        mx_span middle = mx_cufile_span(reads, piece->file, run.offset, run.bytes);
        if (middle.begin == middle.end) {
            mx_rest_add(&rest, here, run.offset, run.bytes);
            continue;
        }
        mx_rest_add(&rest, here, run.offset, middle.begin - run.offset);
        if (rest.payload > 0 && !mx_device_piece(work, lane, &rest, NULL)) {
            return 0;
        }
        if (!mx_cufile_middle(work, reads, piece->file, middle, run.to + (middle.begin - run.offset), job)) {
            return 1;
        }
        straight += middle.end - middle.begin;
        rest = (mx_piece){.file = piece->file};
        mx_cursor_advance(work->parts, &here, middle.end - run.offset);
        mx_rest_add(&rest, here, middle.end, run.offset + run.bytes - middle.end);
    }
    if (rest.payload > 0 && !mx_device_piece(work, lane, &rest, NULL)) {
        return 0;
    }
    mx_add(&reads->bytes, straight);
    mx_done(work, piece);
    return 1;
}

/* What was given to the stream that the load comes after is done: for cuFile by waiting, since it knows no streams. */
static inline int mx_device_after(mx_work *work, mx_stream stream) {
    mx_device_load *load = (mx_device_load *)work->run_data;
    if (load->after == NULL) {
        return 1;
    }
    if (load->reads != NULL &&
        !mx_device_ok(work, "cuEventSynchronize", (int)load->cuda->event_synchronize(load->after))) {
        return 0;
    }
    return mx_device_ok(work, "cuStreamWaitEvent", (int)load->cuda->stream_wait_event(stream, load->after, 0));
}

/* What one thread does, with the context current. */
static inline void mx_device_run(mx_work *work, int index) {
    mx_device_load *load = (mx_device_load *)work->run_data;
    mx_device_lane lane = {.stream = load->streams[index], .events = load->events + index * load->slots_each};
    lane.slots = load->slots + (int64_t)index * load->slots_each * load->slot_bytes;
    lane.direct = work->way == MX_DIRECT || work->way == MX_URING;
    const mx_job *job;
    size_t number;
    if (!mx_device_after(work, lane.stream)) {
        return;
    }
    while ((job = mx_take_job(work, &number)) != NULL) {
        mx_xxh3 hash;
        mx_xxh3 *state = mx_hash_begin(&hash, job);
        mx_cursor at = job->from;
        for (int64_t left = job->payload; left > 0 && !mx_get(&work->stopped);) {
            mx_piece piece = mx_next_piece(work->parts, at, left, &work->limits);
            if (load->reads != NULL && state == NULL) { /* a job without a digest is one piece */
                if (!mx_device_straight(work, &lane, &piece, work->order[number])) {
                    return;
                }
            } else if (mx_device_piece(work, &lane, &piece, state)) {
                mx_done(work, &piece);
            } else {
                return;
            }
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
