/* The middle of a long run, whole blocks of its file, by cuFile straight into device memory.
 *
 * A read that fails ends cuFile's use for this run: its job is left, everything that was not begun goes through the
 * ring. What is left is read again when the handles are deregistered, so that nothing of cuFile's lands on it late.
 */
#ifndef MX_CUFILE_READ_H
#define MX_CUFILE_READ_H

#include "cufile_library.h"
#include "read_work.h"

#define MX_CUFILE_BLOCK 4096
#define MX_CUFILE_LEAST 262144 /* a shorter middle goes through the ring with its edges */
#define MX_CUFILE_FAILURES 64  /* one a thread */

typedef struct {
    const mx_cufile_table *cufile;
    void **handles; /* one a file; NULL: that file goes through the ring */
    int64_t bytes;  /* that came so */
    int given_up;
    size_t failures;
    int64_t left[MX_CUFILE_FAILURES]; /* jobs */
    /* written by who failed first */
    int64_t file, offset, wanted, result;
    int error; /* errno, for a result of -1 */
} mx_cufile_reads;

/* What of a stretch is for cuFile; nothing: begin and end are the same. */
static inline mx_span mx_cufile_span(const mx_cufile_reads *reads, int64_t file, int64_t offset, int64_t length) {
    int64_t mask = MX_CUFILE_BLOCK - 1;
    mx_span middle = {1, (offset + mask) & ~mask, (offset + length) & ~mask};
    if (mx_get(&reads->given_up) || reads->handles[file] == NULL || middle.end - middle.begin < MX_CUFILE_LEAST) {
        middle.end = middle.begin;
    }
    return middle;
}

/* Reads it; 0 after a failure, of which `job` is told. Needs the context to be current. */
static inline int mx_cufile_middle(mx_work *work, mx_cufile_reads *reads, int64_t file, mx_span middle, char *to,
                                   int64_t job) {
    int64_t wanted = middle.end - middle.begin;
    int64_t got = (int64_t)reads->cufile->read(reads->handles[file], to, (size_t)wanted, middle.begin, 0);
    int error = errno;
    if (got == wanted) {
        mx_add(&work->read_bytes, wanted);
        return 1;
    }
    size_t place = mx_add(&reads->failures, 1);
    reads->left[place] = job; /* each thread ends cuFile's use with its first failure */
    if (place == 0) {
        reads->file = file;
        reads->offset = middle.begin;
        reads->wanted = wanted;
        reads->result = got;
        reads->error = error;
    }
    __atomic_store_n(&reads->given_up, 1, __ATOMIC_RELEASE);
    return 0;
}

/* Adds the next bytes of a file to what is read through the ring. */
static inline void mx_rest_add(mx_piece *rest, mx_cursor at, int64_t offset, int64_t bytes) {
    if (bytes == 0) {
        return;
    }
    if (rest->payload == 0) {
        rest->from = at;
        rest->offset = offset;
    }
    rest->length = offset + bytes - rest->offset;
    rest->payload += bytes;
    rest->segments++;
}

#endif
