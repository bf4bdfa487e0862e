/* Modules and launches of the stand-in: a module is PTX text, a kernel what mxcore/cuda/cuda_kernels.h says of each
 * thread.
 *
 * Shown here: that the text is there, with these entries and as many parameters; that records are made right; what the
 * threads of a launch make together. Not shown: what a GPU's compiler makes of the text, and the reduction within a
 * block (shuffles and shared memory), which has no counterpart here.
 */
#include "stand_in.h"

#include "cuda/cuda_kernels.h"

#include <stdlib.h>

typedef struct {
    char *text;
    int live;
} module;

typedef struct {
    const char *name;
    int parameters;
} kernel;

static const kernel kernels[] = {{"mx_sum_tiles", 2}, {"mx_sum_seams", 3}, {"mx_stitch", 1}};

EXPORT int cuModuleLoadDataEx(void **handle, const void *image, unsigned options, int *names, void **values) {
    FAULT("cuModuleLoadDataEx");
    const char *text = image;
    for (unsigned i = 0; i < options; i++) {
        if (names[i] == MX_JIT_ERROR_LOG) {
            snprintf(values[i], 64, "the stand-in compiles nothing");
        }
    }
    if (current_device() == NULL) {
        return INVALID_CONTEXT;
    }
    if (strstr(text, ".version 7.0") == NULL || strstr(text, ".target sm_") == NULL) {
        return INVALID_PTX;
    }
    module *made = calloc(1, sizeof *made);
    made->text = strdup(text);
    pthread_mutex_lock(&lock);
    count.modules++;
    pthread_mutex_unlock(&lock);
    *handle = made;
    return 0;
}

EXPORT int cuModuleUnload(void *handle) {
    FAULT("cuModuleUnload");
    module *ending = handle;
    pthread_mutex_lock(&lock);
    count.modules--;
    pthread_mutex_unlock(&lock);
    free(ending->text);
    free(ending);
    return 0;
}

EXPORT int cuModuleGetFunction(void **function, void *handle, const char *name) {
    FAULT("cuModuleGetFunction");
    char entry[128], parameter[128];
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
        snprintf(entry, sizeof entry, ".visible .entry %s(", name);
        snprintf(parameter, sizeof parameter, "%s_param_%d", name, kernels[i].parameters);
        const char *text = ((module *)handle)->text;
        if (strcmp(kernels[i].name, name) == 0 && strstr(text, entry) != NULL && strstr(text, parameter) == NULL) {
            *function = (void *)&kernels[i];
            return 0;
        }
    }
    return NOT_FOUND;
}

static int check_tiles(const work *item) {
    const mx_tile *tiles = (const mx_tile *)(uintptr_t)item->arguments[0];
    int status = readable_by_kernels(item->arguments[0], item->grid * sizeof *tiles, "the tiles");
    if (status == 0) {
        status = readable_by_kernels(item->arguments[1], item->grid * 8, "the sums");
    }
    for (unsigned i = 0; status == 0 && i < item->grid; i++) {
        status = tiles[i].words > MX_TILE_WORDS
                     ? violation(LAUNCH_FAILED, "a tile of %zu words", (size_t)tiles[i].words)
                     : in_device_memory(tiles[i].address, 8 * tiles[i].words, "a tile");
    }
    return status;
}

static int check_seams(const work *item) {
    const mx_seam *seams = (const mx_seam *)(uintptr_t)item->arguments[0];
    int status = readable_by_kernels(item->arguments[0], item->arguments[1] * sizeof *seams, "the seams");
    if (status == 0) {
        status = readable_by_kernels(item->arguments[2], item->arguments[1] * 8, "the seams' sums");
    }
    for (uint64_t i = 0; status == 0 && i < item->arguments[1]; i++) {
        for (int byte = 0; status == 0 && byte < 8; byte++) {
            if (seams[i].address[byte] != 0) {
                status = in_device_memory(seams[i].address[byte], 1, "a seam");
            }
        }
    }
    return status;
}

static int check_stitches(const work *item) {
    const mx_stitch_record *records = (const mx_stitch_record *)(uintptr_t)item->arguments[0];
    int status = readable_by_kernels(item->arguments[0], item->grid * sizeof *records, "the records");
    for (unsigned i = 0; status == 0 && i < item->grid; i++) {
        status = readable_by_kernels(records[i].from, records[i].bytes, "a stitch's source");
        if (status == 0) {
            status = in_device_memory(records[i].to, records[i].bytes, "a stitch's destination");
        }
    }
    return status;
}

static void sum_tiles(const work *item) {
    const mx_tile *tiles = (const mx_tile *)(uintptr_t)item->arguments[0];
    uint64_t *sums = (uint64_t *)(uintptr_t)item->arguments[1];
    for (unsigned block = 0; block < item->grid; block++) {
        uint64_t sum = 0;
        for (uint32_t thread = 0; thread < item->block; thread++) {
            sum += mx_tile_lane(tiles + block, thread, item->block);
        }
        sums[block] = sum;
    }
}

static void sum_seams(const work *item) {
    const mx_seam *seams = (const mx_seam *)(uintptr_t)item->arguments[0];
    uint64_t *sums = (uint64_t *)(uintptr_t)item->arguments[2];
    for (uint64_t at = 0; at < (uint64_t)item->grid * item->block; at++) {
        if (at < item->arguments[1]) {
            sums[at] = mx_seam_value(seams + at);
        }
    }
}

static void stitch(const work *item) {
    const mx_stitch_record *records = (const mx_stitch_record *)(uintptr_t)item->arguments[0];
    for (unsigned block = 0; block < item->grid; block++) {
        for (uint32_t thread = 0; thread < item->block; thread++) {
            mx_stitch_lane(records + block, thread, item->block);
        }
    }
}

void run_kernel(work *item) {
    stream *own = item->stream;
    if (own->error != 0) {
        return;
    }
    own->error = injected_later("launch");
    if (own->error == 0) {
        own->error = item->kernel == kernels[0].name   ? check_tiles(item)
                     : item->kernel == kernels[1].name ? check_seams(item)
                                                       : check_stitches(item);
    }
    if (own->error != 0) {
        return;
    }
    pthread_mutex_unlock(&lock);
    if (item->kernel == kernels[0].name) {
        sum_tiles(item);
    } else if (item->kernel == kernels[1].name) {
        sum_seams(item);
    } else {
        stitch(item);
    }
    pthread_mutex_lock(&lock);
}

EXPORT int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, void *handle, void **arguments,
                          void **extra) {
    FAULT("cuLaunchKernel");
    const kernel *launched = function;
    if (grid_x == 0 || grid_x > 0x7FFFFFFFu || grid_y != 1 || grid_z != 1 || block_x != MX_BLOCK_THREADS ||
        block_y != 1 || block_z != 1 || shared != 0 || extra != NULL) {
        return MX_CUDA_INVALID_VALUE;
    }
    work *item = calloc(1, sizeof *item);
    item->run = run_kernel;
    item->kernel = launched->name;
    item->grid = grid_x;
    item->block = block_x;
    for (int i = 0; i < launched->parameters; i++) {
        memcpy(&item->arguments[i], arguments[i], 8);
    }
    pthread_mutex_lock(&lock);
    count.launches++;
    int status = enqueue(handle, item);
    pthread_mutex_unlock(&lock);
    return status;
}
