/* A CUDA driver that launches nothing. It has the functions that Triton's launcher calls, refuses what the hardware would
 * refuse of a launch and of a tensor map, and keeps what it was asked for.
 * Limits: CUDA driver API, cuTensorMapEncodeTiled and cuLaunchKernelEx; CUDA C++ Programming Guide, compute capability 9.0.
 */
#include "cuda.h"
#include <stdio.h>
#include <string.h>

enum { KERNELS = 4096, LAUNCHES = 1 << 18, MOST_SHARED = 232448 };

struct launch {
  const char *kernel;
  unsigned grid[3], threads, shared;
  int dependent;
};

static char kernels[KERNELS][64];
static int known, context;
static struct launch launches[LAUNCHES];
static int launched, encoded;
static const char *problem = "";

int stub_launched(void) { return launched; }
int stub_encoded(void) { return encoded; }
const struct launch *stub_launch(int i) { return &launches[i < LAUNCHES ? i : LAUNCHES - 1]; }

static CUresult refuse(const char *why) {
  problem = why;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = problem;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  struct launch *now = &launches[launched < LAUNCHES ? launched : LAUNCHES - 1]; /* the rest is only counted */
  now->kernel = (const char *)function;
  now->grid[0] = config->gridDimX, now->grid[1] = config->gridDimY, now->grid[2] = config->gridDimZ;
  now->threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  now->shared = config->sharedMemBytes;
  now->dependent = 0;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      now->dependent = config->attrs[i].value.programmaticStreamSerializationAllowed;
  if (!now->grid[0] || !now->grid[1] || !now->grid[2] || now->grid[0] > 0x7fffffff || now->grid[1] > 65535 ||
      now->grid[2] > 65535)
    return refuse("the grid is empty or too large");
  if (!now->threads || now->threads > 1024) return refuse("a program has no threads or too many");
  if (now->shared > MOST_SHARED) return refuse("a program takes too much shared memory");
  launched++;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned spans[] = {0, 32, 64, 128};
  unsigned bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2; /* of an element; there are no others here */
  if (type != CU_TENSOR_MAP_DATA_TYPE_FLOAT32 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 &&
      type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
    return refuse("a descriptor of a dtype that no kernel has");
  if ((cuuint64_t)address % 16) return refuse("a descriptor's tensor does not lie on 16 bytes");
  if (rank < 1 || rank > 5) return refuse("a descriptor of no dims or too many");
  for (unsigned i = 0; i < rank; i++) {
    if (!sizes[i] || sizes[i] > 1ull << 32) return refuse("a descriptor's tensor is empty or too large");
    if (!box[i] || box[i] > 256 || steps[i] != 1) return refuse("a descriptor's tile has no elements or too many");
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
      return refuse("a descriptor's rows do not lie on 16 bytes, or too far apart");
    if (i + 1 < rank && strides[i] < sizes[i] * (i ? strides[i - 1] : bytes))
      return refuse("a descriptor's rows overlap");
  }
  if (swizzle > 3) return refuse("a descriptor's swizzle is none of sm_90's");
  if (box[0] * bytes % 16) return refuse("a row of a descriptor's tile is no multiple of 16 bytes");
  if (spans[swizzle] && box[0] * bytes > spans[swizzle]) return refuse("a row of a descriptor's tile is too long");
  memset(map, 0, sizeof *map);
  encoded++;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  char *kernel = kernels[known++ % KERNELS];
  snprintf(kernel, sizeof kernels[0], "%s", name);
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR           ? 9
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR         ? 0
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? MOST_SHARED
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK          ? 65536
           : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT             ? 132
           : attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE                        ? 32
                                                                               : 1;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer; /* every pointer is the device's */
  return CUDA_SUCCESS;
}

#define NOTHING(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
#define GIVES(name, type, value, ...) \
  CUresult name(type *to, ##__VA_ARGS__) { return *to = value, CUDA_SUCCESS; }

NOTHING(cuInit, unsigned flags)
NOTHING(cuCtxSetCurrent, CUcontext to)
NOTHING(cuCtxSetLimit, CUlimit limit, size_t to)
NOTHING(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int to)
NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache to)
NOTHING(cuModuleUnload, CUmodule module)
GIVES(cuDriverGetVersion, int, 12080)
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDeviceGet, CUdevice, ordinal, int ordinal)
GIVES(cuCtxGetCurrent, CUcontext, (CUcontext)&context)
GIVES(cuCtxGetDevice, CUdevice, 0)
GIVES(cuCtxGetLimit, size_t, 0, CUlimit limit)
GIVES(cuDevicePrimaryCtxRetain, CUcontext, (CUcontext)&context, CUdevice device)
GIVES(cuModuleLoadData, CUmodule, (CUmodule)&context, const void *image)
GIVES(cuOccupancyMaxActiveClusters, int, 1, CUfunction function, const CUlaunchConfig *config)

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
