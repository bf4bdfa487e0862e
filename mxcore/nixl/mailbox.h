/* Numbers that one thread leaves for another, neither of which need have the GIL. */
#ifndef MX_MAILBOX_H
#define MX_MAILBOX_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "native/clock.h"

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* by the monotonic clock */
    uint64_t *numbers;
    size_t count, room;
    bool woken;
} mx_mailbox;

/* Returns NULL without memory. */
static inline mx_mailbox *mx_mailbox_new(void) {
    mx_mailbox *box = calloc(1, sizeof *box);
    if (box == NULL) {
        return NULL;
    }
    pthread_mutex_init(&box->lock, NULL);
    mx_condition_init(&box->changed);
    return box;
}

static inline void mx_mailbox_free(mx_mailbox *box) {
    if (box == NULL) {
        return;
    }
    pthread_cond_destroy(&box->changed);
    pthread_mutex_destroy(&box->lock);
    free(box->numbers);
    free(box);
}

/* False without memory. */
static inline bool mx_mailbox_put(mx_mailbox *box, uint64_t number) {
    bool put = true;
    pthread_mutex_lock(&box->lock);
    if (box->count == box->room) {
        size_t room = 2 * box->room + 64;
        uint64_t *numbers = realloc(box->numbers, room * sizeof *numbers);
        put = numbers != NULL;
        if (put) {
            box->numbers = numbers;
            box->room = room;
        }
    }
    if (put) {
        box->numbers[box->count++] = number;
    }
    pthread_cond_signal(&box->changed);
    pthread_mutex_unlock(&box->lock);
    return put;
}

static inline void mx_mailbox_wake(mx_mailbox *box) {
    pthread_mutex_lock(&box->lock);
    box->woken = true;
    pthread_cond_signal(&box->changed);
    pthread_mutex_unlock(&box->lock);
}

/* Waits for numbers or to be woken, for so long at most; hands out the numbers (to be freed) and how many there are. */
static inline size_t mx_mailbox_take(mx_mailbox *box, int64_t longest_nanoseconds, uint64_t **numbers) {
    int64_t deadline_ns = mx_now_ns() + longest_nanoseconds;
    size_t count;
    pthread_mutex_lock(&box->lock);
    while (box->count == 0 && !box->woken) {
        if (mx_condition_wait_until(&box->changed, &box->lock, deadline_ns) != 0) {
            break;
        }
    }
    box->woken = false;
    count = box->count;
    *numbers = box->numbers;
    box->numbers = NULL;
    box->count = box->room = 0;
    pthread_mutex_unlock(&box->lock);
    return count;
}

#endif
