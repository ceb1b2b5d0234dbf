#include "field_kernels.cuh"

namespace dsd::cuda {
namespace {

void choose(const FieldParams& params, bool normals, bool backward, void* stream) {
    if (params.half_table) {
        field_half(params, normals, backward, stream);
    } else {
        launch_for<float>(params, normals, backward, stream);
    }
}

}  // namespace

int64_t field_workspace(int64_t n_points, int n_active, int n_features, bool half_table,
                        bool normals) {
    const int64_t n = n_points < kChunk ? n_points : kChunk;
    const int64_t packs = n_active * n_features * (normals ? 2 : 1) * (half_table ? 2 : 4);
    return n * packs + round_up_to_4(n) * (normals ? 4 : 1) * sizeof(float);
}

int64_t field_sums(int64_t n_params) {
    return kMostPartials * kPartial * sizeof(float) + FixedSums::bytes(n_params);
}

void field_fwd(const FieldParams& params, void* stream) {
    choose(params, params.normal != nullptr, false, stream);
}

void field_bwd(const FieldParams& params, void* stream) {
    choose(params, params.grad_normal != nullptr, true, stream);
}

}  // namespace dsd::cuda
