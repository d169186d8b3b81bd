// The arithmetic of a decoding pass on one thread: what each function computes, and which processor runs which build.
//
// The same source (kernels_body.h) is compiled for three instruction sets, and the best that the processor has is taken
// when the extension is loaded. Activations are fp32 in memory. A row's result depends on neither the number of rows
// nor the number of threads: every sum has one order.
#pragma once

#include <cstdint>

namespace llm_parallel::decode {

constexpr int64_t kGroup = 32;   // numbers of a row that share a scale, in activations and in int4 weights
constexpr int64_t kBlock = 16;   // outputs that lie side by side in a packed matrix
constexpr int64_t kBlock4 = 320; // bytes of a block's group in int4: 256 of codes, 16 scales and 16 offsets in bf16
constexpr int64_t kBlock8 = 512; // bytes of a block's group in int8

enum class Kind { kFloat, kBfloat, kInt8, kInt4 };

// A matrix [rows, columns]. kFloat and kBfloat: row after row. kInt8 and kInt4: blocks of 16 rows; within a block,
// groups of 32 columns; within a group, runs of 4 columns; within a run, each row's 4 codes. int8 codes are unsigned,
// 128 stands for 0, and scales are fp32 by row. int4 has two runs in a byte, the first in the low bits; the group's
// scales and offsets follow its codes, and code c stands for (c - 8) scale + offset.
struct Matrix {
    Kind kind = Kind::kFloat;
    const void* data = nullptr;
    const float* scales = nullptr;
    int64_t rows = 0, columns = 0;
};

// Rows of activations in the forms that products take. quants: round(x / step) in groups of 32, |quant| <= 127; sums:
// of a group's quants.
struct Rows {
    const float* values = nullptr;
    const int8_t* quants = nullptr;
    const float* steps = nullptr;
    const int32_t* sums = nullptr;
    int64_t count = 0;
};

// Keys and values of one layer, [slots, groups, head_dim]; page p has the slots from p * page_tokens on.
struct Cache {
    void *keys = nullptr, *values = nullptr;
    bool bfloat = false;
    int64_t groups = 0, head_dim = 0, page_tokens = 0;
};

// The keys that a query sees: those from first to length - 1 of the sequence whose pages are given.
struct Seen {
    const int32_t* pages;
    int64_t first, length;
};

struct Scores {
    float scale = 1.0f, softcap = 0.0f;
};

struct Kernels {
    const char* name;
    // Outputs [begin, end) of all rows: y[row * stride + output]. begin is a multiple of 16.
    void (*product)(const Matrix&, const Rows&, int64_t begin, int64_t end, float* y, int64_t stride);
    // One row of n numbers, a multiple of kGroup.
    void (*quantize)(const float* x, int64_t n, int8_t* quants, float* steps, int32_t* sums);
    void (*to_bfloat)(const float* x, int64_t n, uint16_t* y);
    void (*from_bfloat)(const uint16_t* x, int64_t n, float* y);
    // x / sqrt(mean(x^2) + eps) * weight
    void (*norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
    // silu(gate) * up
    void (*gated)(const float* gate, const float* up, int64_t n, float* y);
    void (*add)(const float* x, int64_t n, float* y);  // y += x
    // x [head_dim] * cos + its halves exchanged * sin
    void (*rotate)(const float* x, const float* cos, const float* sin, int64_t head_dim, float* y);
    // Heads [heads, head_dim] of one group and one query. scratch: heads * (length - first + 64) numbers.
    void (*attend)(const float* q, int64_t heads, const Cache&, int64_t group, const Seen&, const Scores&,
                   float* scratch, float* out);
    // Largest number of a row, where it first stands, and the logarithm of the sum of exponentials.
    void (*best)(const float* x, int64_t n, float* largest, int64_t* place, float* log_sum);
};

const Kernels& kernels();                       // those in use, at first the best that this processor has
const Kernels* kernels_named(const char* name); // null if this processor cannot run them
bool use_kernels(const char* name);             // whether they can be had

}  // namespace llm_parallel::decode
