// As much of the CUDA driver as Triton's launcher calls; a launch runs in the emulator. A module is the text of its
// PTX.
#include <stdexcept>

#include "cuda.h"
#include "machine.h"

static string last_error;
static int context_of_all;

static vector<Kernel *> modules;

static CUresult refuse(const string &why) {
  last_error = why;
  return CUDA_ERROR_INVALID_VALUE;
}
#define OK return CUDA_SUCCESS

extern "C" {
CUresult cuGetErrorString(CUresult, const char **text) {
  *text = last_error.c_str();
  OK;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  try {
    modules.push_back(parse((const char *)image));
    *module = (CUmodule)modules.back();
  } catch (std::exception &e) {
    return refuse(string("PTX: ") + e.what());
  }
  OK;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  auto *k = (Kernel *)module;
  if (k->name != name) return refuse("no function " + string(name));
  *function = (CUfunction)k;
  OK;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **) {
  auto *k = (Kernel *)f;
  u32 threads = c->blockDimX * c->blockDimY * c->blockDimZ, most = options.arch >= 90 ? 232448 : 166912;
  if (!c->gridDimX || !c->gridDimY || !c->gridDimZ || c->gridDimX > 0x7fffffff || c->gridDimY > 65535 ||
      c->gridDimZ > 65535)
    return refuse("the grid is empty or too large");
  if (!threads || threads > 1024 || (k->threads && threads != (u32)k->threads))
    return refuse("not the threads that the kernel was compiled for");
  if (c->sharedMemBytes > most) return refuse("a program takes too much shared memory");
  auto *g = new Grid;
  g->kernel = k;
  g->tally.resize(k->code.size());
  g->dim[0] = c->gridDimX;
  g->dim[1] = c->gridDimY;
  g->dim[2] = c->gridDimZ;
  g->threads = threads;
  g->shared = c->sharedMemBytes;
  g->dependent = false;
  for (unsigned i = 0; i < c->numAttrs; i++) {
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      g->dependent = c->attrs[i].value.programmaticStreamSerializationAllowed;
    else
      return refuse("an attribute of a launch that is not known here");
  }
  g->lines.resize(k->param_bytes / 128 + 1);
  for (size_t i = 0; i < k->params.size(); i++) memcpy(g->params() + k->params[i].offset, params[i], k->params[i].size);
  enqueue(g);
  OK;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  TensorMap t{};
  u32 spans[] = {0, 32, 64, 128};
  t.elem = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32   ? 4
           : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2
                                                                                                 : 0;
  if (!t.elem) return refuse("a descriptor of a dtype that is not known here");
  if ((u64)address % 16 || rank < 1 || rank > 5 || interleave || swizzle > 3)
    return refuse("a descriptor that is not on 16 bytes, or of a kind that is not known here");
  t.base = (u64)address;
  t.rank = rank;
  t.swizzle = swizzle;
  t.nan = fill;
  for (u32 i = 0; i < rank; i++) {
    if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256 || steps[i] != 1)
      return refuse("a descriptor's sizes");
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40)) return refuse("a descriptor's strides");
    t.dims[i] = sizes[i];
    t.box[i] = box[i];
    if (i + 1 < rank) t.strides[i] = strides[i];
  }
  u32 row = box[0] * t.elem;
  if (row % 16 || (spans[swizzle] && row > spans[swizzle])) return refuse("a row of a descriptor's tile");
  memset(map, 0, sizeof *map);
  u64 words[] = {TENSOR_MAP, 0, tensor_maps.size()};
  memcpy(map, words, sizeof words);
  tensor_maps.push_back(t);
  OK;
}
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice) {
  *v = a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR            ? options.arch / 10
       : a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR          ? options.arch % 10
       : a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? (options.arch >= 90 ? 232448 : 166912)
       : a == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK           ? 65536
       : a == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT              ? options.sms
       : a == CU_DEVICE_ATTRIBUTE_WARP_SIZE                         ? 32
                                                                    : 1;
  OK;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  OK;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute, CUdeviceptr p) {
  *(CUdeviceptr *)data = p;
  OK;
}
CUresult cuInit(unsigned) {
  OK;
}
CUresult cuCtxSetCurrent(CUcontext) {
  OK;
}
CUresult cuCtxSetLimit(CUlimit, size_t) {
  OK;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute a, int) {
  if ((int)a == 17) return refuse("no such attribute yet");
  OK;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) {
  OK;
}
CUresult cuModuleUnload(CUmodule) {
  OK;
}
CUresult cuDriverGetVersion(int *v) {
  *v = 12080;
  OK;
}
CUresult cuDeviceGetCount(int *v) {
  *v = 1;
  OK;
}
CUresult cuDeviceGet(CUdevice *v, int) {
  *v = 0;
  OK;
}
CUresult cuCtxGetCurrent(CUcontext *v) {
  *v = (CUcontext)&context_of_all;
  OK;
}
CUresult cuCtxGetDevice(CUdevice *v) {
  *v = 0;
  OK;
}
CUresult cuCtxGetLimit(size_t *v, CUlimit) {
  *v = 0;
  OK;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *v, CUdevice) {
  *v = (CUcontext)&context_of_all;
  OK;
}
CUresult cuOccupancyMaxActiveClusters(int *v, CUfunction, const CUlaunchConfig *) {
  *v = 1;
  OK;
}
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus *s) {
  *s = CU_STREAM_CAPTURE_STATUS_NONE;
  OK;
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                 const cuuint64_t *, const int *, const int *, cuuint32_t, cuuint32_t,
                                 const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
  return refuse("im2col");
}
// To plant faults: the modules loaded so far, and other text for one of them
int emu_modules() {
  return modules.size();
}
const char *emu_source(int i) {
  return modules[i]->source.c_str();
}

// The lines that warps have come to, with spaces between.
const char *emu_reached(int i) {
  static string lines;
  lines.clear();
  for (auto &instr : modules[i]->code)
    if (instr.reached) lines += std::to_string(instr.line) + " ";
  return lines.c_str();
}

void emu_serialise(int i) {
  modules[i]->serial = true;
}
int emu_replace(int i, const char *text) {
  try {
    auto *k = parse(text);
    k->serial = modules[i]->serial;
    *modules[i] = *k;
    delete k;
    return 1;
  } catch (std::exception &e) {
    last_error = e.what();
    return 0;
  }
}
}
