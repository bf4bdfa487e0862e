/* A mapped file that is cut short while it is copied raises SIGBUS: here that becomes a failed read.
 *
 * The handler is in place only while a read through a mapping is under way (mx_bus_guard_begin / _end, under the
 * GIL), acts only on threads inside mx_guarded, and hands every other SIGBUS to whoever had the signal before.
 */
#ifndef MX_BUS_GUARD_H
#define MX_BUS_GUARD_H

#include <setjmp.h>
#include <signal.h>
#include <stddef.h>

static __thread sigjmp_buf *mx_bus_jump = NULL;
static struct sigaction mx_bus_before;
static int mx_bus_users = 0; /* changes under the GIL only */

static inline void mx_bus_handler(int number, siginfo_t *info, void *context) {
    (void)info;
    (void)context;
    if (mx_bus_jump != NULL) {
        siglongjmp(*mx_bus_jump, 1);
    }
    sigaction(number, &mx_bus_before, NULL); /* not ours: the access is repeated under the disposition before */
}

/* 0, or -1 with errno. */
static inline int mx_bus_guard_begin(void) {
    if (mx_bus_users++ == 0) {
        struct sigaction ours = {0};
        ours.sa_sigaction = mx_bus_handler;
        ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK; /* NODEFER: the jump leaves no mask behind */
        sigemptyset(&ours.sa_mask);
        if (sigaction(SIGBUS, &ours, &mx_bus_before) != 0) {
            mx_bus_users--;
            return -1;
        }
    }
    return 0;
}

static inline void mx_bus_guard_end(void) {
    struct sigaction now;
    if (--mx_bus_users == 0 && sigaction(SIGBUS, NULL, &now) == 0 && now.sa_sigaction == mx_bus_handler) {
        sigaction(SIGBUS, &mx_bus_before, NULL); /* who has put in another meanwhile keeps it */
    }
}

/* Runs copy(data); 0, or -1 where memory behind a mapping is gone. What `copy` calls must hold nothing. */
static inline int mx_guarded(void (*copy)(void *), void *data) {
    sigjmp_buf jump;
    if (sigsetjmp(jump, 0) != 0) {
        mx_bus_jump = NULL;
        return -1;
    }
    mx_bus_jump = &jump;
    copy(data);
    mx_bus_jump = NULL;
    return 0;
}

#endif
