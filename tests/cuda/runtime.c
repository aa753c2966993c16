/* The functions of the CUDA runtime from which ONNX Runtime's CUDA provider reads a result.

   Memory is the host's, streams and events are one address, and no kernel is ever run. All other
   functions of the library return 0, which is cudaSuccess; tests/cuda/stand_in.py writes them. */
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
static int any_handle;

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaMemGetInfo(size_t *unused, size_t *total) {
  *unused = 1ull << 33;
  *total = 1ull << 34;
  return 0;
}

/* cudaDeviceProp of CUDA 13, by offset; the fields are those that the provider reads. */
int cudaGetDeviceProperties(char *properties, int device) {
  memset(properties, 0, 1008);
  strcpy(properties, "placement only");     /* name */
  *(u64 *)(properties + 288) = 1ull << 34;  /* totalGlobalMem */
  *(u64 *)(properties + 296) = 49152;       /* sharedMemPerBlock */
  *(int *)(properties + 304) = 65536;       /* regsPerBlock */
  *(int *)(properties + 308) = 32;          /* warpSize */
  *(int *)(properties + 320) = 1024;        /* maxThreadsPerBlock */
  *(int *)(properties + 360) = 8;           /* major; minor, at 364, is 0: an A100 */
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;     /* threads of a block */
    case 10: *value = 32; break;      /* warp */
    case 16: *value = 108; break;     /* multiprocessors */
    case 75: *value = 8; break;       /* compute capability, major */
    case 76: *value = 0; break;       /* compute capability, minor */
    case 97: *value = 166912; break;  /* shared memory that a block may opt into */
    default: *value = 1;
  }
  return 0;
}

int cudaMalloc(void **address, size_t size) {
  *address = aligned_alloc(256, (size + 511) / 256 * 256);
  return 0;
}
int cudaMallocHost(void **address, size_t size) { return cudaMalloc(address, size); }
int cudaHostAlloc(void **address, size_t size, unsigned flags) { return cudaMalloc(address, size); }
int cudaMallocAsync(void **address, size_t size, void *stream) { return cudaMalloc(address, size); }
int cudaMallocFromPoolAsync(void **address, size_t size, void *pool, void *stream) {
  return cudaMalloc(address, size);
}
int cudaFree(void *address) { free(address); return 0; }
int cudaFreeHost(void *address) { free(address); return 0; }
int cudaFreeAsync(void *address, void *stream) { free(address); return 0; }
int cudaMemcpy(void *target, const void *source, size_t size, int kind) {
  memcpy(target, source, size);
  return 0;
}
int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *stream) {
  memcpy(target, source, size);
  return 0;
}
int cudaMemset(void *target, int value, size_t size) { memset(target, value, size); return 0; }
int cudaMemsetAsync(void *target, int value, size_t size, void *stream) {
  memset(target, value, size);
  return 0;
}
int cudaPointerGetAttributes(int *attributes, const void *address) {
  memset(attributes, 0, 32);
  attributes[0] = 2; /* cudaMemoryTypeDevice */
  *(const void **)(attributes + 2) = address;
  return 0;
}

int cudaStreamCreate(void **stream) { *stream = &any_handle; return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = &any_handle; return 0; }

/* Counted, for tests/cuda/graphs.py. */
int captures;
int launches;
int capture_mode;
int cudaStreamBeginCapture(void *stream, int mode) {
  captures++;
  capture_mode = mode;
  return 0;
}
int cudaGraphLaunch(void *graph, void *stream) { launches++; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { *graph = &any_handle; return 0; }
int cudaGraphInstantiate(void **executable, void *graph, u64 flags) {
  *executable = &any_handle;
  return 0;
}
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaEventCreate(void **event) { *event = &any_handle; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = &any_handle; return 0; }
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) {
  *milliseconds = 1;
  return 0;
}
int cudaMemPoolCreate(void **pool, void *properties) { *pool = &any_handle; return 0; }

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int block_size, size_t shared_memory, unsigned flags) {
  *blocks = 1;
  return 0;
}
int cudaGetDriverEntryPointByVersion(
    const char *symbol, void **function, unsigned version, u64 flags, int *status) {
  *function = 0;
  if (status) *status = 1; /* cudaDriverEntryPointSymbolNotFound */
  return 0;
}
const char *cudaGetErrorString(int error) { return "none"; }
const char *cudaGetErrorName(int error) { return "none"; }
void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
