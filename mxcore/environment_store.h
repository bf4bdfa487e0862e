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

/* Puts `entry` in the place of `name`, or adds it. It is NAME=value, or NAME alone, which getenv does not find, for a
 * name that is taken out; kept for ever. Callers exclude each other. Returns 0, or -1 without memory. */
static inline int mx_environment_store(const char *name, char *entry)
{
    size_t length = strlen(name), count = 0;
    for (; environ != NULL && environ[count] != NULL; count++) {
        const char *found = environ[count];
        if (strncmp(found, name, length) == 0 && (found[length] == '=' || found[length] == '\0')) {
            __atomic_store_n(&environ[count], entry, __ATOMIC_RELEASE);
            return 0;
        }
    }
    if (entry[length] == '\0')
        return 0;
    char **larger = malloc((count + 2) * sizeof *larger);
    if (larger == NULL)
        return -1;
    if (count != 0)
        memcpy(larger, environ, count * sizeof *larger);
    larger[count] = entry;
    larger[count + 1] = NULL;
    __atomic_store_n(&environ, larger, __ATOMIC_RELEASE);
    return 0;
}

#endif
