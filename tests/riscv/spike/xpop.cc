// SPDX-License-Identifier: Apache-2.0
// Xpop_matmul 0.1 as an extension of the Spike simulator, written from docs/api/xpop-matmul.md alone:
// every weight is looked up where the document's formulas say, every float operation is SoftFloat's.
// Build and use: tests/riscv/xpop_cases.py; `--isa=rv64gcv_xpopmatmul`.
#include <riscv/extension.h>
#include <riscv/mmu.h>
#include <riscv/processor.h>
#include <riscv/trap.h>
#include <softfloat.h>

#include <array>
#include <cstdint>
#include <vector>

namespace {

using bytes = std::vector<uint8_t>;

// --- operands -----------------------------------------------------------------------------------

bytes read(mmu_t &mmu, reg_t at, size_t n) {
  bytes found(n);
  for (size_t i = 0; i < n; i++) found[i] = mmu.load<uint8_t>(at + i);
  return found;
}

// Faults of the results are those of stores, and come before the first write.
std::array<uint32_t, 64> open_results(mmu_t &mmu, reg_t at, unsigned tokens) {
  std::array<uint32_t, 64> old{};
  for (unsigned i = 0; i < 16 * tokens; i++)
    old[i] = mmu.amo<uint32_t>(at + 4 * i, [](uint32_t value) { return value; });
  return old;
}

void write_results(mmu_t &mmu, reg_t at, unsigned tokens, const std::array<uint32_t, 64> &results) {
  for (unsigned i = 0; i < 16 * tokens; i++) mmu.store<uint32_t>(at + 4 * i, results[i]);
}

[[noreturn]] void illegal(insn_t insn) { throw trap_illegal_instruction(insn.bits()); }

void check_alignment(reg_t rs1, reg_t rs2, reg_t rd) {
  if (rs1 & 15) throw trap_load_address_misaligned(false, rs1, 0, 0);
  if (rs2 & 15) throw trap_load_address_misaligned(false, rs2, 0, 0);
  if (rd & 255) throw trap_store_address_misaligned(false, rd, 0, 0);
}

// --- a tile -------------------------------------------------------------------------------------

uint16_t half(const bytes &tile, size_t at) { return tile[at] | tile[at + 1] << 8; }

uint32_t word(const bytes &tile, size_t at) {
  return half(tile, at) | uint32_t(half(tile, at + 2)) << 16;
}

int e(const bytes &tile, size_t a, unsigned r, unsigned k) {
  return int8_t(tile[a + 64 * (k / 4) + 4 * r + k % 4]);
}

int n(const bytes &tile, size_t a, unsigned r, unsigned k) {
  unsigned j = k % 16, byte = tile[a + 64 * (j / 4) + 4 * r + j % 4];
  return k < 16 ? byte & 0xf : byte >> 4;
}

int v(const bytes &tile, size_t a, unsigned r, unsigned k) {
  unsigned h = k / 16, j = k % 16, g = j / 4;
  return tile[a + 64 * h + 4 * r + j % 4] >> (2 * g) & 3;
}

uint32_t bits(uint32_t of, unsigned high, unsigned low) {
  return of >> low & ((uint32_t(1) << (high - low + 1)) - 1);
}

// --- floats -------------------------------------------------------------------------------------

float32_t operator*(float32_t a, float32_t b) { return f32_mul(a, b); }
float32_t operator+(float32_t a, float32_t b) { return f32_add(a, b); }
float32_t operator-(float32_t a, float32_t b) { return f32_sub(a, b); }
float32_t real(int32_t i) { return i32_to_f32(i); }

// Nearest even whatever frm is, and no flag changes.
class modes {
  uint_fast8_t rounding = softfloat_roundingMode, flags = softfloat_exceptionFlags;

 public:
  modes() { softfloat_roundingMode = softfloat_round_near_even; }
  ~modes() {
    softfloat_roundingMode = rounding;
    softfloat_exceptionFlags = flags;
  }
};

// --- the instructions ---------------------------------------------------------------------------

struct activations {
  bytes memory;
  unsigned tokens;

  int xq(unsigned b, unsigned t, unsigned k) const {
    return int8_t(memory[48 * (b * tokens + t) + k]);
  }
  float32_t dx(unsigned b, unsigned t) const {
    return float32_t{word(memory, 48 * (b * tokens + t) + 32)};
  }
};

enum type { u4, s4, s8 };
enum format { q4_0, q4_1, q8_0, q4_k, q6_k };

int dot_weight(unsigned type, const bytes &tile, unsigned r, unsigned k) {
  return type == s8 ? e(tile, 0, r, k) : n(tile, 0, r, k) - (type == s4 ? 8 : 0);
}

int step_weight(unsigned format, const bytes &tile, unsigned L, unsigned b, unsigned r, unsigned k) {
  size_t q = 32 * L + 416 * b;
  switch (format) {
    case q4_0: return n(tile, 32 * L + 256 * b, r, k) - 8;
    case q4_1: return n(tile, 64 * L + 256 * b, r, k);
    case q8_0: return e(tile, 32 * L + 512 * b, r, k);
    case q4_k: return n(tile, 256 + 256 * b, r, k);
    default: return n(tile, q + 32, r, k) + 16 * v(tile, q + 288, r, k) - 32;
  }
}

using weights = std::array<int, 32>;

// The sum over the weights from k to `end` of a row and token.
int32_t sum(const weights &w, const activations &x, unsigned b, unsigned t, unsigned k,
            unsigned end) {
  int32_t total = 0;
  for (; k < end; k++) total += w[k] * x.xq(b, t, k);
  return total;
}

// What block b adds to the accumulator of row r, whose weights w are, and token t.
float32_t step(unsigned format, const bytes &tile, unsigned L, const weights &w,
               const activations &x, unsigned b, unsigned t, unsigned r, float32_t acc) {
  auto f16 = [&](size_t at) { return f16_to_f32(float16_t{half(tile, at)}); };
  const float32_t dx = x.dx(b, t);
  int32_t isum = 0;
  for (unsigned k = 0; k < 32; k++) isum += x.xq(b, t, k);
  if (format == q6_k) {
    const size_t q = 32 * L + 416 * b;
    const int s0 = int8_t(tile[q + r]), s1 = int8_t(tile[q + 16 + r]);
    const int32_t both = s0 * sum(w, x, b, t, 0, 16) + s1 * sum(w, x, b, t, 16, 32);
    return acc + ((f16(32 * (b / 8) + 2 * r) * dx) * real(both));
  }
  const float32_t idot = real(sum(w, x, b, t, 0, 32));
  if (format == q4_k) {
    const uint32_t w0 = word(tile, 64 + 4 * r), w1 = word(tile, 128 + 4 * r);
    const uint32_t w2 = word(tile, 192 + 4 * r);
    const unsigned c = b < 4 ? 0 : b - 4;
    const uint32_t s = b < 4 ? bits(w0, 8 * b + 5, 8 * b)
                             : 16 * bits(w0, 8 * c + 7, 8 * c + 6) + bits(w2, 8 * c + 3, 8 * c);
    const uint32_t m = b < 4 ? bits(w1, 8 * b + 5, 8 * b)
                             : 16 * bits(w1, 8 * c + 7, 8 * c + 6) + bits(w2, 8 * c + 7, 8 * c + 4);
    acc = acc + (((f16(2 * r) * real(s)) * dx) * idot);
    return acc - (((f16(32 + 2 * r) * real(m)) * dx) * real(isum));
  }
  acc = acc + ((f16(32 * b + 2 * r) * dx) * idot);
  if (format == q4_1) acc = acc + ((f16(32 * L + 32 * b + 2 * r) * dx) * real(isum));
  return acc;
}

size_t tile_bytes(unsigned format, unsigned L) {
  switch (format) {
    case q4_0: return 288 * L;
    case q4_1: return 320 * L;
    case q8_0: return 544 * L;
    case q4_k: return 2304;
    default: return 3360 * L;
  }
}

reg_t pop_dot(processor_t *p, insn_t insn, reg_t pc) {
  const uint32_t i = insn.bits();
  const unsigned type = bits(i, 31, 29), tokens = bits(i, 27, 26) + 1;
  if (type > s8 || bits(i, 28, 28) || bits(i, 25, 25)) illegal(insn);
  auto &x = p->get_state()->XPR;
  const reg_t rs1 = x[bits(i, 19, 15)], rs2 = x[bits(i, 24, 20)], rd = x[bits(i, 11, 7)];
  check_alignment(rs1, rs2, rd);
  mmu_t &mmu = *p->get_mmu();
  const bytes tile = read(mmu, rs1, type == s8 ? 512 : 256);
  const activations a{read(mmu, rs2, 48 * tokens), tokens};
  std::array<uint32_t, 64> results = open_results(mmu, rd, tokens);
  for (unsigned t = 0; t < tokens; t++)
    for (unsigned r = 0; r < 16; r++) {
      int32_t total = 0;
      for (unsigned k = 0; k < 32; k++) total += dot_weight(type, tile, r, k) * a.xq(0, t, k);
      results[16 * t + r] = uint32_t(total);
    }
  write_results(mmu, rd, tokens, results);
  return pc + 4;
}

reg_t pop_step(processor_t *p, insn_t insn, reg_t pc) {
  const uint32_t i = insn.bits();
  const unsigned format = bits(i, 31, 29), L = bits(i, 28, 28) + 1, tokens = bits(i, 27, 26) + 1;
  if (format > q6_k || bits(i, 25, 25) || (format == q4_k && L == 2)) illegal(insn);
  auto &x = p->get_state()->XPR;
  const reg_t rs1 = x[bits(i, 19, 15)], rs2 = x[bits(i, 24, 20)], rd = x[bits(i, 11, 7)];
  check_alignment(rs1, rs2, rd);
  mmu_t &mmu = *p->get_mmu();
  const unsigned blocks = format == q4_k ? 8 : format == q6_k ? 8 * L : L;
  const bytes tile = read(mmu, rs1, tile_bytes(format, L));
  const activations a{read(mmu, rs2, 48 * blocks * tokens), tokens};
  std::array<uint32_t, 64> results = open_results(mmu, rd, tokens);
  modes nearest_even;
  for (unsigned b = 0; b < blocks; b++)
    for (unsigned r = 0; r < 16; r++) {
      weights w;
      for (unsigned k = 0; k < 32; k++) w[k] = step_weight(format, tile, L, b, r, k);
      for (unsigned t = 0; t < tokens; t++) {
        uint32_t &acc = results[16 * t + r];
        acc = step(format, tile, L, w, a, b, t, r, float32_t{acc}).v;
      }
    }
  write_results(mmu, rd, tokens, results);
  return pc + 4;
}

reg_t not_rv64(processor_t *, insn_t insn, reg_t) { illegal(insn); }

struct xpopmatmul : extension_t {
  const char *name() const override { return "xpopmatmul"; }

  std::vector<insn_desc_t> get_instructions(const processor_t &) override {
    auto described = [](insn_bits_t match, insn_func_t f) {
      return insn_desc_t{match, 0x707f, not_rv64, f, not_rv64, f, not_rv64, f, not_rv64, f};
    };
    return {described(0x000b, pop_dot), described(0x100b, pop_step)};
  }

  std::vector<disasm_insn_t *> get_disasms(const processor_t *) override { return {}; }
};

}  // namespace

// Spike takes the x of an ISA string for itself.
REGISTER_EXTENSION(popmatmul, []() -> extension_t * {
  static xpopmatmul extension;
  return &extension;
})
