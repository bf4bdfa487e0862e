/* Names of the process' environment, changed while other threads may call getenv.
 *
 * setenv may move the array of names and free the old one (glibc before 2.41), and unsetenv shifts it, under a thread
 * that walks through it: gRPC, UCX and CUDA call getenv from threads of their own, and such a worker ended by SIGSEGV.
 * Here arrays and entries are replaced by one store each, and never freed.
 */
#ifndef MX_ENVIRONMENT_STORE_H
#define MX_ENVIRONMENT_STORE_H

#include <stdlib.h>
#include <string.h>

extern char **environ;

/* All that was ever made, so that tools that look for leaks see who has it. */
typedef struct mx_environment_kept {
    struct mx_environment_kept *before;
    char *bytes[]; /* an array of names, or characters */
} mx_environment_kept;

static mx_environment_kept *mx_environment_all;

static inline void *mx_environment_keep(size_t bytes) {
    mx_environment_kept *made = malloc(sizeof *made + bytes);
    if (made == NULL) {
        return NULL;
    }
    made->before = mx_environment_all;
    mx_environment_all = made;
    return made->bytes;
}

/* A copy that is kept for ever, or NULL. */
static inline char *mx_environment_copy(const char *entry) {
    char *made = mx_environment_keep(strlen(entry) + 1);
    return made == NULL ? NULL : strcpy(made, entry);
}

/* Puts `entry`, a kept one, in the place of `name`, or adds it. It is NAME=value, or NAME alone, which getenv does not
 * find, for a name that is taken out. Callers exclude each other. Returns 0, or -1 without memory. */
static inline int mx_environment_store(const char *name, char *entry) {
    size_t length = strlen(name), count = 0;
    for (; environ != NULL && environ[count] != NULL; count++) {
        const char *found = environ[count];
        if (strncmp(found, name, length) == 0 && (found[length] == '=' || found[length] == '\0')) {
            __atomic_store_n(&environ[count], entry, __ATOMIC_RELEASE);
            return 0;
        }
    }
    if (entry[length] == '\0') {
        return 0;
    }
    char **larger = mx_environment_keep((count + 2) * sizeof *larger);
    if (larger == NULL) {
        return -1;
    }
    if (count != 0) {
        memcpy(larger, environ, count * sizeof *larger);
    }
    larger[count] = entry;
    larger[count + 1] = NULL;
    __atomic_store_n(&environ, larger, __ATOMIC_RELEASE);
    return 0;
}

#endif
