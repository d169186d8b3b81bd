// The arithmetic for processors with AVX-512 and its instructions for products of 8-bit numbers (VNNI).
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif
#define DECODE_LEVEL avx512
#define DECODE_NAME "avx512"
#define DECODE_LANES 16
#define DECODE_AVX512
#include "kernels_body.h"
#include "packed_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
