// Products with int8 and int4 matrices; included by kernels_body.h's includers below it. The sum over a group of 32 is
// exact in whole numbers; the sum over groups has one order.

#if defined(DECODE_AVX512)

// Scales or offsets of a block, fp32.
inline __m512 sixteen(const uint8_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512i four(const int8_t* p) {  // 4 quants of x, for each output
    int32_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return _mm512_set1_epi32(bits);
}

template <int kTokens, bool kFour>
void block(const uint8_t* data, const Rows& x, int64_t first, int64_t columns, const float* scales, float* y,
           int64_t stride, int64_t outputs) {
    const int64_t groups = columns / kGroup;
    const __m512i low = _mm512_set1_epi8(15);
    const int8_t* quants = x.quants + first * columns;
    const float* steps = x.steps + first * groups;
    const int32_t* group_sums = x.sums + first * groups;
    __m512 total[kTokens];
    for (int t = 0; t < kTokens; ++t) total[t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
        __m512i codes[8];
        if (kFour) {
            for (int p = 0; p < 4; ++p) {
                const __m512i both = _mm512_loadu_si512(data + 64 * p);
                codes[2 * p] = _mm512_and_si512(both, low);
                codes[2 * p + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            }
        } else {
            for (int p = 0; p < 8; ++p) codes[p] = _mm512_loadu_si512(data + 64 * p);
        }
        const __m512 scale = kFour ? sixteen(data + 256) : _mm512_setzero_ps();
        const __m512 offset = kFour ? sixteen(data + 288) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
            const int8_t* q = quants + t * columns + g * kGroup;
            const int32_t group_sum = group_sums[t * groups + g];
            const float step = steps[t * groups + g];
            __m512i a = _mm512_set1_epi32((kFour ? -8 : -128) * group_sum), b = _mm512_setzero_si512();
            for (int p = 0; p < 8; p += 2) {
                a = _mm512_dpbusd_epi32(a, codes[p], four(q + 4 * p));
                b = _mm512_dpbusd_epi32(b, codes[p + 1], four(q + 4 * p + 4));
            }
            const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(a, b));
            if (kFour) {
                total[t] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(step)), dot, total[t]);
                total[t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(step * static_cast<float>(group_sum)), total[t]);
            } else {
                total[t] = _mm512_fmadd_ps(_mm512_set1_ps(step), dot, total[t]);
            }
        }
        data += kFour ? kBlock4 : kBlock8;
    }
    const __mmask16 kept = outputs >= 16 ? 0xffff : static_cast<__mmask16>((1u << outputs) - 1);
    const __m512 by_row = kFour ? _mm512_set1_ps(1.0f) : _mm512_maskz_loadu_ps(kept, scales);
    for (int t = 0; t < kTokens; ++t) {
        const __m512 out = kFour ? total[t] : _mm512_mul_ps(total[t], by_row);
        _mm512_mask_storeu_ps(y + (first + t) * stride, kept, out);
    }
}

constexpr int kPackedTokens = 6;

#else

// The sums of codes * quants over a group for each of 16 outputs.
template <bool kFour>
inline void dots(const uint8_t* data, const int8_t* q, int32_t group_sum, int32_t* out) {
#if defined(DECODE_AVX2)
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; ++half) {  // 8 outputs
        __m256i total = _mm256_setzero_si256();
        for (int p = 0; p < 4; ++p) {
            for (int odd = 0; odd < 2; ++odd) {
                int32_t bits;
                __builtin_memcpy(&bits, q + 8 * p + 4 * odd, sizeof bits);
                const __m256i x = _mm256_set1_epi32(bits);
                __m256i pairs;
                if (kFour) {
                    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 64 * p + 32 * half));
                    const __m256i codes = _mm256_and_si256(odd ? _mm256_srli_epi16(both, 4) : both, low);
                    pairs = _mm256_maddubs_epi16(codes, x);
                } else {  // |x| and the codes with x's sign, so that a sum of two fits into 16 bits
                    const uint8_t* from = data + 128 * p + 64 * odd + 32 * half;
                    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
                    const __m256i signed_codes = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                    pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(signed_codes, x));
                }
                total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
            }
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * half), total);
    }
    if (kFour)
        for (int o = 0; o < 16; ++o) out[o] -= 8 * group_sum;
#else
    for (int o = 0; o < 16; ++o) out[o] = (kFour ? -8 : -128) * group_sum;
    for (int p = 0; p < 8; ++p) {
        for (int o = 0; o < 16; ++o) {
            for (int k = 0; k < 4; ++k) {
                const int both = data[64 * (kFour ? p / 2 : p) + 4 * o + k];
                out[o] += (kFour ? (p % 2 ? both >> 4 : both & 15) : both) * q[4 * p + k];
            }
        }
    }
#endif
}

template <int kTokens, bool kFour>
void block(const uint8_t* data, const Rows& x, int64_t first, int64_t columns, const float* scales, float* y,
           int64_t stride, int64_t outputs) {
    const int64_t groups = columns / kGroup;
    float total[kTokens][16] = {};
    for (int64_t g = 0; g < groups; ++g) {
        for (int t = 0; t < kTokens; ++t) {
            int32_t found[16];
            const int64_t at = (first + t) * groups + g;
            dots<kFour>(data, x.quants + (first + t) * columns + g * kGroup, x.sums[at], found);
            const float step = x.steps[at], shift = step * static_cast<float>(x.sums[at]);
            for (int o = 0; o < 16; ++o) {
                if (kFour) {
                    const uint16_t* by_group = reinterpret_cast<const uint16_t*>(data + 256);
                    total[t][o] += one(by_group + o) * step * static_cast<float>(found[o]);
                    total[t][o] += one(by_group + 16 + o) * shift;
                } else {
                    total[t][o] += step * static_cast<float>(found[o]);
                }
            }
        }
        data += kFour ? kBlock4 : kBlock8;
    }
    for (int t = 0; t < kTokens; ++t)
        for (int64_t o = 0; o < outputs && o < 16; ++o)
            y[(first + t) * stride + o] = kFour ? total[t][o] : total[t][o] * scales[o];
}

constexpr int kPackedTokens = 2;

#endif

template <int kTokens, bool kFour>
void block_any(int tokens, const uint8_t* data, const Rows& x, int64_t first, int64_t columns, const float* scales,
               float* y, int64_t stride, int64_t outputs) {
    if (tokens == kTokens) return block<kTokens, kFour>(data, x, first, columns, scales, y, stride, outputs);
    if constexpr (kTokens > 1) {
        block_any<kTokens - 1, kFour>(tokens, data, x, first, columns, scales, y, stride, outputs);
    }
}

template <bool kFour>
void packed(const Matrix& m, const Rows& x, int64_t begin, int64_t end, float* y, int64_t stride) {
    const int64_t bytes = m.columns / kGroup * (kFour ? kBlock4 : kBlock8);
    const int64_t tiles = (x.count + kPackedTokens - 1) / kPackedTokens;
    for (int64_t row = begin; row < end; row += kBlock) {
        const uint8_t* data = static_cast<const uint8_t*>(m.data) + row / kBlock * bytes;
        for (int64_t n = 0; n < tiles; ++n) {
            const int64_t first = x.count * n / tiles, last = x.count * (n + 1) / tiles;
            const float* scales = kFour ? nullptr : m.scales + row;
            block_any<kPackedTokens, kFour>(static_cast<int>(last - first), data, x, first, m.columns, scales, y + row,
                                            stride, end - row);
        }
    }
}

void product(const Matrix& m, const Rows& x, int64_t begin, int64_t end, float* y, int64_t stride) {
    switch (m.kind) {
        case Kind::kFloat: return dense<float>(m, x, begin, end, y, stride);
        case Kind::kBfloat: return dense_bfloat(m, x, begin, end, y, stride);
        case Kind::kInt8: return packed<false>(m, x, begin, end, y, stride);
        case Kind::kInt4: return packed<true>(m, x, begin, end, y, stride);
    }
}

}  // namespace

extern const Kernels table;
const Kernels table = {DECODE_NAME, product, quantize, to_bfloat, from_bfloat, norm,
                       gated,       add,     rotate,   attend,    best};

}  // namespace llm_parallel::decode::DECODE_LEVEL
