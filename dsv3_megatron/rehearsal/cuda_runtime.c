/* A CUDA runtime (libcudart of CUDA 13) and driver without a device, for a rehearsal: preloaded, they answer torch.

   It says that there are DSV3_REHEARSAL_GPUS Hopper GPUs of DSV3_REHEARSAL_BYTES each; streams and events exist and are
   always done; device memory cannot be had, because a rehearsal has none. What is not here is libcudart's own, which
   finds no driver and says so. Types are written out, so that no header of CUDA is needed; pointers to what torch hands
   through without looking are void. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

enum { SUCCESS = 0, OUT_OF_MEMORY = 2 };
/* Of cudaDeviceAttr. */
enum { ATTRIBUTE_WARP_SIZE = 10, ATTRIBUTE_PROCESSORS = 16, ATTRIBUTE_MAJOR = 75 };
enum { PROCESSORS = 132, MAJOR = 9, WARP_SIZE = 32 };
static const char *const NAME = "rehearsed Hopper GPU";

/* cudaDeviceProp of CUDA 13, field by field; the reserved end is made larger, for later minor versions. */
struct properties {
    char name[256];
    char uuid[16];
    char luid[8];
    unsigned int luid_device_node_mask;
    size_t total_global_mem, shared_mem_per_block;
    int regs_per_block, warp_size;
    size_t mem_pitch;
    int max_threads_per_block, max_threads_dim[3], max_grid_size[3];
    size_t total_const_mem;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
    int multi_processor_count, integrated, can_map_host_memory;
    int texture_limits[25], surface_limits[14];
    size_t surface_alignment;
    int concurrent_kernels, ecc_enabled, pci_bus_id, pci_device_id, pci_domain_id, tcc_driver, async_engine_count;
    int unified_addressing, memory_bus_width, l2_cache_size, persisting_l2_cache_max_size;
    int max_threads_per_multi_processor, stream_priorities_supported, global_l1_cache_supported;
    int local_l1_cache_supported;
    size_t shared_mem_per_multiprocessor;
    int regs_per_multiprocessor, managed_memory, is_multi_gpu_board, multi_gpu_board_group_id;
    int host_native_atomic_supported, pageable_memory_access, concurrent_managed_access;
    int compute_preemption_supported, can_use_host_pointer, cooperative_launch;
    size_t shared_mem_per_block_optin;
};

static _Thread_local int current;
static size_t handles = 0x1000;

static int from_environment(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

static size_t memory(void) {
    const char *value = getenv("DSV3_REHEARSAL_BYTES");
    return value ? (size_t)atoll(value) : (size_t)80 << 30;
}

static int new_handle(void **handle) {
    *handle = (void *)__atomic_add_fetch(&handles, 16, __ATOMIC_RELAXED);
    return SUCCESS;
}

/* -- the device ------------------------------------------------------------------------------------ */

API int cudaGetDeviceCount(int *count) { *count = from_environment("DSV3_REHEARSAL_GPUS", 8); return SUCCESS; }
API int cudaGetDevice(int *device) { *device = current; return SUCCESS; }
API int cudaSetDevice(int device) { current = device; return SUCCESS; }
API int cudaGetLastError(void) { return SUCCESS; }
API int cudaPeekAtLastError(void) { return SUCCESS; }
API int cudaDriverGetVersion(int *version) { *version = 13020; return SUCCESS; }
API int cudaDeviceSynchronize(void) { return SUCCESS; }
API int cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 1; return SUCCESS; }
API int cudaDeviceGetPCIBusId(char *id, int length, int device) { strncpy(id, "0000:00:00.0", length); return SUCCESS; }

API int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}

API int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == ATTRIBUTE_PROCESSORS ? PROCESSORS : attribute == ATTRIBUTE_MAJOR ? MAJOR
           : attribute == ATTRIBUTE_WARP_SIZE ? WARP_SIZE : 0;
    return SUCCESS;
}

API int cudaGetDeviceProperties(struct properties *found, int device) {
    /* The caller's struct is of at least this size. */
    memset(found, 0, sizeof *found);
    strcpy(found->name, NAME);
    found->major = MAJOR;
    found->multi_processor_count = PROCESSORS;
    found->total_global_mem = memory();
    found->warp_size = WARP_SIZE;
    found->max_threads_per_block = 1024;
    found->max_threads_per_multi_processor = 2048;
    found->l2_cache_size = 50 << 20;
    found->shared_mem_per_block = 49152;
    found->shared_mem_per_block_optin = found->shared_mem_per_multiprocessor = 232448;
    found->regs_per_block = found->regs_per_multiprocessor = 65536;
    return SUCCESS;
}

API int cudaGetDeviceProperties_v2(struct properties *found, int device) {
    return cudaGetDeviceProperties(found, device);
}

/* -- memory ---------------------------------------------------------------------------------------- */

API int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = memory(); return SUCCESS; }
API int cudaFree(void *pointer) { return SUCCESS; }
API int cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    *pointer = malloc(size);
    return *pointer ? SUCCESS : OUT_OF_MEMORY;
}
API int cudaFreeHost(void *pointer) { free(pointer); return SUCCESS; }
/* struct cudaPointerAttributes: all zero is host memory that CUDA does not know. */
API int cudaPointerGetAttributes(void *attributes, const void *pointer) { memset(attributes, 0, 24); return SUCCESS; }

/* -- streams and events: all work is done -------------------------------------------------------- */

API int cudaStreamCreate(void **stream) { return new_handle(stream); }
API int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return new_handle(stream); }
API int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return new_handle(stream); }
API int cudaStreamDestroy(void *stream) { return SUCCESS; }
API int cudaStreamQuery(void *stream) { return SUCCESS; }
API int cudaStreamSynchronize(void *stream) { return SUCCESS; }
API int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return SUCCESS; }
API int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return SUCCESS; }
API int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return SUCCESS; }
API int cudaStreamGetCaptureInfo(void *stream, int *status, void *a, void *b, void *c, void *d, void *e) {
    *status = 0;
    return SUCCESS;
}
API int cudaThreadExchangeStreamCaptureMode(int *mode) { return SUCCESS; }
API int cudaEventCreate(void **event) { return new_handle(event); }
API int cudaEventCreateWithFlags(void **event, unsigned flags) { return new_handle(event); }
API int cudaEventDestroy(void *event) { return SUCCESS; }
API int cudaEventRecord(void *event, void *stream) { return SUCCESS; }
API int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return SUCCESS; }
API int cudaEventQuery(void *event) { return SUCCESS; }
API int cudaEventSynchronize(void *event) { return SUCCESS; }
API int cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 0; return SUCCESS; }

/* -- the driver, libcuda.so.1: the library is linked under this name too, so that torch finds it loaded -------- */

static int driver_success(void) { return SUCCESS; }

API int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
    if (flags) *flags = 0;
    if (is_active) *is_active = 1;
    return SUCCESS;
}

API int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                         void *status) {
    int is_state = !strcmp(name, "cuDevicePrimaryCtxGetState");
    *function = is_state ? (void *)cuDevicePrimaryCtxGetState : (void *)driver_success;
    if (status) *(int *)status = 0;
    return SUCCESS;
}

API int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, void *status) {
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, status);
}

/* torch looks these up when it starts, and calls none of them in a rehearsal. */
#define UNUSED(name) API int name(void) { return SUCCESS; }
UNUSED(cuCtxFromGreenCtx)
UNUSED(cuCtxGetCurrent)
UNUSED(cuCtxPopCurrent)
UNUSED(cuCtxPushCurrent)
UNUSED(cuCtxSetCurrent)
UNUSED(cuDevResourceGenerateDesc)
UNUSED(cuDevSmResourceSplitByCount)
UNUSED(cuDeviceGet)
UNUSED(cuDeviceGetAttribute)
UNUSED(cuDeviceGetDevResource)
UNUSED(cuGetErrorString)
UNUSED(cuGreenCtxCreate)
UNUSED(cuGreenCtxDestroy)
UNUSED(cuGreenCtxStreamCreate)
UNUSED(cuLogsRegisterCallback)
UNUSED(cuLogsUnregisterCallback)
UNUSED(cuMemAddressFree)
UNUSED(cuMemAddressReserve)
UNUSED(cuMemCreate)
UNUSED(cuMemExportToShareableHandle)
UNUSED(cuMemGetAddressRange)
UNUSED(cuMemGetAllocationGranularity)
UNUSED(cuMemGetAllocationPropertiesFromHandle)
UNUSED(cuMemImportFromShareableHandle)
UNUSED(cuMemMap)
UNUSED(cuMemRelease)
UNUSED(cuMemRetainAllocationHandle)
UNUSED(cuMemSetAccess)
UNUSED(cuMemUnmap)
UNUSED(cuMemsetD32Async)
UNUSED(cuMulticastAddDevice)
UNUSED(cuMulticastBindMem)
UNUSED(cuMulticastCreate)
UNUSED(cuMulticastUnbind)
UNUSED(cuStreamWriteValue32)
