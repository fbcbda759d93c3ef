/* libopapi.so: hands every aclnn call's arguments to the host, which computes the result.
 *
 * An aclnn op is two functions. aclnnXxxGetWorkspaceSize(arguments..., uint64_t *size, aclOpExecutor **executor) takes
 * all the arguments; aclnnXxx then launches. The build generates both for every op that the wheel names: the first
 * saves the registers and jumps to `emulator_record`, the second does nothing, for the work is done.
 */
#include <stdint.h>
#include <stdlib.h>

/* --- what arguments point to ------------------------------------------------------------------------------------- */

enum kind { TENSOR = 1, SCALAR, INTS, FLOATS, BOOLS, TENSORS, SCALARS };

typedef struct object {
  int64_t kind, dtype, offset, num_dims, sizes[16], strides[16], num_items;
  void *data;      /* a tensor's storage; a scalar's 16 bytes */
  uint64_t *items; /* of an array or list */
  struct object *next, *before;
} object;

static object all = {.next = &all, .before = &all};

static object *new_object(enum kind kind) {
  object *it = calloc(1, sizeof *it);
  it->kind = kind;
  it->next = all.next;
  it->before = &all;
  all.next->before = it;
  all.next = it;
  return it;
}

static int drop(object *it) {
  if (!it) return 0;
  it->next->before = it->before;
  it->before->next = it->next;
  if (it->kind == SCALAR) free(it->data);
  free(it->items);
  free(it);
  return 0;
}

/* The object at this address, or 0: an argument may be a number that only looks like one. */
object *emulator_object(uint64_t address) {
  for (object *it = all.next; it != &all; it = it->next)
    if ((uint64_t)it == address) return it;
  return 0;
}

void *aclCreateTensor(const int64_t *sizes, uint64_t n, int dtype, const int64_t *strides, int64_t offset, int format,
                      const int64_t *storage_sizes, uint64_t storage_n, void *data) {
  object *it = new_object(TENSOR);
  it->num_dims = n;
  it->dtype = dtype;
  it->offset = offset;
  it->data = data;
  for (uint64_t i = 0; i < n && i < 16; i++) {
    it->sizes[i] = sizes[i];
    it->strides[i] = strides ? strides[i] : 0;
  }
  return it;
}

void *aclCreateScalar(void *value, int dtype) {
  static const unsigned char width[] = {4, 2, 1, 4, 1, 0, 2, 2, 4, 8, 8, 8, 1, 0, 0, 0, 8, 16, [27] = 2};
  object *it = new_object(SCALAR);
  it->dtype = dtype;
  it->data = calloc(1, 16);
  for (int i = 0; dtype >= 0 && dtype <= 27 && i < width[dtype]; i++) ((char *)it->data)[i] = ((char *)value)[i];
  return it;
}

static object *array(enum kind kind, const void *values, uint64_t n, int width) {
  object *it = new_object(kind);
  it->num_items = n;
  it->items = calloc(n + 1, sizeof *it->items);
  for (uint64_t i = 0; i < n; i++)
    for (int byte = 0; byte < width; byte++)
      ((char *)(it->items + i))[byte] = ((const char *)values)[i * width + byte];
  return it;
}

void *aclCreateIntArray(const int64_t *values, uint64_t n) { return array(INTS, values, n, 8); }
void *aclCreateFloatArray(const float *values, uint64_t n) { return array(FLOATS, values, n, 4); }
void *aclCreateBoolArray(const void *values, uint64_t n) { return array(BOOLS, values, n, 1); }
void *aclCreateTensorList(void *const *values, uint64_t n) { return array(TENSORS, values, n, 8); }
void *aclCreateScalarList(void *const *values, uint64_t n) { return array(SCALARS, values, n, 8); }

static int drop_list(object *it) {
  for (int64_t i = 0; it && i < it->num_items; i++) drop(emulator_object(it->items[i]));
  return drop(it);
}

int aclDestroyTensor(object *it) { return drop(it); }
int aclDestroyScalar(object *it) { return drop(it); }
int aclDestroyIntArray(object *it) { return drop(it); }
int aclDestroyFloatArray(object *it) { return drop(it); }
int aclDestroyBoolArray(object *it) { return drop(it); }
int aclDestroyTensorList(object *it) { return drop_list(it); }
int aclDestroyScalarList(object *it) { return drop_list(it); }

/* --- calls -------------------------------------------------------------------------------------------------------- */

typedef int (*op_callback)(const char *op, int n, uint64_t *words, double *floats);
static op_callback on_op = 0;
void emulator_on_op(op_callback callback) { on_op = callback; }

extern const char *emulator_names[];

enum { MOST = 96, IN_REGISTERS = 6 };

/* Whether an argument is the address of a zeroed 64-bit local variable of the caller's. */
static int is_zeroed_local(uint64_t word, uint64_t stack) {
  return word > stack && word < stack + (1 << 17) && !(word & 7) && *(uint64_t *)word == 0;
}

/* `words`: the six integer registers, then the caller's stack; floating-point arguments stand in `floats`. The caller
 * passes no count: its last two arguments, the addresses of a size and an executor that are still 0, end the list. */
int emulator_record(int index, uint64_t *registers, double *floats, uint64_t *stack) {
  uint64_t words[MOST];
  for (int i = 0; i < MOST; i++) words[i] = i < IN_REGISTERS ? registers[i] : stack[i - IN_REGISTERS];
  int n = 0;
  while (n + 1 < MOST && !(is_zeroed_local(words[n], (uint64_t)stack) && is_zeroed_local(words[n + 1], (uint64_t)stack)))
    n++;
  return on_op ? on_op(emulator_names[index], n, words, floats) : 561000;
}
