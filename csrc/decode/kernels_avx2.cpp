// The arithmetic for processors with AVX2 and FMA.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define DECODE_LEVEL avx2
#define DECODE_NAME "avx2"
#define DECODE_LANES 8
#define DECODE_AVX2
#include "kernels_body.h"
#include "packed_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
