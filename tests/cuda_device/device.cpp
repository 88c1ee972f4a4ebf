// A CUDA device that computes nothing, preloaded under the ordinary CUDA build of PyTorch. Here is what does something
// of CUDA's runtime; `functions.c` has what only needs to succeed, also of the driver, cuBLAS and cuDNN.
//
// Device memory is address space that nobody may touch. Kernels are counted and not run, so all on the device reads as
// zero. What is above (dispatcher, allocator, autograd, streams, Inductor) is the real PyTorch.
//
// The device is as lazy as CUDA allows: a copy for which the host need not wait happens when the host waits for its
// stream, or for an event after it. Until then, the target of a copy to the host reads as NaN. The source of a copy
// to the device must not change meanwhile: if it does, "changed too early" is counted.

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t SEGMENT = 2 << 20;  // bytes: cudaMalloc rounds up to multiples of it
constexpr size_t SPOILT = 1 << 20;   // bytes at the start of a copy to the host that read as NaN, then as 0
constexpr size_t WATCHED = 4096;     // bytes at the start of a copy to the device that are watched for changes

struct Moment {  // in the work of a stream
    cudaStream_t stream;
    uint64_t number;
};
struct Copy {
    Moment when;
    char* host;
    size_t size;
    bool to_host;
    uint64_t before;  // hash of what is to be copied to the device
};
using Memory = std::map<const char*, size_t>;  // first address -> bytes

std::mutex mutex;
using Guard = std::lock_guard<std::mutex>;
Memory on_device, pinned;
size_t total = size_t(80) << 30, used = 0;
std::atomic<uint64_t> launches{0};
std::map<std::string, uint64_t> counts;
std::vector<Copy> pending;
std::map<cudaEvent_t, Moment> events;
std::map<cudaStream_t, std::vector<Moment>> awaited;  // by the later work of a stream
uint64_t now = 0;
cudaError_t last_error = cudaSuccess;
std::atomic<cudaStream_t> capturing{nullptr};  // the stream whose work goes into a graph
std::atomic<uint64_t> captured{0};             // its launches
std::thread::id capturer;

bool within(const Memory& memory, const void* pointer) {
    auto address = static_cast<const char*>(pointer);
    auto next = memory.upper_bound(address);
    return next != memory.begin() && address < std::prev(next)->first + std::prev(next)->second;
}

void* reserve(Memory& memory, size_t size, int protection) {
    void* start = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return nullptr;
    memory[static_cast<char*>(start)] = size;
    return start;
}

size_t release(Memory& memory, void* start) {  // returns its size, 0 if it is not there
    auto found = memory.find(static_cast<char*>(start));
    if (found == memory.end()) return 0;
    size_t size = found->second;
    munmap(start, size);
    memory.erase(found);
    return size;
}

uint64_t hash(const char* bytes, size_t size) {  // FNV-1a
    uint64_t value = 0xcbf29ce484222325;
    for (size_t i = 0; i < std::min(size, WATCHED); i++) value = (value ^ uint8_t(bytes[i])) * 0x100000001b3;
    return value;
}

// Do the copies of a stream up to a moment, and those for which it has waited.
void reach(Moment moment) {
    std::vector<Copy> left;
    for (const Copy& copy : pending) {
        if (copy.when.stream != moment.stream || copy.when.number > moment.number) {
            left.push_back(copy);
        } else if (copy.to_host) {
            memset(copy.host, 0, std::min(copy.size, SPOILT));
        } else if (hash(copy.host, copy.size) != copy.before) {
            counts["changed too early"]++;
        }
    }
    pending.swap(left);
    std::vector<Moment> others;
    others.swap(awaited[moment.stream]);
    for (Moment other : others) reach(other);
}

// Wait, unless a graph is being captured: from its stream or thread, that is an error, as is any copy with a wait.
cudaError_t wait_for(const char* name, Moment moment) {
    counts[name]++;
    if (capturing && (moment.stream == capturing || std::this_thread::get_id() == capturer)) {
        counts["wait in a graph"]++;
        return last_error = cudaErrorStreamCaptureUnsupported;
    }
    return reach(moment), cudaSuccess;
}

}  // namespace

// What the tests ask, and what functions.c counts

API void stand_in_launch() { (capturing ? captured : launches)++; }

API void stand_in_reset(size_t bytes) {
    Guard guard(mutex);
    total = bytes, launches = 0;
    counts.clear();
}

API const char* stand_in_counts() {  // lines of name, tab, number
    static std::string text;
    Guard guard(mutex);
    text = "launches\t" + std::to_string(launches) + "\n";
    for (const auto& [name, number] : counts) text += name + "\t" + std::to_string(number) + "\n";
    return text.c_str();
}

// The device: an RTX 4090

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
    *device = cudaDeviceProp{};
    strcpy(device->name, "Stand-in RTX 4090");
    device->totalGlobalMem = total, device->l2CacheSize = 72 << 20;
    device->major = 8, device->minor = 9, device->multiProcessorCount = 128, device->warpSize = 32;
    device->maxThreadsPerBlock = 1024, device->maxThreadsPerMultiProcessor = 1536;
    device->maxThreadsDim[0] = device->maxThreadsDim[1] = 1024, device->maxThreadsDim[2] = 64;
    device->maxGridSize[0] = 2147483647, device->maxGridSize[1] = device->maxGridSize[2] = 65535;
    device->regsPerBlock = device->regsPerMultiprocessor = 65536;
    device->sharedMemPerBlock = 49152, device->sharedMemPerBlockOptin = 101376;
    device->sharedMemPerMultiprocessor = 102400, device->textureAlignment = 512;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    cudaDeviceProp device;
    cudaGetDeviceProperties(&device, 0);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = device.multiProcessorCount; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = device.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = device.maxThreadsPerBlock; break;
        case cudaDevAttrWarpSize: *value = device.warpSize; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = device.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.sharedMemPerMultiprocessor; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = device.regsPerBlock; break;
        case cudaDevAttrComputeCapabilityMajor: *value = device.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = device.minor; break;
        default: *value = 1;
    }
    return cudaSuccess;
}

// Memory

API cudaError_t cudaMalloc(void** pointer, size_t size) {
    Guard guard(mutex);
    size = (size + SEGMENT - 1) / SEGMENT * SEGMENT;
    *pointer = used + size <= total ? reserve(on_device, size, PROT_NONE) : nullptr;
    if (!*pointer) return last_error = cudaErrorMemoryAllocation;
    used += size;
    return cudaSuccess;
}

API cudaError_t cudaFree(void* pointer) {
    Guard guard(mutex);
    used -= release(on_device, pointer);
    return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* free, size_t* all) {
    return *free = used < total ? total - used : 0, *all = total, cudaSuccess;
}

API cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
    Guard guard(mutex);
    *pointer = reserve(pinned, size, PROT_READ | PROT_WRITE);
    return *pointer ? cudaSuccess : last_error = cudaErrorMemoryAllocation;
}

API cudaError_t cudaFreeHost(void* pointer) {
    Guard guard(mutex);
    release(pinned, pointer);
    return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    Guard guard(mutex);
    bool device = within(on_device, pointer), host = within(pinned, pointer);
    *attributes = cudaPointerAttributes{};
    attributes->type = device ? cudaMemoryTypeDevice : host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->device = device || host ? 0 : -1;
    attributes->devicePointer = device || host ? const_cast<void*>(pointer) : nullptr;
    attributes->hostPointer = device ? nullptr : const_cast<void*>(pointer);
    return cudaSuccess;
}

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    Guard guard(mutex);
    bool to_device = within(on_device, to), from_device = within(on_device, from);
    auto target = static_cast<char*>(to), source = static_cast<char*>(const_cast<void*>(from));
    if (!to_device && !from_device) {
        memmove(to, from, size);
    } else if (to_device && within(pinned, from)) {
        pending.push_back({{stream, ++now}, source, size, false, hash(source, size)});
    } else if (from_device && within(pinned, to)) {
        memset(target, 0xff, std::min(size, SPOILT));
        pending.push_back({{stream, ++now}, target, size, true, 0});
    } else if (!to_device || !from_device) {  // for copies from and to memory that is not pinned, the host waits
        if (!to_device) memset(target, 0, size);
        if (stream == capturing && stream) return wait_for("wait cudaMemcpyAsync", {stream, now});
    }
    return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    cudaMemcpyAsync(to, from, size, kind, nullptr);
    Guard guard(mutex);
    return wait_for("wait cudaMemcpy", {nullptr, now});
}

// Streams and events

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    Guard guard(mutex);
    events[event] = {stream, now};
    return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    Guard guard(mutex);
    counts["waits of a stream"]++;
    awaited[stream].push_back(events[event]);
    return cudaSuccess;
}

// To ask whether work is done is as good as to wait for it: the device answers that it is.
API cudaError_t cudaEventQuery(cudaEvent_t event) {
    Guard guard(mutex);
    reach(events[event]);
    return cudaSuccess;
}

API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Guard guard(mutex);
    reach({stream, now});
    return cudaSuccess;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    Guard guard(mutex);
    return wait_for("wait cudaEventSynchronize", events[event]);
}

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    Guard guard(mutex);
    return wait_for("wait cudaStreamSynchronize", {stream, now});
}

API cudaError_t cudaDeviceSynchronize() {
    Guard guard(mutex);
    cudaError_t error = wait_for("wait cudaDeviceSynchronize", {nullptr, now});
    while (!error && !pending.empty()) reach({pending.front().when.stream, now});
    return error;
}

// Graphs

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    return capturing = stream, captured = 0, capturer = std::this_thread::get_id(), cudaSuccess;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    Guard guard(mutex);
    counts["captured graphs"]++, counts["captured launches"] += captured;
    return capturing = nullptr, *graph = reinterpret_cast<cudaGraph_t>(0x10), cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    *status = stream && stream == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                         const cudaGraphEdgeData**, size_t*) {
    if (id) *id = 1;
    return cudaStreamIsCapturing(stream, status);
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* number) {
    return *number = captured, cudaSuccess;
}

// Kernels and errors

namespace {
thread_local cudaStream_t configured;  // for the kernel that this thread is about to launch

cudaError_t launch(cudaStream_t stream) {
    if (capturing && stream != capturing) {
        Guard guard(mutex);
        counts["launches beside a graph"]++;
    }
    return stand_in_launch(), cudaSuccess;
}
}  // namespace

API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t stream) { return configured = stream, 0; }
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, cudaStream_t* stream) {
    return *grid = *block = dim3(), *shared = 0, *stream = configured, cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) { return launch(stream); }
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) {
    return launch(stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
    return launch(config->stream);
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = cudaFuncAttributes{};
    attributes->binaryVersion = attributes->ptxVersion = 89;
    attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32;
    return cudaSuccess;
}

API cudaError_t cudaPeekAtLastError() { return last_error; }
API cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    return last_error = cudaSuccess, error;
}
API const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
    return error == cudaErrorMemoryAllocation ? "out of memory" : error ? "an error of the stand-in" : "no error";
}
