#include "common.h"

#include <stdexcept>
#include <string>

namespace dsd::cuda {

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::string message = std::string(what) + ": " + cudaGetErrorName(status) + ": " +
                          cudaGetErrorString(status);
    if (status == cudaErrorNoKernelImageForDevice) {
        message +=
            ". This build holds code for sm_ " DSD_CUDA_ARCHS
            "; rebuild with DSD_CUDA_ARCHS set to your GPU's architecture (8.9, say).";
    } else if (status == cudaErrorInsufficientDriver) {
        message += ". Update the NVIDIA driver, or build with an older CUDA toolkit (CUDA_HOME).";
    }
    throw std::runtime_error(message);
}

void set_device(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
}

int runtime_version() {
    int version = 0;
    check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
    return version;
}

}  // namespace dsd::cuda
