// A GPU that computes nothing: the part of CUDA's runtime that PyTorch calls; beside it the driver's and cuBLAS's.
//
// Memory of the device is memory of the host, and copies are made at once. Kernels and products are counted and not run.
// A capture collects what is launched on its streams; whatever CUDA forbids meanwhile fails here too. See emulation.py.
#include "null_gpu.h"

#include <driver_types.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace {

struct Stream;
struct Graph {
  long kernels = 0;
  std::vector<Stream *> streams = {};  // that its capture is under way on
};
struct Stream {
  Graph *graph = nullptr;  // of the capture that is under way on it
  unsigned long long capture = 0;
};
struct Event {
  Graph *graph = nullptr;  // of the capture that it was recorded in
  unsigned long long capture = 0;
};
struct Block {
  size_t size;
  cudaMemoryType type;
};

constexpr size_t kMemory = 150'000'000'000;
constexpr auto kInvalidated = static_cast<cudaError_t>(901);  // cudaErrorStreamCaptureInvalidated
constexpr auto kInCapture = static_cast<cudaError_t>(900);  // cudaErrorStreamCaptureUnsupported

std::atomic<long> kernels, replays, kernels_in_replays, copies, waits, allocations, captures;
std::recursive_mutex mutex;
std::map<char *, Block> blocks;
size_t used = 0;
thread_local int captures_here = 0;                    // begun by this thread
thread_local auto mode = cudaStreamCaptureModeGlobal;  // of this thread
thread_local cudaError_t last_error = cudaSuccess;
thread_local bool invalid = false;  // has this thread's capture met what no capture may contain?

cudaError_t fail(cudaError_t error, const char *what) {
  if (error == kInCapture) {
    fprintf(stderr, "null gpu: %s in a capture\n", what);
    invalid = captures_here > 0;
  }
  return last_error = error;
}

// May this thread not make calls that other streams could notice, such as allocating?
bool is_restricted() { return captures_here > 0 && mode != cudaStreamCaptureModeRelaxed; }

Stream *stream_of(void *handle) {
  static Stream of_default;  // and the per-thread one: small numbers
  return reinterpret_cast<size_t>(handle) < 16 ? &of_default : static_cast<Stream *>(handle);
}

void join(Stream *stream, Graph *graph, unsigned long long capture) {
  stream->graph = graph, stream->capture = capture;
  graph->streams.push_back(stream);
}

cudaError_t launch(void *stream) {
  if (Graph *graph = stream_of(stream)->graph)
    ++graph->kernels;
  else
    ++kernels;
  return cudaSuccess;
}

void *allocate(size_t size, cudaMemoryType type) {
  size = size ? size : 1;
  void *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  std::lock_guard<std::recursive_mutex> lock(mutex);
  blocks[static_cast<char *>(memory)] = {size, type};
  if (type == cudaMemoryTypeDevice) used += size;
  return memory;
}

cudaError_t release(void *memory) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto found = blocks.find(static_cast<char *>(memory));
  if (found == blocks.end()) return cudaSuccess;
  if (found->second.type == cudaMemoryTypeDevice) used -= found->second.size;
  munmap(memory, found->second.size);
  blocks.erase(found);
  return cudaSuccess;
}

cudaMemoryType type_of(const void *address) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto *place = static_cast<char *>(const_cast<void *>(address));
  auto after = blocks.upper_bound(place);
  if (after == blocks.begin()) return cudaMemoryTypeUnregistered;
  auto &[begin, block] = *--after;
  return place < begin + block.size ? block.type : cudaMemoryTypeUnregistered;
}

cudaError_t wait_for(bool forbidden, const char *what) {
  if (forbidden || is_restricted()) return fail(kInCapture, what);
  ++waits;
  return cudaSuccess;
}

}  // namespace

int null_gpu_launch(void *stream) { return launch(stream); }
bool null_gpu_holds(const void *address) { return type_of(address) != cudaMemoryTypeUnregistered; }

// ------------------------------------------------------------------------------------------------------------- counts

// {kernels, replays, kernels in replays, copies, waits, allocations, captures} since the last call.
API void null_gpu_counts(long *out) {
  std::atomic<long> *all[] = {&kernels, &replays, &kernels_in_replays, &copies, &waits, &allocations, &captures};
  for (int i = 0; i < 7; ++i) out[i] = all[i]->exchange(0);
}

// ------------------------------------------------------------------------------------------------------------ kernels

struct Launch {
  dim3 grid, block;
  size_t shared;
  void *stream;
};
static thread_local std::vector<Launch> configured;

API void **__cudaRegisterFatBinary(void *) {
  static void *handle[2];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void **) {}
API void __cudaUnregisterFatBinary(void **) {}
API char __cudaInitModule(void **) { return 1; }
API void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
API void __cudaRegisterFunction(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *) {}
API cudaError_t __cudaGetKernel(void **kernel, const void *function) {
  *kernel = const_cast<void *>(function);
  return cudaSuccess;
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configured.push_back({grid, block, shared, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
  Launch &top = configured.back();
  *grid = top.grid, *block = top.block, *shared = top.shared, *stream = top.stream;
  configured.pop_back();
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(void *, dim3, dim3, void **, size_t, void *stream) { return launch(stream); }
API cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, void *stream) { return launch(stream); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *, void **) { return launch(how->stream); }
API cudaError_t cudaLaunchHostFunc(void *, void (*function)(void *), void *data) {
  function(data);
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *) {
  *out = {};
  out->maxThreadsPerBlock = 1024, out->numRegs = 32, out->binaryVersion = out->ptxVersion = 90;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *, int, size_t, unsigned) {
  *out = 2;
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void **out, const void *) {
  static char symbol[1 << 16];
  *out = symbol;
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

// ------------------------------------------------------------------------------------------------- device, an H200's

API cudaError_t cudaGetDevice(int *out) { return *out = 0, cudaSuccess; }
API cudaError_t cudaSetDevice(int) { return cudaSuccess; }
int null_gpu_num_devices() {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  return visible && !*visible ? 0 : 1;
}
API cudaError_t cudaGetDeviceCount(int *out) {
  *out = null_gpu_num_devices();
  return *out ? cudaSuccess : fail(cudaErrorNoDevice, "cudaGetDeviceCount");
}
API cudaError_t cudaDriverGetVersion(int *out) { return *out = 13000, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *out) { return *out = 13000, cudaSuccess; }
API cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  return error == kInCapture ? "operation not permitted when stream is capturing" : "an error of the null gpu";
}
API const char *cudaGetErrorName(cudaError_t) { return "cudaErrorNullGpu"; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int) {
  *out = {};
  strcpy(out->name, "Null GPU");
  out->totalGlobalMem = kMemory, out->major = 9, out->minor = 0, out->multiProcessorCount = 132, out->warpSize = 32;
  out->sharedMemPerBlock = 49152, out->sharedMemPerBlockOptin = 232448, out->sharedMemPerMultiprocessor = 233472;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536, out->totalConstMem = 65536, out->l2CacheSize = 60 << 20;
  out->maxThreadsPerBlock = 1024, out->maxThreadsPerMultiProcessor = 2048;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024, out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647, out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->unifiedAddressing = out->concurrentKernels = 1;
  return cudaSuccess;
}
int null_gpu_attribute(int attribute) {
  static const std::map<int, int> values = {{cudaDevAttrMultiProcessorCount, 132},
                                            {cudaDevAttrComputeCapabilityMajor, 9},
                                            {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
                                            {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
                                            {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
                                            {cudaDevAttrMaxRegistersPerBlock, 65536},
                                            {cudaDevAttrWarpSize, 32},
                                            {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
                                            {cudaDevAttrMaxThreadsPerBlock, 1024},
                                            {cudaDevAttrMaxGridDimX, 2147483647},
                                            {cudaDevAttrMaxGridDimY, 65535}};
  auto found = values.find(attribute);
  return found == values.end() ? 0 : found->second;
}
API cudaError_t cudaDeviceGetAttribute(int *out, cudaDeviceAttr attribute, int) {
  return *out = null_gpu_attribute(attribute), cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() { return wait_for(captures_here > 0, "cudaDeviceSynchronize"); }
API cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **out, unsigned, unsigned long long, int *status) {
  if (status) *status = 1;  // not there
  return *out = nullptr, cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------------- memory

API cudaError_t cudaMalloc(void **out, size_t size) {
  if (is_restricted()) return fail(kInCapture, "cudaMalloc");
  if (used + size > kMemory) return *out = nullptr, fail(cudaErrorMemoryAllocation, "cudaMalloc");
  ++allocations;
  return *out = allocate(size, cudaMemoryTypeDevice), cudaSuccess;
}
API cudaError_t cudaFree(void *memory) {
  return memory && is_restricted() ? fail(kInCapture, "cudaFree") : release(memory);
}
API cudaError_t cudaHostAlloc(void **out, size_t size, unsigned) {
  if (is_restricted()) return fail(kInCapture, "cudaHostAlloc");
  return *out = allocate(size, cudaMemoryTypeHost), cudaSuccess;
}
API cudaError_t cudaFreeHost(void *memory) {
  return is_restricted() ? fail(kInCapture, "cudaFreeHost") : release(memory);
}
API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { return *total = kMemory, *free = kMemory - used, cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *address) {
  *out = {};
  out->type = type_of(address), out->device = out->type == cudaMemoryTypeDevice ? 0 : -1;
  out->devicePointer = out->hostPointer = const_cast<void *>(address);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, void *stream) {
  bool pageable = type_of(to) == cudaMemoryTypeUnregistered || type_of(from) == cudaMemoryTypeUnregistered;
  if (Graph *graph = stream_of(stream)->graph) {
    if (pageable) return fail(kInCapture, "a copy of pageable memory");
    return ++graph->kernels, cudaSuccess;
  }
  ++copies;
  return memcpy(to, from, size), cudaSuccess;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
  ++copies;
  cudaError_t error = wait_for(false, "cudaMemcpy");
  return error == cudaSuccess ? (memcpy(to, from, size), error) : error;
}
API cudaError_t cudaMemsetAsync(void *to, int value, size_t size, void *stream) {
  if (!stream_of(stream)->graph) memset(to, value, size);
  return launch(stream);
}

// -------------------------------------------------------------------------------------------------- streams and events

API cudaError_t cudaStreamCreateWithPriority(void **out, unsigned, int) { return *out = new Stream, cudaSuccess; }
API cudaError_t cudaStreamCreate(void **out) { return *out = new Stream, cudaSuccess; }
API cudaError_t cudaStreamDestroy(void *) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(void *, int *out) { return *out = 0, cudaSuccess; }
API cudaError_t cudaStreamSynchronize(void *stream) {
  return wait_for(stream_of(stream)->graph != nullptr, "cudaStreamSynchronize");
}
API cudaError_t cudaStreamQuery(void *stream) {
  return stream_of(stream)->graph ? fail(kInCapture, "cudaStreamQuery") : cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(void *stream, void *event, unsigned) {
  auto *recorded = static_cast<Event *>(event);
  Stream *waiting = stream_of(stream);
  if (recorded->graph && !waiting->graph) join(waiting, recorded->graph, recorded->capture);
  return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(void **out, unsigned) { return *out = new Event, cudaSuccess; }
API cudaError_t cudaEventCreate(void **out) { return *out = new Event, cudaSuccess; }
API cudaError_t cudaEventDestroy(void *) { return cudaSuccess; }
API cudaError_t cudaEventRecord(void *event, void *stream) {
  Stream *at = stream_of(stream);
  *static_cast<Event *>(event) = {at->graph, at->capture};
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(void *event, void *stream, unsigned) { return cudaEventRecord(event, stream); }
API cudaError_t cudaEventQuery(void *event) {
  bool forbidden = static_cast<Event *>(event)->graph || is_restricted();
  return forbidden ? fail(kInCapture, "cudaEventQuery") : cudaSuccess;
}
API cudaError_t cudaEventSynchronize(void *event) {
  return wait_for(static_cast<Event *>(event)->graph != nullptr, "cudaEventSynchronize");
}
API cudaError_t cudaEventElapsedTime(float *out, void *, void *) { return *out = 1.0f, cudaSuccess; }

// ----------------------------------------------------------------------------------------------------------- captures

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *other) {
  std::swap(mode, *other);
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(void *stream, cudaStreamCaptureMode) {
  Stream *at = stream_of(stream);
  if (!stream || at->graph) return fail(kInCapture, "cudaStreamBeginCapture");
  join(at, new Graph, ++captures);
  ++captures_here;
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(void *stream, void **out) {
  Stream *at = stream_of(stream);
  *out = at->graph, --captures_here;
  std::vector<Stream *> joined = std::move(at->graph->streams);
  for (Stream *stream : joined) stream->graph = nullptr;
  if (invalid) {
    invalid = false, *out = nullptr;
    return last_error = kInvalidated;
  }
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(void *stream, int *out) { return *out = stream_of(stream)->graph ? 1 : 0, cudaSuccess; }
API cudaError_t cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph, const void **nodes,
                                         const void **edges, size_t *num_nodes) {
  Stream *at = stream_of(stream);
  *status = at->graph ? 1 : 0;
  if (id) *id = at->capture;
  if (graph) *graph = at->graph;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (num_nodes) *num_nodes = 0;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(void **out, void *graph, unsigned long long) { return *out = graph, cudaSuccess; }
API cudaError_t cudaGraphGetNodes(void *graph, void *, size_t *out) {
  return *out = static_cast<Graph *>(graph)->kernels, cudaSuccess;
}
API cudaError_t cudaGraphLaunch(void *graph, void *) {
  ++replays, kernels_in_replays += static_cast<Graph *>(graph)->kernels;
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(void *) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(void *) { return cudaSuccess; }
