// SPDX-License-Identifier: Apache-2.0
// Xpop_matmul 0.1 as an extension of the Spike simulator, written from docs/api/xpop-matmul.md alone: that
// it agrees with the other models checks the page, too.  Names and order are those of the page.
//
// spike --isa=rv64gcv_xpopmatmul --extlib=libxpop.so PROGRAM
#include <bit>
#include <cstring>
#include <riscv/extension.h>
#include <riscv/mmu.h>
#include <riscv/trap.h>
#include <softfloat.h>

static_assert(std::endian::native == std::endian::little, "operands are copied as they are in memory");

namespace {

constexpr unsigned ROWS = 16, MAX_TOKENS = 4, K = 32, ACTIVATION_BLOCK = 48;

// --- Encodings ------------------------------------------------------------------------------------

enum funct3 : unsigned { DOT, STEP };
enum type : unsigned { U4, S4, S8 };                    // bits 31:29 of pop.dot
enum format : unsigned { Q4_0, Q4_1, Q8_0, Q4_K, Q6_K }; // bits 31:29 of pop.step

struct operation {
    unsigned funct3, code, L, T;
    bool defined, rows_are_bytes; // the weights of a row: i8, or nibbles
    unsigned tile, B;             // bytes, blocks of 32 weights
};

operation decode(insn_t insn)
{
    static constexpr unsigned step_bytes[] = {288, 320, 544, 2304, 3360}; // with L = 1
    const uint32_t bits = insn.bits();
    const bool bit_25 = bits >> 25 & 1;
    operation op = {};
    op.funct3 = bits >> 12 & 7;
    op.code = bits >> 29;
    op.L = (bits >> 28 & 1) + 1;
    op.T = (bits >> 26 & 3) + 1;
    if (op.funct3 == DOT) {
        op.defined = !bit_25 && op.L == 1 && op.code <= S8;
        op.rows_are_bytes = op.code == S8;
        op.tile = op.rows_are_bytes ? 512 : 256;
        op.B = 1;
    } else if (op.funct3 == STEP && op.code <= Q6_K) {
        op.defined = !bit_25 && (op.code != Q4_K || op.L == 1);
        op.rows_are_bytes = op.code == Q8_0;
        op.tile = step_bytes[op.code] * op.L;
        op.B = op.code >= Q4_K ? 8 * op.L : op.L;
    }
    return op;
}

// --- Memory ---------------------------------------------------------------------------------------

// Operands are copied in units of 8 bytes, their bytes in the order of their addresses.
using unit = uint64_t;

unit in_memory(const mmu_t &mmu, unit value)
{
    const auto bytes = mmu.to_target(value);
    std::memcpy(&value, &bytes, sizeof value);
    return value;
}

void read(mmu_t &mmu, reg_t address, size_t size, uint8_t *to)
{
    for (size_t i = 0; i < size; i += sizeof(unit)) {
        if (i == 0 || (address + i) % PGSIZE == 0) {
            // An access fault unless it is main memory, as all of the page is: devices are not touched.
            mmu.load_reserved<unit>(address + i);
            mmu.yield_load_reservation();
        }
        const unit bytes = in_memory(mmu, mmu.load<unit>(address + i));
        std::memcpy(to + i, &bytes, sizeof bytes);
    }
}

// The results as they are.  An atomic operation that changes nothing finds all that may be wrong with
// reading or writing them, as an exception of a store, before any has a new value.
void read_results(mmu_t &mmu, reg_t address, size_t size, uint8_t *to)
{
    mmu.check_load_reservation(address, sizeof(unit)); // an access fault unless it is main memory
    for (size_t i = 0; i < size; i += sizeof(unit)) {
        const unit bytes = in_memory(mmu, mmu.amo<unit>(address + i, [](unit old) { return old; }));
        std::memcpy(to + i, &bytes, sizeof bytes);
    }
}

void write_results(mmu_t &mmu, reg_t address, size_t size, const uint8_t *from)
{
    for (size_t i = 0; i < size; i += sizeof(unit)) {
        unit bytes;
        std::memcpy(&bytes, from + i, sizeof bytes);
        mmu.store<unit>(address + i, in_memory(mmu, bytes));
    }
}

// --- Operands in memory ---------------------------------------------------------------------------

int e(const uint8_t *a, unsigned r, unsigned k)
{
    return static_cast<int8_t>(a[64 * (k / 4) + 4 * r + k % 4]);
}

int n(const uint8_t *a, unsigned r, unsigned k)
{
    const unsigned j = k % 16, byte = a[64 * (j / 4) + 4 * r + j % 4];
    return k < 16 ? byte & 15 : byte >> 4;
}

int v(const uint8_t *a, unsigned r, unsigned k)
{
    const unsigned h = k / 16, j = k % 16, g = j / 4;
    return a[64 * h + 4 * r + j % 4] >> 2 * g & 3;
}

uint32_t u32(const uint8_t *a)
{
    uint32_t value;
    std::memcpy(&value, a, sizeof value);
    return value;
}

void put_u32(uint8_t *a, uint32_t value)
{
    std::memcpy(a, &value, sizeof value);
}

float32_t f16(const uint8_t *a)
{
    return f16_to_f32({static_cast<uint16_t>(a[0] | a[1] << 8)});
}

// One block of weights, 32 of every row, with what scales it.
struct block {
    int8_t w[ROWS][K];
    float32_t d[ROWS], m[ROWS]; // of q4_k: times s and z
    int s0[ROWS], s1[ROWS];     // of q6_k; otherwise 1
};

void weights(block &block, const uint8_t *a, const uint8_t *two_bits, bool bytes, int offset)
{
    for (unsigned r = 0; r < ROWS; r++)
        for (unsigned k = 0; k < K; k++)
            block.w[r][k] = bytes      ? e(a, r, k)
                            : two_bits ? n(a, r, k) + 16 * v(two_bits, r, k) - offset
                                       : n(a, r, k) - offset;
}

void load_block(block &block, const operation &op, const uint8_t *tile, unsigned b)
{
    if (op.funct3 == DOT) {
        weights(block, tile, nullptr, op.rows_are_bytes, op.code == S4 ? 8 : 0);
        return;
    }
    const unsigned L = op.L, q = 32 * L + 416 * b;
    switch (op.code) {
    case Q4_0:
        weights(block, tile + 32 * L + 256 * b, nullptr, false, 8);
        break;
    case Q4_1:
        weights(block, tile + 64 * L + 256 * b, nullptr, false, 0);
        break;
    case Q8_0:
        weights(block, tile + 32 * L + 512 * b, nullptr, true, 0);
        break;
    case Q4_K:
        weights(block, tile + 256 + 256 * b, nullptr, false, 0);
        break;
    case Q6_K:
        weights(block, tile + q + 32, tile + q + 288, false, 32);
        break;
    }
    for (unsigned r = 0; r < ROWS; r++) {
        block.s0[r] = block.s1[r] = 1;
        if (op.code == Q4_K) {
            const uint32_t w0 = u32(tile + 64 + 4 * r), w1 = u32(tile + 128 + 4 * r);
            const uint32_t w2 = u32(tile + 192 + 4 * r);
            const unsigned c = b - 4;
            const int s = b < 4 ? w0 >> 8 * b & 63 : 16 * (w0 >> (8 * c + 6) & 3) + (w2 >> 8 * c & 15);
            const int z =
                b < 4 ? w1 >> 8 * b & 63 : 16 * (w1 >> (8 * c + 6) & 3) + (w2 >> (8 * c + 4) & 15);
            block.d[r] = f32_mul(f16(tile + 2 * r), i32_to_f32(s));
            block.m[r] = f32_mul(f16(tile + 32 + 2 * r), i32_to_f32(z));
        } else if (op.code == Q6_K) {
            block.d[r] = f16(tile + 32 * (b / 8) + 2 * r);
            block.s0[r] = static_cast<int8_t>(tile[q + r]);
            block.s1[r] = static_cast<int8_t>(tile[q + 16 + r]);
        } else {
            block.d[r] = f16(tile + 32 * b + 2 * r);
            if (op.code == Q4_1)
                block.m[r] = f16(tile + 32 * L + 32 * b + 2 * r);
        }
    }
}

// --- What they compute ----------------------------------------------------------------------------

int dot(const int8_t *w, const int8_t *xq, unsigned count)
{
    int sum = 0;
    for (unsigned k = 0; k < count; k++)
        sum += w[k] * xq[k];
    return sum;
}

// (d x dx) x float(integer)
float32_t scaled(float32_t d, float32_t dx, int integer)
{
    return f32_mul(f32_mul(d, dx), i32_to_f32(integer));
}

void compute(const operation &op, const uint8_t *tile, const uint8_t *activations, uint8_t *results)
{
    block block;
    for (unsigned b = 0; b < op.B; b++) {
        load_block(block, op, tile, b);
        for (unsigned t = 0; t < op.T; t++) {
            const uint8_t *x = activations + ACTIVATION_BLOCK * (b * op.T + t);
            int8_t xq[K];
            std::memcpy(xq, x, K);
            const float32_t dx = {u32(x + 32)};
            int isum = 0;
            for (unsigned k = 0; k < K; k++)
                isum += xq[k];
            for (unsigned r = 0; r < ROWS; r++) {
                uint8_t *result = results + 64 * t + 4 * r;
                const int sum0 = dot(block.w[r], xq, 16), sum1 = dot(block.w[r] + 16, xq + 16, 16);
                if (op.funct3 == DOT) {
                    put_u32(result, sum0 + sum1);
                    continue;
                }
                const int integer = block.s0[r] * sum0 + block.s1[r] * sum1;
                float32_t acc = f32_add({u32(result)}, scaled(block.d[r], dx, integer));
                if (op.code == Q4_1)
                    acc = f32_add(acc, scaled(block.m[r], dx, isum));
                else if (op.code == Q4_K)
                    acc = f32_sub(acc, scaled(block.m[r], dx, isum));
                put_u32(result, acc.v);
            }
        }
    }
}

// Spike's floats round as its last instruction did and collect flags: neither is of these instructions.
struct to_nearest {
    const uint_fast8_t mode = softfloat_roundingMode, flags = softfloat_exceptionFlags;
    to_nearest() { softfloat_roundingMode = softfloat_round_near_even; }
    ~to_nearest()
    {
        softfloat_roundingMode = mode;
        softfloat_exceptionFlags = flags;
    }
};

// --- Exceptions, in their order -------------------------------------------------------------------

reg_t execute(processor_t *p, insn_t insn, reg_t pc)
{
    const operation op = decode(insn);
    if (!op.defined)
        throw trap_illegal_instruction(insn.bits());
    state_t &state = *p->get_state();
    mmu_t &mmu = *p->get_mmu();
    const reg_t rs1 = state.XPR[insn.rs1()], rs2 = state.XPR[insn.rs2()], rd = state.XPR[insn.rd()];
    if (rs1 % 16)
        throw trap_load_address_misaligned(state.v, rs1, 0, 0);
    if (rs2 % 16)
        throw trap_load_address_misaligned(state.v, rs2, 0, 0);
    if (rd % 256)
        throw trap_store_address_misaligned(state.v, rd, 0, 0);
    uint8_t tile[2 * 3360], activations[ACTIVATION_BLOCK * 16 * MAX_TOKENS];
    uint8_t results[4 * ROWS * MAX_TOKENS];
    read(mmu, rs1, op.tile, tile);
    read(mmu, rs2, ACTIVATION_BLOCK * op.B * op.T, activations);
    read_results(mmu, rd, 4 * ROWS * op.T, results);
    {
        to_nearest rounding;
        compute(op, tile, activations, results);
    }
    write_results(mmu, rd, 4 * ROWS * op.T, results);
    return pc + 4;
}

// RV64E has x0 to x15.
reg_t execute_e(processor_t *p, insn_t insn, reg_t pc)
{
    if ((insn.rd() | insn.rs1() | insn.rs2()) >= 16)
        throw trap_illegal_instruction(insn.bits());
    return execute(p, insn, pc);
}

struct xpop_t : extension_t {
    const char *name() const override { return "xpopmatmul"; }
    std::vector<insn_desc_t> get_instructions(const processor_t &) override
    {
        // All of custom-0; illegal with another XLEN than 64.
        const insn_func_t none = &::illegal_instruction;
        return {{0x0b, 0x7f, none, execute, none, execute_e, none, execute, none, execute_e}};
    }
    std::vector<disasm_insn_t *> get_disasms(const processor_t *) override { return {}; }
};

REGISTER_EXTENSION(popmatmul, []() -> extension_t * { static xpop_t extension; return &extension; })

} // namespace
