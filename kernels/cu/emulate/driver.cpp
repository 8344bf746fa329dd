// A driver without a GPU: the functions of libcuda.so.1 that launches need, on host memory, with the kernels of this
// folder run by the emulation of device.h. For tests alone; compiled as a shared library of that name.
//
// What it holds callers to:
// - Memory lies between pages without access, at the end or the beginning of its pages in turn, is filled with NaN, and is
//   gone when it is freed. Copies and sets are refused unless they lie in one live allocation; so are frees of anything
//   else, and allocations of length 0.
// - A launch is refused for a grid or a block beyond the hardware's limits, for more threads than the kernel was compiled
//   for, for more dynamic shared memory than 48 KiB or what its attribute was set to, and the attribute beyond the
//   device's limit.
// - A module is the text `emulated device: NAME` with a zero behind; it has the kernels of NAME.cu and no others. Anything
//   else is no image.
// - Calls before cuInit, or without a current context where one is needed, are refused.
// - Streams and events are the null stream, the legacy default one (1), the thread's default one (2, one for all threads here), or
//   handles that were made and not destroyed; an event is recorded on a stream of its own context alone.
// - Of an address it says whose memory it is: a device's, the host's if it was allocated here, nobody's.
// Everything is done when a call returns. One launch at a time. Beside that, copies within device memory on a stream that was
// called late (emulated_late) are held back until somebody waits for them: a caller that does not sees the memory as it was.
//
// The environment sets what is there: EMULATED_DEVICES (1), EMULATED_CAPABILITY (80), EMULATED_VERSION (12000),
// EMULATED_SHARED (166912). EMULATED_LAUNCHES names a file that the number of launches is written to as the process ends.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace {

using emulated_driver::Kernel;
using emulated_driver::kernels;

// Results, as cuda.h numbers them.
enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_OUT_OF_RESOURCES = 701,
};

// As cuda.h numbers them.
enum Memory : unsigned { NOBODYS = 0, HOSTS = 1, DEVICES = 2 };

struct Allocation {
    emulated::Guarded<unsigned char> bytes;
    size_t size;
    Memory kind;
    int device;
};

struct Stream {
    // None for the default ones, which are of the context that is current.
    void* context = nullptr;
    bool late = false;
    // What is held back, and how much was ever, and how much of it is done.
    std::vector<std::function<void()>> held;
    size_t queued = 0, done = 0;
};

struct Event {
    void* context = nullptr;
    std::chrono::steady_clock::time_point at{};
    bool recorded = false;
    // Where it was recorded, after how many copies that were held back.
    void* stream = nullptr;
    size_t queued = 0;
};

struct State {
    std::mutex lock;
    bool started = false;
    // By address.
    std::map<uint64_t, Allocation> memory;
    // By handle.
    std::map<void*, Stream> streams;
    std::map<void*, Event> events;
    size_t made = 0, launches = 0, contexts = 0;
    // Bytes that live, and the most that did since somebody asked.
    size_t bytes = 0, most = 0;

    ~State() {
        const char* path = std::getenv("EMULATED_LAUNCHES");
        std::FILE* file = path ? std::fopen(path, "w") : nullptr;
        if (!file) return;
        std::fprintf(file, "%zu\n", launches);
        std::fclose(file);
    }
};

State& state() {
    static State all;
    return all;
}

int setting(const char* name, int otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atoi(value) : otherwise;
}
int devices() { return setting("EMULATED_DEVICES", 1); }
int shared_limit() { return setting("EMULATED_SHARED", 163 << 10); }

// Contexts are handles of devices' numbers.
thread_local void* current = nullptr;
char context_handles[64];

Result ready() {
    if (!state().started) return NOT_INITIALIZED;
    return current ? SUCCESS : INVALID_CONTEXT;
}

// The allocation that bytes lie in, if it is one and lives; the state is locked.
const Allocation* around(uint64_t address, size_t size) {
    auto after = state().memory.upper_bound(address);
    if (after == state().memory.begin()) return nullptr;
    const auto& [from, allocation] = *--after;
    const bool inside = address - from <= allocation.size && size <= allocation.size - (address - from);
    return inside ? &allocation : nullptr;
}
bool lies(uint64_t address, size_t size) { return around(address, size); }

// A stream by its handle; none for what is no stream. The state is locked, here and below.
Stream* stream_of(void* handle) {
    void* const legacy = reinterpret_cast<void*>(1);
    void* const per_thread = reinterpret_cast<void*>(2);
    if (!handle) handle = legacy;
    if (handle == legacy || handle == per_thread) return &state().streams[handle];
    const auto found = state().streams.find(handle);
    return found == state().streams.end() ? nullptr : &found->second;
}
Event* event_of(void* handle) {
    const auto found = state().events.find(handle);
    return found == state().events.end() ? nullptr : &found->second;
}

// Does what was held back on a stream, up to so many copies of all that ever were.
void finish(Stream& stream, size_t upto) {
    // An event may have been of another stream that was at this address before.
    for (; stream.done < std::min(upto, stream.held.size()); ++stream.done) stream.held[stream.done]();
}
// Somebody waits for an event: it is over when what was queued before it is.
void finish(const Event& event) {
    Stream* const stream = event.recorded ? stream_of(event.stream) : nullptr;
    if (stream) finish(*stream, event.queued);
}

// Before work on a stream: what was queued there comes first.
Result on(void* handle) {
    if (const Result result = ready()) return result;
    Stream* const stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    finish(*stream, stream->queued);
    return SUCCESS;
}

Result allocate(uint64_t* address, size_t size, Memory kind = DEVICES) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = ready()) return result;
    if (!address || !size) return INVALID_VALUE;
    if (size > size_t(1) << 34) return OUT_OF_MEMORY;
    // Addresses are multiples of 16 at least, so that the last bytes of a page may be left over.
    const bool at_end = state().made++ % 2;
    const int device = int(static_cast<char*>(current) - context_handles);
    Allocation allocation{emulated::Guarded<unsigned char>((size + 15) / 16 * 16, at_end), size, kind, device};
    *address = uint64_t(allocation.bytes.data());
    state().memory.emplace(*address, std::move(allocation));
    state().bytes += size;
    state().most = std::max(state().most, state().bytes);
    return SUCCESS;
}

Result release(uint64_t address) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (!state().started) return NOT_INITIALIZED;
    const auto found = state().memory.find(address);
    if (found == state().memory.end()) return INVALID_VALUE;
    // What lies behind the last byte was filled with ones.
    for (size_t i = found->second.size; i % 16; ++i)
        if (found->second.bytes[i] != 0xff) emulated::fail("bytes behind an allocation were written");
    state().bytes -= found->second.size;
    state().memory.erase(found);
    return SUCCESS;
}

Result copy(bool good, void* to, const void* from, size_t size) {
    if (!good) return INVALID_VALUE;
    if (size) std::memcpy(to, from, size);
    return SUCCESS;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// For tests: allocations that live, contexts that are held, launches so far.
API size_t emulated_allocations() {
    std::lock_guard<std::mutex> guard(state().lock);
    return state().memory.size();
}
API size_t emulated_contexts() {
    std::lock_guard<std::mutex> guard(state().lock);
    return state().contexts;
}
// Bytes that live; the most that did is the pool's to say.
API size_t emulated_bytes() {
    std::lock_guard<std::mutex> guard(state().lock);
    return state().bytes;
}
API size_t emulated_launches() {
    std::lock_guard<std::mutex> guard(state().lock);
    return state().launches;
}
// Whether from now on copies within device memory on this stream are held back until somebody waits for them.
API Result emulated_late(void* handle, int late) {
    std::lock_guard<std::mutex> guard(state().lock);
    Stream* const stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->late = late;
    return SUCCESS;
}
// Copies that are still held back there.
API size_t emulated_held(void* handle) {
    std::lock_guard<std::mutex> guard(state().lock);
    const Stream* const stream = stream_of(handle);
    return stream ? stream->queued - stream->done : 0;
}

API Result cuInit(unsigned flags) {
    if (flags) return INVALID_VALUE;
    if (devices() < 1) return NO_DEVICE;
    state().started = true;
    return SUCCESS;
}
API Result cuDriverGetVersion(int* version) {
    *version = setting("EMULATED_VERSION", 12000);
    return SUCCESS;
}
API Result cuGetErrorName(Result error, const char** name) {
    static const std::map<int, const char*> names{
        {SUCCESS, "CUDA_SUCCESS"},
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
        {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
        {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
        {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {NOT_READY, "CUDA_ERROR_NOT_READY"},
        {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    };
    const auto found = names.find(error);
    if (found == names.end()) return INVALID_VALUE;
    *name = found->second;
    return SUCCESS;
}
API Result cuGetErrorString(Result error, const char** text) { return cuGetErrorName(error, text); }

API Result cuDeviceGetCount(int* count) {
    if (!state().started) return NOT_INITIALIZED;
    *count = devices();
    return SUCCESS;
}
API Result cuDeviceGet(int* device, int ordinal) {
    if (!state().started) return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= devices() || ordinal >= int(sizeof context_handles)) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}
API Result cuDeviceGetName(char* name, int size, int device) {
    std::snprintf(name, size_t(size), "emulated device %d", device);
    return SUCCESS;
}
API Result cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = size_t(1) << 34;
    return SUCCESS;
}
API Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (device < 0 || device >= devices()) return INVALID_DEVICE;
    const int capability = setting("EMULATED_CAPABILITY", 80);
    switch (attribute) {
        case 16: *value = 2; return SUCCESS;                // multiprocessors
        case 75: *value = capability / 10; return SUCCESS;  // compute capability
        case 76: *value = capability % 10; return SUCCESS;
        case 97: *value = shared_limit(); return SUCCESS;   // dynamic shared memory of a block
        case 115: *value = 1; return SUCCESS;               // memory pools
        default: return INVALID_VALUE;
    }
}

API Result cuDevicePrimaryCtxRetain(void** context, int device) {
    if (!state().started) return NOT_INITIALIZED;
    if (device < 0 || device >= devices()) return INVALID_DEVICE;
    std::lock_guard<std::mutex> guard(state().lock);
    ++state().contexts;
    *context = context_handles + device;
    return SUCCESS;
}
API Result cuDevicePrimaryCtxRelease_v2(int) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (!state().contexts) return INVALID_CONTEXT;
    --state().contexts;
    return SUCCESS;
}
API Result cuCtxGetCurrent(void** context) {
    *context = current;
    return SUCCESS;
}
API Result cuCtxSetCurrent(void* context) {
    current = context;
    return SUCCESS;
}
API Result cuCtxSynchronize() {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = ready()) return result;
    for (auto& [handle, stream] : state().streams)
        if (!stream.context || stream.context == current) finish(stream, stream.queued);
    return SUCCESS;
}
API Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = ready()) return result;
    size_t used = 0;
    for (const auto& [address, allocation] : state().memory) used += allocation.size;
    *total = size_t(1) << 34;
    *free = *total - used;
    return SUCCESS;
}

// The one pool: it keeps nothing, and counts.
API Result cuDeviceGetDefaultMemPool(void** pool, int device) {
    if (device < 0 || device >= devices()) return INVALID_DEVICE;
    *pool = context_handles + device;
    return SUCCESS;
}
API Result cuMemPoolGetAttribute(void* pool, int attribute, void* value) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (!pool || !value) return INVALID_VALUE;
    switch (attribute) {
        case 5:  // held
        case 7: *static_cast<uint64_t*>(value) = state().bytes; return SUCCESS;  // in use
        case 8: *static_cast<uint64_t*>(value) = state().most; return SUCCESS;   // the most that was
        default: return INVALID_VALUE;
    }
}
API Result cuMemPoolTrimTo(void* pool, size_t) { return pool ? SUCCESS : INVALID_VALUE; }
API Result cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (!pool || !value) return INVALID_VALUE;
    switch (attribute) {
        case 4: return SUCCESS;  // what is kept
        case 8:
            // It may be set to 0 alone, which counts from now.
            if (*static_cast<uint64_t*>(value)) return INVALID_VALUE;
            state().most = state().bytes;
            return SUCCESS;
        default: return INVALID_VALUE;
    }
}

API Result cuStreamCreate(void** stream, unsigned) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = ready()) return result;
    *stream = new char;
    state().streams[*stream].context = current;
    return SUCCESS;
}
API Result cuStreamDestroy_v2(void* handle) {
    std::lock_guard<std::mutex> guard(state().lock);
    const auto found = state().streams.find(handle);
    if (found == state().streams.end() || !found->second.context) return INVALID_HANDLE;
    finish(found->second, found->second.queued);
    state().streams.erase(found);
    delete static_cast<char*>(handle);
    return SUCCESS;
}
API Result cuStreamSynchronize(void* handle) {
    std::lock_guard<std::mutex> guard(state().lock);
    return on(handle);
}
API Result cuStreamWaitEvent(void* handle, void* event, unsigned) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = ready()) return result;
    const Event* const found = event_of(event);
    if (!stream_of(handle) || !found) return INVALID_HANDLE;
    finish(*found);
    return SUCCESS;
}
API Result cuEventCreate(void** event, unsigned) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = ready()) return result;
    *event = new char;
    state().events[*event].context = current;
    return SUCCESS;
}
API Result cuEventRecord(void* event, void* handle) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = ready()) return result;
    Event* const found = event_of(event);
    const Stream* const stream = stream_of(handle);
    if (!found || !stream || found->context != (stream->context ? stream->context : current)) return INVALID_HANDLE;
    found->at = std::chrono::steady_clock::now();
    found->recorded = true;
    found->stream = handle;
    found->queued = stream->queued;
    return SUCCESS;
}
API Result cuEventSynchronize(void* event) {
    std::lock_guard<std::mutex> guard(state().lock);
    const Event* const found = event_of(event);
    if (!found) return INVALID_HANDLE;
    finish(*found);
    return SUCCESS;
}
API Result cuEventQuery(void* event) { return cuEventSynchronize(event); }
API Result cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    std::lock_guard<std::mutex> guard(state().lock);
    const Event *from = event_of(start), *to = event_of(end);
    if (!from || !to || !from->recorded || !to->recorded) return INVALID_HANDLE;
    *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
    return SUCCESS;
}
API Result cuEventDestroy_v2(void* event) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (!state().events.erase(event)) return INVALID_HANDLE;
    delete static_cast<char*>(event);
    return SUCCESS;
}

API Result cuMemAlloc_v2(uint64_t* address, size_t size) { return allocate(address, size); }
API Result cuMemAllocAsync(uint64_t* address, size_t size, void*) { return allocate(address, size); }
API Result cuMemFree_v2(uint64_t address) { return release(address); }
// The default stream is that of the current context.
API Result cuMemFreeAsync(uint64_t address, void* stream) {
    return stream || current ? release(address) : INVALID_CONTEXT;
}
// The host's own, which a device may reach.
API Result cuMemHostAlloc(void** address, size_t size, unsigned) {
    return allocate(reinterpret_cast<uint64_t*>(address), size, HOSTS);
}
API Result cuMemFreeHost(void* address) { return release(uint64_t(address)); }
// What nobody allocated gives zeros, as the real one does.
API Result cuPointerGetAttributes(unsigned count, int* attributes, void** data, uint64_t address) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (!state().started) return NOT_INITIALIZED;
    const Allocation* const allocation = around(address, 1);
    for (unsigned i = 0; i < count; ++i) {
        switch (attributes[i]) {
            case 2: *static_cast<unsigned*>(data[i]) = allocation ? allocation->kind : NOBODYS; break;
            // Managed: there is no such memory here. It is a boolean, of one byte at least.
            case 8: *static_cast<unsigned char*>(data[i]) = 0; break;
            case 9: *static_cast<int*>(data[i]) = allocation ? allocation->device : -2; break;
            default: return INVALID_VALUE;
        }
    }
    return SUCCESS;
}
API Result cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, void* stream) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = on(stream)) return result;
    return copy(lies(to, size), reinterpret_cast<void*>(to), from, size);
}
API Result cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, void* stream) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = on(stream)) return result;
    return copy(lies(from, size), to, reinterpret_cast<void*>(from), size);
}
API Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void* handle) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = ready()) return result;
    Stream* const stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!lies(to, size) || !lies(from, size)) return INVALID_VALUE;
    const auto now = [=] {
        if (!lies(to, size) || !lies(from, size)) emulated::fail("memory was freed before a copy of it was done");
        if (size) std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
    };
    if (stream->late) {
        stream->held.push_back(now);
        ++stream->queued;
    } else {
        now();
    }
    return SUCCESS;
}
API Result cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void* stream) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = on(stream)) return result;
    if (!lies(to, size)) return INVALID_VALUE;
    std::memset(reinterpret_cast<void*>(to), value, size);
    return SUCCESS;
}

API Result cuModuleLoadData(void** module, const void* image) {
    if (const Result result = ready()) return result;
    static const std::string before = "emulated device: ";
    const char* const text = static_cast<const char*>(image);
    // Stops at the first difference, and so at the end of anything that is shorter.
    for (size_t i = 0; i < before.size(); ++i)
        if (text[i] != before[i]) return INVALID_IMAGE;
    const std::string name = text + before.size();
    for (const auto& [kernel, of] : kernels())
        if (name == of.module) {
            *module = new std::string(name);
            return SUCCESS;
        }
    return INVALID_IMAGE;
}
API Result cuModuleUnload(void* module) {
    delete static_cast<std::string*>(module);
    return SUCCESS;
}
API Result cuModuleGetFunction(void** function, void* module, const char* name) {
    const auto found = kernels().find(name);
    if (found == kernels().end() || *static_cast<std::string*>(module) != found->second.module) return NOT_FOUND;
    *function = &found->second;
    return SUCCESS;
}
API Result cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8 || value < 0 || value > shared_limit()) return INVALID_VALUE;
    std::lock_guard<std::mutex> guard(state().lock);
    static_cast<Kernel*>(function)->shared = std::max<size_t>(48 << 10, size_t(value));
    return SUCCESS;
}
API Result cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y, unsigned z,
                          unsigned shared, void* stream, void** params, void** extra) {
    std::lock_guard<std::mutex> guard(state().lock);
    if (const Result result = on(stream)) return result;
    const Kernel& kernel = *static_cast<const Kernel*>(function);
    if (!grid_x || !grid_y || !grid_z || grid_x > 0x7fffffff || grid_y > 65535 || grid_z > 65535) return INVALID_VALUE;
    const uint64_t threads = uint64_t(x) * y * z;
    if (!threads || threads > 1024 || shared > kernel.shared || extra) return INVALID_VALUE;
    if (threads > kernel.threads) return LAUNCH_OUT_OF_RESOURCES;
    const auto order = emulated::Order(state().launches++ % 3);
    emulated::launch(dim3(grid_x, grid_y, grid_z), dim3(x, y, z), shared, [&] { kernel.run(params); }, order);
    return SUCCESS;
}
