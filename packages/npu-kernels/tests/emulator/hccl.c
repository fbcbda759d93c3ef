/* libhccl.so for a world of one: a collective hands its input on. A larger world is refused. */
#include <stdint.h>
#include <string.h>

typedef int HcclResult;
enum { NOT_SUPPORTED = 5 };

static size_t width(int dtype) {
  static const size_t widths[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16};
  return widths[dtype];
}

static HcclResult hand_on(const void *from, void *to, uint64_t count, int dtype) {
  if (from != to) memmove(to, from, count * width(dtype));
  return 0;
}

static HcclResult join(uint32_t ranks, void **comm) {
  static int world;
  *comm = &world;
  return ranks == 1 ? 0 : NOT_SUPPORTED;
}

HcclResult HcclGetRootInfo(void *info) { memset(info, 0, 1); return 0; }
HcclResult HcclCommInitRootInfo(uint32_t ranks, const void *info, uint32_t rank, void **comm) { return join(ranks, comm); }
HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const void *info, uint32_t rank, const void *config, void **comm) {
  return join(ranks, comm);
}
HcclResult HcclCommDestroy(void *comm) { return 0; }
HcclResult HcclGetCommName(void *comm, char *name) { strcpy(name, "emulated"); return 0; }
HcclResult HcclGetCommAsyncError(void *comm, HcclResult *error) { *error = 0; return 0; }
uint32_t HcclGetCommConfigCapability(void) { return 0; }
HcclResult HcclSetConfig(int what, int value) { return 0; }

HcclResult HcclAllReduce(void *from, void *to, uint64_t n, int dtype, int op, void *comm, void *stream) {
  return hand_on(from, to, n, dtype);
}
HcclResult HcclReduce(void *from, void *to, uint64_t n, int dtype, int op, uint32_t root, void *comm, void *stream) {
  return hand_on(from, to, n, dtype);
}
HcclResult HcclReduceScatter(void *from, void *to, uint64_t n, int dtype, int op, void *comm, void *stream) {
  return hand_on(from, to, n, dtype);
}
HcclResult HcclAllGather(void *from, void *to, uint64_t n, int dtype, void *comm, void *stream) {
  return hand_on(from, to, n, dtype);
}
HcclResult HcclScatter(void *from, void *to, uint64_t n, int dtype, uint32_t root, void *comm, void *stream) {
  return hand_on(from, to, n, dtype);
}
HcclResult HcclBroadcast(void *data, uint64_t n, int dtype, uint32_t root, void *comm, void *stream) { return 0; }
HcclResult HcclBarrier(void *comm, void *stream) { return 0; }
