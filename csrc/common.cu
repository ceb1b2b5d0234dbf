#include "common.h"

#include <stdexcept>
#include <string>

namespace dsd::cuda {

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::string message =
        std::string(what) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status);
    if (status == cudaErrorNoKernelImageForDevice) {
        message += ". This build holds code for " DSD_CUDA_ARCHS
                   "; rebuild with DSD_CUDA_ARCHS set to your GPU's architecture (8.9, say).";
    } else if (status == cudaErrorInsufficientDriver) {
        message += ". Update the NVIDIA driver, or build with an older CUDA toolkit (CUDA_HOME).";
    }
    throw std::runtime_error(message);
}

// Makes `device` current and returns the one that was.
int set_device(int device) {
    int previous = 0;
    check(cudaGetDevice(&previous), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    return previous;
}

// Runs in a destructor: an error here has shown itself in the launch already.
void restore_device(int device) { (void)cudaSetDevice(device); }

int runtime_version() {
    int version = 0;
    check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
    return version;
}

}  // namespace dsd::cuda
