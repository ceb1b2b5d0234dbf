#include "pack.cuh"

namespace dsd::cuda {

namespace {

constexpr int kScanThreads = 1024;

// One block adds up all groups, kScanThreads at a time: a picture of 512² has a thousand.
__global__ void __launch_bounds__(kScanThreads) pack_scan_kernel(const PackParams p) {
    const int64_t n_groups = pack::n_groups(p.n_rays);
    int64_t carry = 0;
    for (int64_t first = 0; first < n_groups; first += kScanThreads) {
        const int64_t group = first + threadIdx.x;
        int64_t total;
        const int64_t before =
            sum_before<kScanThreads>(group < n_groups ? p.bases[group] : 0, total);
        if (group < n_groups) p.bases[group] = carry + before;
        carry += total;
    }
    if (threadIdx.x == 0) *p.total = carry;
}

}  // namespace

void pack_scan(const PackParams& p, void* stream) {
    pack_scan_kernel<<<1, kScanThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    check(cudaGetLastError(), "pack_scan");
}

}  // namespace dsd::cuda
