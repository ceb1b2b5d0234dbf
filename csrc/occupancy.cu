#include "occupancy.h"

namespace dsd::cuda {

namespace {

// A power of two: the sum is joined by halves.
constexpr int kSumThreads = 1024;

// Maximum of floats by integer atomics: positive floats order like ints, negative ones like
// unsigned ints reversed, and either comparison leaves the other kind right.
__device__ __forceinline__ void atomic_max(float* address, float value) {
    value += 0.0f;  // -0 becomes +0: as an int it would be the smallest of all
    if (value >= 0.0f) {
        atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
    } else {
        atomicMin(reinterpret_cast<unsigned int*>(address), __float_as_uint(value));
    }
}

// One thread takes one value to the peak of its cell.
__global__ void __launch_bounds__(kBlock) peaks_kernel(const OccupancyUpdateParams p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (i < p.n_values && occupancy::counts(p, i)) atomic_max(p.peaks + p.indices[i], p.values[i]);
}

// One thread updates one cell from its peak.
__global__ void __launch_bounds__(kBlock) update_kernel(const OccupancyUpdateParams p) {
    const int64_t cell = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (cell < p.n_cells) {
        p.occs[cell] = occupancy::updated(p.occs[cell], p.peaks[cell], p.decay);
    }
}

// One block sums the whole grid in a fixed order; writes the threshold.
__global__ void __launch_bounds__(kSumThreads) threshold_kernel(const OccupancyThresholdParams p) {
    __shared__ double sums[kSumThreads];
    double sum = 0;
    for (int64_t cell = threadIdx.x; cell < p.n_cells; cell += kSumThreads) sum += p.occs[cell];
    sums[threadIdx.x] = sum;
    for (unsigned int half = kSumThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *p.threshold = occupancy::threshold(p, sums[0]);
}

// One thread compares one cell with the threshold.
__global__ void __launch_bounds__(kBlock) binary_kernel(const OccupancyThresholdParams p) {
    const int64_t cell = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (cell < p.n_cells) p.binary[cell] = p.occs[cell] > *p.threshold;
}

}  // namespace

void occupancy_update(const OccupancyUpdateParams& p, void* stream) {
    if (p.n_values == 0 || p.n_cells == 0) return;
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    peaks_kernel<<<blocks_for(p.n_values), kBlock, 0, cuda_stream>>>(p);
    check(cudaGetLastError(), "occupancy_update: peaks");
    update_kernel<<<blocks_for(p.n_cells), kBlock, 0, cuda_stream>>>(p);
    check(cudaGetLastError(), "occupancy_update: cells");
}

void occupancy_threshold(const OccupancyThresholdParams& p, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    threshold_kernel<<<1, kSumThreads, 0, cuda_stream>>>(p);
    check(cudaGetLastError(), "occupancy_threshold: sum");
    binary_kernel<<<blocks_for(p.n_cells), kBlock, 0, cuda_stream>>>(p);
    check(cudaGetLastError(), "occupancy_threshold: binary");
}

}  // namespace dsd::cuda
