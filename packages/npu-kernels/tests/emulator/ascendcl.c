/* libascendcl.so as far as torch_npu needs it: device memory is host memory, and every call is done when it returns.
 *
 * What stands here has an effect or an answer that torch_npu relies on; the build adds a stub that returns 0 (success)
 * for every other symbol that the wheel's libraries ask for.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int aclError;

/* --- device, context, streams, events ---------------------------------------------------------------------------- */

static int32_t current_device = 0;
static char last_error[4096] = "";

void emulator_set_error(const char *text) { snprintf(last_error, sizeof last_error, "%s", text); }
const char *aclGetRecentErrMsg(void) { return last_error; }

static void *new_handle(void) {
  static uintptr_t next = 0x1000;
  return (void *)(next += 16);
}

const char *aclrtGetSocName(void) { return "Ascend910B3"; }
aclError aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
aclError aclrtSetDevice(int32_t device) { current_device = device; return 0; }
aclError aclrtGetDevice(int32_t *device) { *device = current_device; return 0; }
aclError aclrtGetCurrentContext(void **context) { *context = (void *)(uintptr_t)(0x77 + current_device); return 0; }
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { *can = 0; return 0; }
aclError aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { if (value) *value = 0; return 0; }
aclError aclrtCreateStream(void **stream) { *stream = new_handle(); return 0; }
aclError aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) { *stream = new_handle(); return 0; }
aclError aclrtCreateEventWithFlag(void **event, uint32_t flag) { *event = new_handle(); return 0; }
aclError aclrtCreateEventExWithFlag(void **event, uint32_t flag) { *event = new_handle(); return 0; }
aclError aclrtEventElapsedTime(float *ms, void *begin, void *end) { *ms = 0; return 0; }
aclError aclrtQueryEventStatus(void *event, int *status) { *status = 1; return 0; }
aclError aclrtQueryEventWaitStatus(void *event, int *status) { *status = 1; return 0; }
aclError aclrtStreamQuery(void *stream, int *status) { *status = 0; return 0; }
aclError aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return 0; }
size_t aclGetCompileoptSize(int option) { return 1; }
aclError aclGetCompileopt(int option, char *value, size_t n) { if (n) value[0] = 0; return 0; }

/* Looked up by name, and nothing to do: the stubs that the build adds would not be found. */
#define SUCCEEDS(name) aclError name(void) { return 0; }
SUCCEEDS(aclInit)
SUCCEEDS(aclFinalize)
SUCCEEDS(aclSetCompileopt)
SUCCEEDS(aclrtCtxSetSysParamOpt)
SUCCEEDS(aclrtDestroyStreamForce)
SUCCEEDS(aclrtGetLastError)
SUCCEEDS(aclrtPeekAtLastError)
SUCCEEDS(aclrtResetDevice)
SUCCEEDS(aclrtSetCurrentContext)
SUCCEEDS(aclrtSetDeviceSatMode)
SUCCEEDS(aclrtSetOpExecuteTimeOut)
SUCCEEDS(aclrtSetOpWaitTimeout)
SUCCEEDS(aclrtSetStreamFailureMode)
SUCCEEDS(aclrtSetStreamOverflowSwitch)
SUCCEEDS(aclrtSetSysParamOpt)
SUCCEEDS(aclrtSynchronizeDevice)
SUCCEEDS(aclrtSynchronizeDeviceWithTimeout)
SUCCEEDS(aclrtSynchronizeStreamWithTimeout)

/* --- memory ------------------------------------------------------------------------------------------------------ */

aclError aclrtMalloc(void **pointer, size_t n, int policy) {
  size_t padded = ((n ? n : 1) + 32 + 511) / 512 * 512; /* CANN reads up to 32 bytes behind a tensor */
  *pointer = aligned_alloc(512, padded);
  return *pointer ? 0 : 207001;
}
aclError aclrtMallocAlign32(void **pointer, size_t n, int policy) { return aclrtMalloc(pointer, n, policy); }
aclError aclrtMallocHost(void **pointer, size_t n) { return aclrtMalloc(pointer, n, 0); }
aclError aclrtFree(void *pointer) { free(pointer); return 0; }
aclError aclrtFreeHost(void *pointer) { free(pointer); return 0; }
aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind) { memmove(to, from, n); return 0; }
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream) {
  memmove(to, from, n);
  return 0;
}
aclError aclrtMemset(void *to, size_t room, int32_t value, size_t n) { memset(to, value, n); return 0; }
aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t n, void *stream) { memset(to, value, n); return 0; }
aclError aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total) {
  *free_bytes = *total = (size_t)2 << 30;
  return 0;
}

/* --- the older way to run an op, by name: refused, so that no result is ever made up ------------------------------ */

typedef int (*named_op)(const char *op);
static named_op on_named_op = 0;
void emulator_on_named_op(named_op callback) { on_named_op = callback; }

aclError aclopCompileAndExecute(const char *op) { return on_named_op ? on_named_op(op) : 500002; }
aclError aclopCompileAndExecuteV2(const char *op) { return on_named_op ? on_named_op(op) : 500002; }
void *aclCreateTensorDesc(int dtype, int n, const int64_t *sizes, int format) { return new_handle(); }
void *aclCreateDataBuffer(void *data, size_t n) { return new_handle(); }
void *aclopCreateAttr(void) { return new_handle(); }
