// The part of cuBLAS that PyTorch calls: products are counted and not made.
#include "null_gpu.h"

#include <cstdlib>

struct Handle {
  void *stream = nullptr;
  int math_mode = 0, pointer_mode = 0;
};
static Handle *handle_of(void *handle) { return static_cast<Handle *>(handle); }

API int cublasCreate_v2(void **out) { return *out = new Handle, 0; }
API int cublasDestroy_v2(void *) { return 0; }
API int cublasSetStream_v2(void *handle, void *stream) { return handle_of(handle)->stream = stream, 0; }
API int cublasSetWorkspace_v2(void *, void *, size_t) { return 0; }
API int cublasGetMathMode(void *handle, int *out) { return *out = handle_of(handle)->math_mode, 0; }
API int cublasSetMathMode(void *handle, int value) { return handle_of(handle)->math_mode = value, 0; }
API int cublasGetPointerMode_v2(void *handle, int *out) { return *out = handle_of(handle)->pointer_mode, 0; }
API int cublasSetPointerMode_v2(void *handle, int value) { return handle_of(handle)->pointer_mode = value, 0; }
#define PRODUCT(name) \
  API int name(void *handle, ...) { return null_gpu_launch(handle_of(handle)->stream), 0; }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
API size_t cublasLtGetVersion() { return 130000; }
#define DESCRIPTION(name)                                                                     \
  API int name##Create(void **out, ...) { return *out = malloc(64), 0; }                      \
  API int name##Destroy(void *description) { return free(description), 0; }                   \
  API int name##SetAttribute(void *, int, const void *, size_t) { return 0; }
DESCRIPTION(cublasLtMatmulDesc)
DESCRIPTION(cublasLtMatmulPreference)
DESCRIPTION(cublasLtMatrixLayout)
struct Choice {  // cublasLtMatmulHeuristicResult_t
  unsigned long algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
API int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, Choice *out, int *num) {
  return *out = {}, *num = 1, 0;
}
API int cublasLtMatmul(void *, void *, const void *, const void *, void *, const void *, void *, const void *, const void *,
                       void *, void *, void *, const void *, void *, size_t, void *stream) {
  return null_gpu_launch(stream), 0;
}
