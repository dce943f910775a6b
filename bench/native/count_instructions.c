/* SPDX-License-Identifier: Apache-2.0 */
/* A plugin of QEMU's user-mode emulation: what a RISC-V program executes, by function and kind.
 *
 * Built and loaded by bench/counting.py alone.  Its arguments: functions=FILE, lines of "first
 * address, address behind the last, number" in hexadecimal, ascending, without overlaps; count=N, how many numbers
 * there are; out=FILE, where the counts go when the program ends, lines of "number kind count"; and
 * vlen=BITS, as the emulated processor has it.  Number 0 is what lies in no function of the list.
 *
 * The kind of a vector instruction says how many beats of 128 bits its widest operand has, which
 * depends on vtype and vl.  Plugins cannot read registers, so both are followed from the instructions that set
 * them: where the length asked for is in a register, the whole group counts.
 *
 * Counts are exact and the same in every run.  For programs of one thread.  The declarations of QEMU's
 * interface are those of its documentation (plugin version 1), which Debian ships no header of.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* --- QEMU's interface --------------------------------------------------------------------- */

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info;

enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                           void (*call)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *insn,
                                                enum qemu_plugin_op op, void *at, uint64_t value);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn,
                                            void (*call)(unsigned, void *),
                                            enum qemu_plugin_cb_flags flags, void *data);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*call)(qemu_plugin_id_t, void *),
                                    void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn);

EXPORT int qemu_plugin_version = 1;

/* --- kinds -------------------------------------------------------------------------------- */

/* bench/counting.py has the same list. */
enum kind {
  KIND_ALU,
  KIND_LOAD,
  KIND_STORE,
  KIND_JUMP,
  KIND_MUL,
  KIND_DIV,
  KIND_FLOAT,
  KIND_FLOAT_DIV,
  KIND_SYSTEM,
  KIND_VSET,
  /* Of each of these, BEATS_MAX kinds: of 1 to BEATS_MAX beats. */
  KIND_VECTOR = 16,
};

enum vector {
  VECTOR_INT,
  VECTOR_MUL,
  VECTOR_FLOAT,
  VECTOR_FLOAT_DIV,
  VECTOR_REDUCE,
  VECTOR_PERMUTE,
  VECTOR_LOAD,
  VECTOR_STORE,
  VECTOR_LOAD_ELEMENTS, /* strided and indexed: the beats are elements */
  VECTOR_STORE_ELEMENTS,
  VECTORS,
};

#define BEAT_BITS 128
#define BEATS_MAX 128 /* 8 registers of 1,024 bits, twice as wide; elements of a strided load */
#define KIND_XPOP (KIND_VECTOR + VECTORS * BEATS_MAX) /* of 1,024 kinds: funct7, funct3 */
#define KINDS (KIND_XPOP + 1024)

/* --- what is counted ---------------------------------------------------------------------- */

struct function {
  uint64_t begin, end;
  size_t number;
};

/* A vector instruction as it was translated; its kind follows from vtype when it is executed. */
struct vector_insn {
  uint64_t *counts;
  enum vector what;
  unsigned width; /* bits of an element of the widest operand; 0: times SEW */
  unsigned times;
};

static struct function *functions;
static size_t functions_count, numbers;
static uint64_t *counts; /* [numbers][KINDS] */
static const char *out_path;
static unsigned vlen;

/* What the last vset* has left. */
static unsigned sew = 8, lmul_eighths = 8;
static unsigned vl;

static void die(const char *what, const char *which)
{
  fprintf(stderr, "count_instructions: %s: %s\n", what, which);
  exit(2);
}

static unsigned vlmax(void)
{
  return vlen * lmul_eighths / 8 / sew;
}

static uint64_t *counts_of(uint64_t address)
{
  size_t low = 0, high = functions_count;

  while (low < high) {
    size_t middle = low + (high - low) / 2;

    if (functions[middle].end <= address)
      low = middle + 1;
    else
      high = middle;
  }
  if (low < functions_count && functions[low].begin <= address)
    return counts + functions[low].number * KINDS;
  return counts;
}

static void on_vset(unsigned cpu, void *data)
{
  uint32_t word = (uint32_t)(uintptr_t)data;
  bool immediate = word >> 30 == 3, in_register = word >> 30 == 2;
  uint32_t vtype = immediate ? word >> 20 & 0x3ff : word >> 20 & 0x7ff;
  uint32_t rd = word >> 7 & 31, rs1 = word >> 15 & 31;
  static const unsigned eighths[] = {8, 16, 32, 64, 0, 1, 2, 4};

  (void)cpu;
  if (in_register) /* vsetvl: only what saves and restores the state of others */
    return;
  sew = 8u << (vtype >> 3 & 7);
  lmul_eighths = eighths[vtype & 7];
  if (immediate)
    vl = rs1 < vlmax() ? rs1 : vlmax();
  else if (rs1 != 0 || rd != 0)
    vl = vlmax();
}

static void on_vector(unsigned cpu, void *data)
{
  const struct vector_insn *insn = data;
  unsigned beats;

  (void)cpu;
  if (insn->what == VECTOR_LOAD_ELEMENTS || insn->what == VECTOR_STORE_ELEMENTS) {
    beats = vl;
  } else {
    unsigned width = insn->width ? insn->width : sew * insn->times;

    beats = (vl * width + BEAT_BITS - 1) / BEAT_BITS;
  }
  beats = beats < 1 ? 1 : beats > BEATS_MAX ? BEATS_MAX : beats;
  insn->counts[KIND_VECTOR + insn->what * BEATS_MAX + beats - 1]++;
}

/* --- decoding ----------------------------------------------------------------------------- */

static enum kind compressed_kind(uint32_t word)
{
  switch ((word & 3) << 3 | (word >> 13 & 7)) {
  case 001: /* c.fld */
  case 002:
  case 003:
  case 021:
  case 022:
  case 023:
    return KIND_LOAD;
  case 005:
  case 006:
  case 007:
  case 025:
  case 026:
  case 027:
    return KIND_STORE;
  case 015: /* c.j, c.beqz, c.bnez */
  case 016:
  case 017:
    return KIND_JUMP;
  case 024: /* c.jr, c.jalr; c.mv and c.add name a second register */
    return (word >> 2 & 31) == 0 ? KIND_JUMP : KIND_ALU;
  default:
    return KIND_ALU;
  }
}

static enum kind scalar_kind(uint32_t word)
{
  uint32_t funct3 = word >> 12 & 7, funct7 = word >> 25;

  switch (word & 0x7f) {
  case 0x03:
  case 0x07:
    return KIND_LOAD;
  case 0x23:
  case 0x27:
    return KIND_STORE;
  case 0x2f:
    return KIND_LOAD;
  case 0x63:
  case 0x67:
  case 0x6f:
    return KIND_JUMP;
  case 0x33:
  case 0x3b:
    if (funct7 == 1)
      return funct3 < 4 ? KIND_MUL : KIND_DIV;
    return KIND_ALU;
  case 0x43:
  case 0x47:
  case 0x4b:
  case 0x4f:
    return KIND_FLOAT;
  case 0x53:
    return funct7 >> 2 == 3 || funct7 >> 2 == 11 ? KIND_FLOAT_DIV : KIND_FLOAT;
  case 0x0f:
  case 0x73:
    return KIND_SYSTEM;
  default:
    return KIND_ALU;
  }
}

static bool is_vector_memory(uint32_t word)
{
  uint32_t width = word >> 12 & 7, opcode = word & 0x7f;

  return (opcode == 0x07 || opcode == 0x27) && (width == 0 || width >= 5);
}

static void vector_memory(uint32_t word, struct vector_insn *insn)
{
  static const unsigned widths[] = {8, 0, 0, 0, 0, 16, 32, 64};
  bool load = (word & 0x7f) == 0x07;

  if ((word >> 26 & 3) == 0) { /* unit stride */
    insn->what = load ? VECTOR_LOAD : VECTOR_STORE;
    insn->width = widths[word >> 12 & 7];
  } else {
    insn->what = load ? VECTOR_LOAD_ELEMENTS : VECTOR_STORE_ELEMENTS;
  }
}

static void vector_arithmetic(uint32_t word, struct vector_insn *insn)
{
  uint32_t form = word >> 12 & 7, funct6 = word >> 26;
  bool is_float = form == 1 || form == 5, is_mul = form == 2 || form == 6;

  insn->times = 1;
  if (is_float) {
    insn->what = VECTOR_FLOAT;
    if (funct6 == 0x20 || funct6 == 0x21) /* vfdiv, vfrdiv */
      insn->what = VECTOR_FLOAT_DIV;
    else if (funct6 == 0x13 && (word >> 15 & 31) == 0) /* vfsqrt */
      insn->what = VECTOR_FLOAT_DIV;
    else if (form == 1 && (funct6 == 1 || funct6 == 3 || funct6 == 5 || funct6 == 7))
      insn->what = VECTOR_REDUCE;
    else if (funct6 >= 0x30) /* widening arithmetic */
      insn->times = 2;
    else if (funct6 == 0x12 && (word >> 18 & 3) != 0) /* widening and narrowing conversions */
      insn->times = 2;
    else if (form == 5 && (funct6 == 0x0e || funct6 == 0x0f))
      insn->what = VECTOR_PERMUTE;
  } else if (is_mul) {
    insn->what = VECTOR_MUL;
    if (form == 2 && funct6 < 8)
      insn->what = VECTOR_REDUCE;
    else if (funct6 >= 0x30)
      insn->times = 2;
    else if (funct6 == 0x0e || funct6 == 0x0f || funct6 == 0x17)
      insn->what = VECTOR_PERMUTE;
    else if (funct6 < 0x18)
      insn->what = VECTOR_INT;
    if (funct6 >= 0x30 && funct6 <= 0x37) /* widening additions */
      insn->what = VECTOR_INT;
  } else {
    insn->what = VECTOR_INT;
    if (form == 0 && (funct6 == 0x30 || funct6 == 0x31)) { /* widening sums */
      insn->what = VECTOR_REDUCE;
      insn->times = 2;
    } else if (funct6 == 0x0c || funct6 == 0x0e || funct6 == 0x0f) { /* gathers, slides */
      insn->what = VECTOR_PERMUTE;
    } else if (funct6 >= 0x2c && funct6 <= 0x2f) { /* narrowing shifts and clips */
      insn->times = 2;
    } else if (form == 3 && funct6 == 0x27) { /* whole registers */
      insn->what = VECTOR_PERMUTE;
    }
  }
}

static void on_insn(struct qemu_plugin_insn *insn)
{
  uint64_t *of = counts_of(qemu_plugin_insn_vaddr(insn));
  size_t bytes = qemu_plugin_insn_size(insn);
  uint32_t word = 0;
  struct vector_insn *vector;
  size_t kind;

  memcpy(&word, qemu_plugin_insn_data(insn), bytes < 4 ? 2 : 4);
  if ((word & 3) != 3) {
    kind = compressed_kind(word);
  } else if ((word & 0x7f) == 0x57 && (word >> 12 & 7) == 7) {
    kind = KIND_VSET;
    qemu_plugin_register_vcpu_insn_exec_cb(insn, on_vset, QEMU_PLUGIN_CB_NO_REGS,
                                           (void *)(uintptr_t)word);
  } else if ((word & 0x7f) == 0x57 || is_vector_memory(word)) {
    vector = calloc(1, sizeof(*vector)); /* as long as the translation, which is never told of */
    if (!vector)
      die("no memory", "for a vector instruction");
    vector->counts = of;
    if ((word & 0x7f) == 0x57)
      vector_arithmetic(word, vector);
    else
      vector_memory(word, vector);
    qemu_plugin_register_vcpu_insn_exec_cb(insn, on_vector, QEMU_PLUGIN_CB_NO_REGS, vector);
    return;
  } else if ((word & 0x7f) == 0x0b) {
    kind = KIND_XPOP + (size_t)(word >> 25 << 3 | (word >> 12 & 7));
  } else {
    kind = scalar_kind(word);
  }
  qemu_plugin_register_vcpu_insn_exec_inline(insn, QEMU_PLUGIN_INLINE_ADD_U64, of + kind, 1);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
  size_t count = qemu_plugin_tb_n_insns(tb);

  (void)id;
  for (size_t i = 0; i < count; i++)
    on_insn(qemu_plugin_tb_get_insn(tb, i));
}

/* --- begin and end ------------------------------------------------------------------------ */

static void read_functions(const char *path)
{
  size_t room = 0;
  struct function f;
  FILE *file = fopen(path, "r");

  if (!file)
    die("cannot read", path);
  while (fscanf(file, "%" SCNx64 " %" SCNx64 " %zx", &f.begin, &f.end, &f.number) == 3) {
    if (f.number >= numbers || f.begin >= f.end ||
        (functions_count && functions[functions_count - 1].end > f.begin))
      die("not ascending, or not below count", path);
    if (functions_count == room) {
      room = room ? 2 * room : 256;
      functions = realloc(functions, room * sizeof(*functions));
      if (!functions)
        die("no memory", path);
    }
    functions[functions_count++] = f;
  }
  if (!feof(file))
    die("not lines of three hexadecimal numbers", path);
  fclose(file);
}

static void on_exit_(qemu_plugin_id_t id, void *data)
{
  FILE *file = fopen(out_path, "w");

  (void)id;
  (void)data;
  if (!file)
    die("cannot write", out_path);
  for (size_t i = 0; i < numbers * KINDS; i++)
    if (counts[i])
      fprintf(file, "%zu %zu %" PRIu64 "\n", i / KINDS, i % KINDS, counts[i]);
  if (fclose(file) != 0)
    die("cannot write", out_path);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info *info, int argc,
                               char **argv)
{
  const char *path = NULL;

  (void)info;
  for (int i = 0; i < argc; i++) {
    char *value = strchr(argv[i], '=');

    if (!value)
      die("expected key=value", argv[i]);
    *value++ = 0;
    if (strcmp(argv[i], "functions") == 0)
      path = strdup(value);
    else if (strcmp(argv[i], "out") == 0)
      out_path = strdup(value);
    else if (strcmp(argv[i], "count") == 0)
      numbers = strtoul(value, NULL, 10);
    else if (strcmp(argv[i], "vlen") == 0)
      vlen = (unsigned)strtoul(value, NULL, 10);
    else
      die("unknown argument", argv[i]);
  }
  if (!path || !out_path || !numbers || numbers > 1 << 16 || vlen < 64 || vlen > 65536)
    die("expected functions=, out=, count= and vlen=", "arguments");
  counts = calloc(numbers, KINDS * sizeof(*counts));
  if (!counts)
    die("no memory", "for the counts");
  read_functions(path);
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  qemu_plugin_register_atexit_cb(id, on_exit_, NULL);
  return 0;
}
