// The stream that torch works on, and errors of launches.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "../../common/tensor.h"

// Declared by torch's shim.h only in builds for CUDA torch; defined in libtorch_cuda.so of every version from 2.10 on.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

// In the CPU library, which keeps the one list of kernels that ran.
extern "C" void mmk_trace_record(const char* op, const char* kernel);

namespace mmk {

// Makes x's device current for the scope and holds the stream that kernels on x must go to.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

}  // namespace mmk
