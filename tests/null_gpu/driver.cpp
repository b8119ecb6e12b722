// The part of CUDA's driver that PyTorch and Triton call: modules that hold nothing, kernels that are counted.
#include "null_gpu.h"

#include <cuda.h>

static int something;  // what handles point to

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int *out) { return *out = 13000, CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult, const char **out) { return *out = "an error of the null gpu", CUDA_SUCCESS; }

// -------------------------------------------------------------------------------------------------- device and context

API CUresult cuDeviceGet(CUdevice *out, int) { return *out = 0, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int *out) { return *out = null_gpu_num_devices(), CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int *out, CUdevice_attribute attribute, CUdevice) {
  return *out = null_gpu_attribute(attribute), CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext *out) { return *out = reinterpret_cast<CUcontext>(&something), CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice) { return cuCtxGetCurrent(out); }
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice *out) { return *out = 0, CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t *out, CUlimit) { return *out = 0, CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr address) {
  if (!null_gpu_holds(reinterpret_cast<void *>(address))) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *static_cast<CUdeviceptr *>(out) = address;
  return CUDA_SUCCESS;
}

// ------------------------------------------------------------------------------------------------- modules and kernels

API CUresult cuModuleLoad(CUmodule *out, const char *) {
  return *out = reinterpret_cast<CUmodule>(&something), CUDA_SUCCESS;
}
API CUresult cuModuleLoadData(CUmodule *out, const void *) { return cuModuleLoad(out, nullptr); }
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction *out, CUmodule, const char *) {
  return *out = reinterpret_cast<CUfunction>(&something), CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int *out, CUfunction_attribute attribute, CUfunction) {
  *out = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                            CUstream stream, void **, void **) {
  return null_gpu_launch(stream), CUDA_SUCCESS;
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction, void **, void **) {
  return null_gpu_launch(how->hStream), CUDA_SUCCESS;
}
