#include "field_kernels.cuh"

namespace dsd::cuda {

void field_half(const FieldParams& params, bool normals, bool backward, void* stream) {
    launch_for<__half>(params, normals, backward, stream);
}

}  // namespace dsd::cuda
