/* Host side of the digest kernels: stretches of device memory → tiles and seams → launches → sums. */
#ifndef MX_CUDA_PLAN_H
#define MX_CUDA_PLAN_H

#include "cuda_driver.h"
#include "cuda_kernels.h"

#define MX_PLAN_TILES 16384 /* of a launch: 1 GiB */
#define MX_PLAN_SEAMS 2048

/* What lies in pinned memory, which kernels read and write where it is. */
typedef struct {
    mx_tile tiles[MX_PLAN_TILES];
    mx_seam seams[MX_PLAN_SEAMS];
    uint64_t tile_sums[MX_PLAN_TILES];
    uint64_t seam_sums[MX_PLAN_SEAMS];
} mx_plan_memory;

typedef struct {
    const mx_cuda_table *cuda;
    mx_stream stream;
    mx_function sum_tiles, sum_seams;
    mx_plan_memory *memory;
    uint32_t *tile_groups, *seam_groups; /* whose sum: MX_PLAN_TILES and MX_PLAN_SEAMS of them */
    uint64_t *sums;                      /* one a group */
    uint32_t tiles, seams;
} mx_plan;

/* Runs what was planned, and adds it to the sums. Returns the driver's status; *call says of what. */
static int mx_plan_run(mx_plan *plan, const char **call) {
    const mx_cuda_table *cuda = plan->cuda;
    uint64_t tiles = (uint64_t)(uintptr_t)plan->memory->tiles, seams = (uint64_t)(uintptr_t)plan->memory->seams;
    uint64_t tile_sums = (uint64_t)(uintptr_t)plan->memory->tile_sums;
    uint64_t seam_sums = (uint64_t)(uintptr_t)plan->memory->seam_sums, count = plan->seams;
    void *of_tiles[] = {&tiles, &tile_sums}, *of_seams[] = {&seams, &count, &seam_sums};
    int status = MX_CUDA_SUCCESS;
    *call = "cuLaunchKernel";
    if (plan->tiles > 0) {
        status = (int)cuda->launch(plan->sum_tiles, plan->tiles, 1, 1, MX_BLOCK_THREADS, 1, 1, 0, plan->stream,
                                   of_tiles, NULL);
    }
    if (status == MX_CUDA_SUCCESS && plan->seams > 0) {
        unsigned blocks = (plan->seams + MX_BLOCK_THREADS - 1) / MX_BLOCK_THREADS;
        status =
            (int)cuda->launch(plan->sum_seams, blocks, 1, 1, MX_BLOCK_THREADS, 1, 1, 0, plan->stream, of_seams, NULL);
    }
    *call = status == MX_CUDA_SUCCESS ? "cuStreamSynchronize" : *call;
    int waited = (int)cuda->stream_synchronize(plan->stream); /* also after a failure: a kernel may be under way */
    status = status == MX_CUDA_SUCCESS ? waited : status;
    for (uint32_t i = 0; status == MX_CUDA_SUCCESS && i < plan->tiles; i++) {
        plan->sums[plan->tile_groups[i]] += plan->memory->tile_sums[i];
    }
    for (uint32_t i = 0; status == MX_CUDA_SUCCESS && i < plan->seams; i++) {
        plan->sums[plan->seam_groups[i]] += plan->memory->seam_sums[i];
    }
    plan->tiles = plan->seams = 0;
    return status;
}

typedef struct {
    mx_seam word; /* the word that is not full yet */
    uint64_t bytes;
    uint32_t group;
} mx_plan_group;

static int mx_plan_seam(mx_plan *plan, mx_plan_group *group, const char **call) {
    int status = plan->seams < MX_PLAN_SEAMS ? MX_CUDA_SUCCESS : mx_plan_run(plan, call);
    plan->memory->seams[plan->seams] = group->word;
    plan->seam_groups[plan->seams++] = group->group;
    memset(&group->word, 0, sizeof group->word);
    return status;
}

static int mx_plan_segment(mx_plan *plan, mx_plan_group *group, uint64_t address, uint64_t length, const char **call) {
    int status = MX_CUDA_SUCCESS;
    while (status == MX_CUDA_SUCCESS && length > 0 && group->bytes % 8 != 0) {
        group->word.address[group->bytes % 8] = address++;
        length--;
        if (++group->bytes % 8 == 0) {
            status = mx_plan_seam(plan, group, call);
        }
    }
    for (uint64_t words = length / 8; status == MX_CUDA_SUCCESS && words > 0;) {
        uint64_t take = words < MX_TILE_WORDS ? words : MX_TILE_WORDS;
        status = plan->tiles < MX_PLAN_TILES ? MX_CUDA_SUCCESS : mx_plan_run(plan, call);
        plan->memory->tiles[plan->tiles] = (mx_tile){address, group->bytes / 8, take};
        plan->tile_groups[plan->tiles++] = group->group;
        address += 8 * take;
        group->bytes += 8 * take;
        words -= take;
    }
    for (uint64_t left = length % 8; status == MX_CUDA_SUCCESS && left > 0 && group->bytes % 8 < 8; left--) {
        group->word.index = group->bytes / 8;
        group->word.address[group->bytes % 8] = address++;
        group->bytes++;
        if (group->bytes % 8 == 0) {
            status = mx_plan_seam(plan, group, call);
        }
    }
    return status;
}

/* mixsum-64 of each group of segments into `digests` (8 bytes little-endian each). Needs the context to be current. */
static int mx_plan_digests(mx_plan *plan, const uint64_t *addresses, const uint64_t *lengths, const uint64_t *starts,
                           size_t groups, uint64_t *bytes, const char **call) {
    int status = MX_CUDA_SUCCESS;
    for (size_t group = 0; status == MX_CUDA_SUCCESS && group < groups; group++) {
        mx_plan_group state = {.group = (uint32_t)group};
        for (uint64_t at = starts[group]; status == MX_CUDA_SUCCESS && at < starts[group + 1]; at++) {
            status = mx_plan_segment(plan, &state, addresses[at], lengths[at], call);
        }
        if (status == MX_CUDA_SUCCESS && state.bytes % 8 != 0) {
            status = mx_plan_seam(plan, &state, call);
        }
        bytes[group] = state.bytes;
    }
    return status == MX_CUDA_SUCCESS ? mx_plan_run(plan, call) : status;
}

#endif
