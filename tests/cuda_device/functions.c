// The functions of CUDA's runtime and driver, cuBLAS and cuDNN that only have to succeed, by what they write.
//
// CUDA's headers are not used here, so nothing has to name the arguments that it ignores: C's calling convention
// lets a function take fewer than it is given. All of them return 0, which is success everywhere.

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

void stand_in_launch();
static _Atomic uintptr_t handles = 0x1000;

#define NOTHING(name) \
    int name() { return 0; }
#define LAUNCHES(name) \
    int name() { return stand_in_launch(), 0; }
#define GIVES(value, name) \
    int name(int* first) { return *first = value, 0; }
#define SECOND_IS_ZERO(name) \
    int name(void* first, int* second) { return *second = 0; }
#define CREATES(name) \
    int name(uintptr_t* first) { return *first = handles += 16, 0; }

// The runtime
GIVES(1, cudaGetDeviceCount) GIVES(0, cudaGetDevice) GIVES(0, cudaDeviceCanAccessPeer) NOTHING(cudaSetDevice)
GIVES(13000, cudaDriverGetVersion) GIVES(13000, cudaRuntimeGetVersion)
GIVES(2, cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)
CREATES(cudaStreamCreate) CREATES(cudaStreamCreateWithFlags) CREATES(cudaStreamCreateWithPriority)
CREATES(cudaEventCreate) CREATES(cudaEventCreateWithFlags)
NOTHING(cudaEventDestroy) NOTHING(cudaStreamDestroy) NOTHING(cudaThreadExchangeStreamCaptureMode)
CREATES(cudaGraphInstantiateWithFlags) NOTHING(cudaGraphDestroy) NOTHING(cudaGraphExecDestroy)
LAUNCHES(cudaGraphLaunch) SECOND_IS_ZERO(cudaStreamGetPriority)
NOTHING(cudaMemset) NOTHING(cudaMemsetAsync) NOTHING(cudaMemcpyPeerAsync) NOTHING(cudaMemcpyToSymbol)
NOTHING(cudaFuncSetAttribute) NOTHING(cudaProfilerStart) NOTHING(cudaProfilerStop)
int cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *most = -5, *least = 0; }
int cudaDeviceGetPCIBusId(char* name) { return strcpy(name, "0000:01:00.0"), 0; }
int cudaEventElapsedTime(float* milliseconds) { return *milliseconds = 1, 0; }
int cudaGetSymbolAddress(const void** pointer, const void* symbol) { return *pointer = symbol, 0; }
int cudaLaunchHostFunc(void* stream, void (*function)(void*), void* data) { return function(data), 0; }
const char* cudaGetErrorName() { return "cudaErrorOfTheStandIn"; }

// The binaries of kernels, and how they are called
NOTHING(__cudaRegisterFatBinaryEnd) NOTHING(__cudaUnregisterFatBinary)
NOTHING(__cudaRegisterVar) NOTHING(__cudaRegisterFunction) NOTHING(__cudaInitModule)
void** __cudaRegisterFatBinary() {
    static void* handle;
    return &handle;
}
int __cudaGetKernel(const void** kernel, const void* stub) { return *kernel = stub, 0; }

// The driver, for Triton's kernels
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDevicePrimaryCtxRelease) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuModuleUnload)
NOTHING(cuTensorMapEncodeTiled) NOTHING(cuStreamSynchronize) NOTHING(cuGetProcAddress_v2)
LAUNCHES(cuLaunchKernel) LAUNCHES(cuLaunchKernelEx) LAUNCHES(cuLaunchCooperativeKernel)
GIVES(13000, cuDriverGetVersion) GIVES(0, cuCtxGetDevice) GIVES(0, cuDeviceGet) GIVES(1, cuDeviceGetCount)
GIVES(8 << 20, cuCtxGetLimit) GIVES(2, cuOccupancyMaxActiveBlocksPerMultiprocessor)
GIVES(2, cuOccupancyMaxActiveClusters)
CREATES(cuCtxGetCurrent) CREATES(cuModuleLoad) CREATES(cuModuleLoadData) CREATES(cuModuleLoadDataEx) CREATES(cuModuleGetFunction)
int cudaDeviceGetAttribute(int* value, int attribute, int device);
int cuDeviceGetAttribute(int* value, int attribute, int device) {  // the runtime has the driver's numbers
    return cudaDeviceGetAttribute(value, attribute, device);
}
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) { return *active = 1, *flags = 0; }
int cuFuncGetAttribute(int* value, int attribute) {  // the most threads in a block, registers, spilled bytes …
    return *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0, 0;
}
int cuPointerGetAttribute(void** data, int attribute, void* pointer) { return *data = pointer, 0; }
int cuGetErrorString(int error, const char** text) { return *text = "an error of the stand-in", 0; }

int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, uint64_t flags, int* found) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = (void*)cuInit;
    if (found) *found = 0;
    return 0;
}

// cuBLAS
CREATES(cublasCreate_v2) CREATES(cublasLtCreate) CREATES(cublasLtMatmulDescCreate) CREATES(cublasLtMatrixLayoutCreate)
CREATES(cublasLtMatmulPreferenceCreate)
NOTHING(cublasDestroy_v2) NOTHING(cublasSetMathMode) NOTHING(cublasSetPointerMode_v2) NOTHING(cublasSetStream_v2)
NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetSmCountTarget) NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute) NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatrixLayoutSetAttribute)
SECOND_IS_ZERO(cublasGetMathMode) SECOND_IS_ZERO(cublasGetPointerMode_v2)
LAUNCHES(cublasSgemm_v2) LAUNCHES(cublasGemmEx) LAUNCHES(cublasSgemmEx) LAUNCHES(cublasGemmStridedBatchedEx)
LAUNCHES(cublasSgemmStridedBatched) LAUNCHES(cublasSgemv_v2) LAUNCHES(cublasSdot_v2) LAUNCHES(cublasDotEx)
LAUNCHES(cublasLtMatmul)
int cublasLtMatmulAlgoGetHeuristic(void* handle, void* operation, void* a, void* b, void* c, void* d,
                                   void* preference, int wanted, void* results, int* found) {
    return *found = 1, 0;
}

// cuDNN, whose every plan needs no workspace
CREATES(cudnnCreate) NOTHING(cudnnDestroy) NOTHING(cudnnSetStream)
NOTHING(cudnnBackendInitialize) NOTHING(cudnnBackendFinalize) NOTHING(cudnnBackendSetAttribute)
NOTHING(cudnnBackendDestroyDescriptor) LAUNCHES(cudnnBackendExecute)
size_t cudnnGetVersion() { return 92400; }
size_t cudnnGetCudartVersion() { return 13000; }
const char* cudnnGetErrorString() { return "an error of the stand-in"; }
void cudnnGetLastErrorString(char* text) { *text = 0; }
int cudnnBackendCreateDescriptor(int type, uintptr_t* descriptor) { return *descriptor = handles += 16, 0; }
enum { HEURISTIC_RESULTS = 202, ENGINE = 300, WORKSPACE = 303, PLAN_WORKSPACE = 402, PLAN_JSON = 405, INDEX = 1301 };
int cudnnBackendGetAttribute(void* descriptor, int attribute, int type, int64_t room, int64_t* count, void* values) {
    int numbers = attribute == WORKSPACE || attribute == PLAN_WORKSPACE || attribute == INDEX;
    int found = numbers || attribute == HEURISTIC_RESULTS || attribute == ENGINE ? 1 : attribute == PLAN_JSON ? 2 : 0;
    if (count) *count = found;
    if (numbers && values && room) *(int64_t*)values = 0;
    if (attribute == PLAN_JSON && values && room >= found) strcpy(values, "0");
    return 0;
}
