// The kernels; `python tools/make_ptx.py` makes mxcore/cuda/cuda_kernels.ptx of them, which the driver compiles where
// it runs.
#include "cuda_kernels.h"

// One block a tile: sums[block] is its words' sum. Each sum is written by one thread, so that none has to be cleared.
extern "C" __global__ void __launch_bounds__(MX_BLOCK_THREADS) mx_sum_tiles(const mx_tile *tiles, uint64_t *sums) {
    __shared__ uint64_t of_warp[MX_BLOCK_THREADS / 32];
    mx_tile tile = tiles[blockIdx.x];
    uint64_t sum = mx_tile_lane(&tile, threadIdx.x, MX_BLOCK_THREADS);
    for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_down_sync(0xFFFFFFFFu, (unsigned long long)sum, distance);
    }
    if (threadIdx.x % 32 == 0) {
        of_warp[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < MX_BLOCK_THREADS / 32; warp++) {
            sum += of_warp[warp];
        }
        sums[blockIdx.x] = sum;
    }
}

// One thread a seam.
extern "C" __global__ void __launch_bounds__(MX_BLOCK_THREADS)
    mx_sum_seams(const mx_seam *seams, uint64_t count, uint64_t *sums) {
    uint64_t at = (uint64_t)blockIdx.x * MX_BLOCK_THREADS + threadIdx.x;
    if (at < count) {
        sums[at] = mx_seam_value(seams + at);
    }
}

// One block a record: many small copies in one launch.
extern "C" __global__ void __launch_bounds__(MX_BLOCK_THREADS) mx_stitch(const mx_stitch_record *records) {
    mx_stitch_record record = records[blockIdx.x];
    mx_stitch_lane(&record, threadIdx.x, MX_BLOCK_THREADS);
}
