// A CUDA device that computes nothing, preloaded under the ordinary CUDA build of PyTorch. Here is what of CUDA's
// runtime does something; `functions.c` lists what only has to succeed, of the driver, cuBLAS and cuDNN as well.
//
// Device memory is address space that nobody may touch. Kernels are counted and not run, so every value on the device
// reads as zero. Everything above (dispatcher, allocator, autograd, streams, Inductor) is the real PyTorch.
//
// The device is as lazy as CUDA allows: a copy that the host need not wait for happens only when the host waits for
// its stream or for an event after it. Until then, memory of the host that is copied to reads as NaN. Memory that is
// copied from must not change meanwhile: if it does, `changed too early` is counted.

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
namespace {

using Address = uintptr_t;
constexpr size_t SEGMENT = 2 << 20;  // bytes: what cudaMalloc rounds up to
constexpr size_t WATCHED = 4096;     // bytes at the start of a copy that are spoilt, or watched for changes

struct Copy {
    cudaStream_t stream;
    uint64_t number;
    char* host;
    size_t size;
    bool to_host;
    uint64_t before;  // hash of the bytes to be copied to the device
};
struct Moment {  // in the work of a stream
    cudaStream_t stream = nullptr;
    uint64_t number = 0;
};

std::mutex mutex;
std::map<Address, size_t> device_memory, pinned_memory;  // first address -> bytes
size_t total = size_t(80) << 30, used = 0;
std::map<std::string, uint64_t> counts;
std::map<const void*, std::string> kernels;  // the host's stub of a kernel -> its name
std::vector<Copy> pending;
std::map<cudaEvent_t, Moment> events;
std::map<cudaStream_t, std::vector<Moment>> awaited;  // by the later work of a stream
uint64_t now = 0, handles = 0x1000;
cudaError_t last_error = cudaSuccess;

using Guard = std::lock_guard<std::mutex>;

cudaError_t fail(cudaError_t error) { return last_error = error; }

bool within(const std::map<Address, size_t>& memory, const void* pointer) {
    auto next = memory.upper_bound(Address(pointer));
    return next != memory.begin() && Address(pointer) < std::prev(next)->first + std::prev(next)->second;
}

uint64_t hash(const char* bytes, size_t size) {  // FNV-1a
    uint64_t value = 0xcbf29ce484222325;
    for (size_t i = 0; i < std::min(size, WATCHED); i++) value = (value ^ uint8_t(bytes[i])) * 0x100000001b3;
    return value;
}

void* reserve(size_t size, int protection) {
    void* memory = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

// Do the copies of a stream up to a moment, and those that it has waited for.
void reach(Moment moment) {
    std::vector<Copy> left;
    for (const Copy& copy : pending) {
        if (copy.stream != moment.stream || copy.number > moment.number) {
            left.push_back(copy);
        } else if (copy.to_host) {
            memset(copy.host, 0, std::min(copy.size, WATCHED));
        } else if (hash(copy.host, copy.size) != copy.before) {
            counts["changed too early"]++;
        }
    }
    pending.swap(left);
    auto others = awaited.find(moment.stream);
    if (others == awaited.end()) return;
    std::vector<Moment> moments;
    moments.swap(others->second);
    for (Moment other : moments) reach(other);
}

void reach_all() {
    std::vector<Copy> copies = pending;
    for (const Copy& copy : copies) reach({copy.stream, now});
}

cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream) {
    Guard guard(mutex);
    bool to_device = within(device_memory, to), from_device = within(device_memory, from);
    char *target = static_cast<char*>(to), *source = static_cast<char*>(const_cast<void*>(from));
    if (to_device && from_device) return cudaSuccess;
    counts[to_device ? "bytes to the device" : "bytes to the host"] += size;
    if (!to_device && !from_device) {
        memmove(to, from, size);
    } else if (to_device && within(pinned_memory, from)) {
        pending.push_back({stream, ++now, source, size, false, hash(source, size)});
    } else if (from_device && within(pinned_memory, to)) {
        memset(target, 0xff, std::min(size, WATCHED));
        pending.push_back({stream, ++now, target, size, true, 0});
    } else if (from_device) {  // the host waits for copies to memory that is not pinned
        memset(target, 0, size);
    }
    return cudaSuccess;
}

cudaError_t launch(const void* kernel) {
    Guard guard(mutex);
    auto known = kernels.find(kernel);
    counts["kernel " + (known == kernels.end() ? "?" : known->second)]++;
    return cudaSuccess;
}

}  // namespace

// What the tests ask.

API void stand_in_count(const char* name) {
    Guard guard(mutex);
    counts[name]++;
}

API void stand_in_reset(size_t bytes) {
    Guard guard(mutex);
    total = bytes;
    counts.clear();
}

API const char* stand_in_counts() {  // lines of name, tab, number
    static std::string text;
    Guard guard(mutex);
    text.clear();
    for (const auto& [name, number] : counts) text += name + "\t" + std::to_string(number) + "\n";
    return text.c_str();
}

// The device: an RTX 4090.

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
    *device = cudaDeviceProp{};
    strcpy(device->name, "Stand-in RTX 4090");
    device->totalGlobalMem = total;
    device->major = 8, device->minor = 9;
    device->multiProcessorCount = 128;
    device->warpSize = 32;
    device->maxThreadsPerBlock = device->maxThreadsDim[0] = device->maxThreadsDim[1] = 1024;
    device->maxThreadsDim[2] = 64;
    device->maxGridSize[0] = 2147483647, device->maxGridSize[1] = device->maxGridSize[2] = 65535;
    device->maxThreadsPerMultiProcessor = 1536;
    device->regsPerBlock = device->regsPerMultiprocessor = 65536;
    device->sharedMemPerBlock = 49152;
    device->sharedMemPerBlockOptin = 101376;
    device->sharedMemPerMultiprocessor = 102400;
    device->l2CacheSize = 72 << 20;
    device->totalConstMem = 65536;
    device->textureAlignment = 512;
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

// Memory.

API cudaError_t cudaMalloc(void** pointer, size_t size) {
    Guard guard(mutex);
    size_t rounded = (size + SEGMENT - 1) / SEGMENT * SEGMENT;
    *pointer = used + rounded <= total ? reserve(rounded, PROT_NONE) : nullptr;
    if (!*pointer) return fail(cudaErrorMemoryAllocation);
    device_memory[Address(*pointer)] = rounded;
    used += rounded;
    return cudaSuccess;
}

API cudaError_t cudaFree(void* pointer) {
    Guard guard(mutex);
    auto found = device_memory.find(Address(pointer));
    if (found == device_memory.end()) return cudaSuccess;
    munmap(pointer, found->second);
    used -= found->second;
    device_memory.erase(found);
    return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* free, size_t* all) { return *free = total - used, *all = total, cudaSuccess; }

API cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
    Guard guard(mutex);
    *pointer = reserve(size, PROT_READ | PROT_WRITE);
    if (!*pointer) return fail(cudaErrorMemoryAllocation);
    pinned_memory[Address(*pointer)] = size;
    return cudaSuccess;
}

API cudaError_t cudaFreeHost(void* pointer) {
    Guard guard(mutex);
    auto found = pinned_memory.find(Address(pointer));
    if (found == pinned_memory.end()) return cudaSuccess;
    munmap(pointer, found->second);
    pinned_memory.erase(found);
    return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    Guard guard(mutex);
    *attributes = cudaPointerAttributes{};
    bool on_device = within(device_memory, pointer), pinned = within(pinned_memory, pointer);
    attributes->type = on_device ? cudaMemoryTypeDevice : pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->device = on_device || pinned ? 0 : -1;
    attributes->devicePointer = on_device || pinned ? const_cast<void*>(pointer) : nullptr;
    attributes->hostPointer = on_device ? nullptr : const_cast<void*>(pointer);
    return cudaSuccess;
}

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    return copy(to, from, size, stream);
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    stand_in_count("wait cudaMemcpy");
    copy(to, from, size, nullptr);
    Guard guard(mutex);
    reach({nullptr, now});
    return cudaSuccess;
}

// Streams and events.

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    Guard guard(mutex);
    events[event] = {stream, now};
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    Guard guard(mutex);
    if (events.count(event)) awaited[stream].push_back(events[event]);
    return cudaSuccess;
}

// To ask whether work is done is as good as to wait for it: the device answers that it is.
API cudaError_t cudaEventQuery(cudaEvent_t event) {
    Guard guard(mutex);
    if (events.count(event)) reach(events[event]);
    return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Guard guard(mutex);
    reach({stream, now});
    return cudaSuccess;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    stand_in_count("wait cudaEventSynchronize");
    return cudaEventQuery(event);
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    stand_in_count("wait cudaStreamSynchronize");
    return cudaStreamQuery(stream);
}
API cudaError_t cudaDeviceSynchronize() {
    stand_in_count("wait cudaDeviceSynchronize");
    Guard guard(mutex);
    reach_all();
    return cudaSuccess;
}

// Kernels.

API void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*,
                                int*) {
    Guard guard(mutex);
    kernels[stub] = name;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return launch(kernel);
}
API cudaError_t cudaLaunchKernel(const void* stub, dim3, dim3, void**, size_t, cudaStream_t) { return launch(stub); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* stub, void**) { return launch(stub); }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = cudaFuncAttributes{};
    attributes->binaryVersion = attributes->ptxVersion = 89;
    attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32;
    return cudaSuccess;
}

// Errors, and the driver.

API cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : error ? "an error of the stand-in" : "no error";
}

API void* stand_in_function(const char* name);  // of functions.c

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
    *function = stand_in_function(name);
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
