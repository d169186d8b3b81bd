// The arithmetic, written with vectors of kLanes floats. The file that includes this defines DECODE_LEVEL (a namespace),
// DECODE_LANES, and DECODE_AVX512, DECODE_AVX2 or neither. No header may be included below its target pragma, since
// functions of headers would then be compiled for instructions that the processor may lack.
namespace llm_parallel::decode::DECODE_LEVEL {
namespace {

constexpr int64_t kLanes = DECODE_LANES;
typedef float F __attribute__((vector_size(4 * DECODE_LANES)));
typedef int32_t I __attribute__((vector_size(4 * DECODE_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * DECODE_LANES)));
typedef uint16_t H __attribute__((vector_size(2 * DECODE_LANES)));

inline F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline F load(const uint16_t* p) {
    H h;
    __builtin_memcpy(&h, p, sizeof h);
    const U wide = __builtin_convertvector(h, U) << 16;
    return (F)wide;
}
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
inline float one(const float* p) { return *p; }
inline float one(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint16_t bfloat_of(float x) {  // to the nearest, ties to even
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 64);  // not a number
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline F splat(float x) { return x - F{}; }
inline F larger(F a, F b) { return a > b ? a : b; }
inline F smaller(F a, F b) { return a < b ? a : b; }
inline F magnitude(F a) { return a < 0 ? -a : a; }

inline float sum(F v) {
    float parts[kLanes];
    store(parts, v);
    for (int64_t n = kLanes / 2; n > 0; n /= 2)
        for (int64_t i = 0; i < n; ++i) parts[i] += parts[i + n];
    return parts[0];
}
inline float most(F v) {
    float parts[kLanes];
    store(parts, v);
    for (int64_t i = 1; i < kLanes; ++i) parts[0] = parts[i] > parts[0] ? parts[i] : parts[0];
    return parts[0];
}

// The sums of four vectors.
inline void sums(F a, F b, F c, F d, float* out) {
#if defined(DECODE_AVX512)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(DECODE_AVX2)
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b), _mm256_unpackhi_ps((__m256)a, (__m256)b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d), _mm256_unpackhi_ps((__m256)c, (__m256)d));
    const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// e^x, of x between -87 and 88; what is below or above is taken as these.
inline F exponential(F x) {
    x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    F n = x * splat(1.44269504f) + magic;
    n = n - magic;
    F r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    F p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    const I power = (__builtin_convertvector(n, I) + 127) << 23;
    return p * (F)power;
}

// kRows rows of a matrix and kTokens rows of x; the sum of each pair runs over the columns in one order.
template <int kRows, int kTokens, typename T>
inline void tile(const T* const* w, const float* const* x, int64_t columns, float* const* y, int64_t rows) {
    F total[kRows][kTokens] = {};
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
        F wide[kRows];
        for (int r = 0; r < kRows; ++r) {
            wide[r] = load(w[r] + i);
            if (kTokens <= 4) __builtin_prefetch(w[r] + i + kRows * columns);
        }
        for (int t = 0; t < kTokens; ++t) {
            const F given = load(x[t] + i);
            for (int r = 0; r < kRows; ++r) total[r][t] += wide[r] * given;
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        float found[kRows];
        for (int r = 0; r < kRows; r += 4) sums(total[r][t], total[r + 1][t], total[r + 2][t], total[r + 3][t], found + r);
        for (int r = 0; r < kRows; ++r)
            for (int64_t j = i; j < columns; ++j) found[r] += one(w[r] + j) * x[t][j];
        for (int r = 0; r < kRows && r < rows; ++r) y[t][r] = found[r];
    }
}

#if defined(DECODE_AVX512)
constexpr int kMostTokens = 6;  // 24 sums, 4 rows and 1 of x fit into 32 registers
#else
constexpr int kMostTokens = 2;
#endif

template <int kTokens, typename T>
void dense_tokens(const Matrix& m, const float* x, int64_t begin, int64_t end, float* y, int64_t stride) {
    constexpr int kRows = kTokens == 1 && kMostTokens > 2 ? 8 : 4;
    const T* data = static_cast<const T*>(m.data);
    for (int64_t row = begin; row < end; row += kRows) {
        const T* w[kRows];
        for (int r = 0; r < kRows; ++r) w[r] = data + (row + r < end ? row + r : end - 1) * m.columns;
        const float* given[kTokens];
        float* out[kTokens];
        for (int t = 0; t < kTokens; ++t) given[t] = x + t * m.columns, out[t] = y + t * stride + row;
        tile<kRows, kTokens, T>(w, given, m.columns, out, end - row);
    }
}

template <typename T>
void dense_any(int tokens, const Matrix& m, const float* x, int64_t begin, int64_t end, float* y, int64_t stride) {
    switch (tokens) {
        case 1: return dense_tokens<1, T>(m, x, begin, end, y, stride);
        case 2: return dense_tokens<2, T>(m, x, begin, end, y, stride);
#if defined(DECODE_AVX512)
        case 3: return dense_tokens<3, T>(m, x, begin, end, y, stride);
        case 4: return dense_tokens<4, T>(m, x, begin, end, y, stride);
        case 5: return dense_tokens<5, T>(m, x, begin, end, y, stride);
        case 6: return dense_tokens<6, T>(m, x, begin, end, y, stride);
#endif
    }
}

// Parts of the outputs that stay in the nearest cache while all tokens pass.
template <typename T>
void dense(const Matrix& m, const Rows& x, int64_t begin, int64_t end, float* y, int64_t stride) {
    const int64_t tiles = (x.count + kMostTokens - 1) / kMostTokens;
    const int64_t part = tiles == 1 ? end - begin : 8;
    for (int64_t from = begin; from < end; from += part) {
        const int64_t to = from + part < end ? from + part : end;
        for (int64_t n = 0; n < tiles; ++n) {
            const int64_t first = x.count * n / tiles, last = x.count * (n + 1) / tiles;
            dense_any<T>(static_cast<int>(last - first), m, x.values + first * m.columns, from, to, y + first * stride, stride);
        }
    }
}

void quantize(const float* x, int64_t n, int8_t* quants, float* steps, int32_t* group_sums) {
    for (int64_t g = 0; g < n / kGroup; ++g, x += kGroup, quants += kGroup) {
        F top = magnitude(load(x));
        for (int64_t i = kLanes; i < kGroup; i += kLanes) top = larger(top, magnitude(load(x + i)));
        const float largest = most(top);
        const float step = largest / 127.0f, inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
        const F magic = splat(12582912.0f);
        int32_t total = 0;
        for (int64_t i = 0; i < kGroup; i += kLanes) {
            F rounded = load(x + i) * splat(inverse) + magic;
            rounded = rounded - magic;
            const I whole = __builtin_convertvector(rounded, I);
            int32_t out[kLanes];
            __builtin_memcpy(out, &whole, sizeof out);
            for (int64_t j = 0; j < kLanes; ++j) quants[i + j] = static_cast<int8_t>(out[j]), total += out[j];
        }
        steps[g] = step, group_sums[g] = total;
    }
}

void to_bfloat(const float* x, int64_t n, uint16_t* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = bfloat_of(x[i]);
}

void from_bfloat(const uint16_t* x, int64_t n, float* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = one(x + i);
}

void norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
    F total = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) total += load(x + i) * load(x + i);
    float squares = sum(total);
    for (; i < n; ++i) squares += x[i] * x[i];
    const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
    for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * splat(inverse) * load(weight + i));
    for (; i < n; ++i) y[i] = x[i] * inverse * weight[i];
}

inline F silu(F x) { return x / (splat(1.0f) + exponential(-x)); }

void gated(const float* gate, const float* up, int64_t n, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, silu(load(gate + i)) * load(up + i));
    if (i == n) return;
    float last[2][kLanes] = {};
    for (int64_t j = i; j < n; ++j) last[0][j - i] = gate[j], last[1][j - i] = up[j];
    store(last[0], silu(load(last[0])) * load(last[1]));
    for (int64_t j = i; j < n; ++j) y[j] = last[0][j - i];
}

void add(const float* x, int64_t n, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + load(x + i));
    for (; i < n; ++i) y[i] += x[i];
}

void rotate(const float* x, const float* cos, const float* sin, int64_t head_dim, float* y) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        y[i] = first * cos[i] + second * sin[i];
        y[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

constexpr int64_t kKeys = 64;  // keys whose values stay in the nearest cache while all heads of a group read them
constexpr float kLow = -3.0e38f;

template <typename T>
inline const T* place(const T* base, const Cache& cache, int64_t group, const Seen& seen, int64_t key) {
    const int64_t slot = seen.pages[key / cache.page_tokens] * cache.page_tokens + key % cache.page_tokens;
    return base + (slot * cache.groups + group) * cache.head_dim;
}

template <typename T>
void score(const float* q, int64_t heads, const Cache& cache, int64_t group, const Seen& seen, float scale,
           int64_t stride, float* out) {
    const T* base = static_cast<const T*>(cache.keys);
    const int64_t dim = cache.head_dim, whole = dim / kLanes * kLanes;
    for (int64_t key = seen.first; key < seen.length; key += 4) {
        const T* k[4];
        for (int64_t n = 0; n < 4; ++n) {
            k[n] = place(base, cache, group, seen, key + n < seen.length ? key + n : seen.length - 1);
        }
        for (int64_t h = 0; h < heads; ++h) {
            F total[4] = {};
            for (int64_t i = 0; i < whole; i += kLanes) {
                const F given = load(q + h * dim + i);
                for (int n = 0; n < 4; ++n) total[n] += given * load(k[n] + i);
            }
            float found[4];
            sums(total[0], total[1], total[2], total[3], found);
            for (int n = 0; n < 4; ++n) {
                for (int64_t i = whole; i < dim; ++i) found[n] += q[h * dim + i] * one(k[n] + i);
                out[h * stride + key - seen.first + n] = found[n] * scale;  // there is room for three too many
            }
        }
    }
}

template <typename T>
void mix(const float* shares, int64_t stride, int64_t heads, const Cache& cache, int64_t group, const Seen& seen,
         float* out) {
    const T* base = static_cast<const T*>(cache.values);
    const int64_t dim = cache.head_dim, whole = dim / kLanes * kLanes;
    constexpr int kWide = 4;
    const T* v[kKeys];
    for (int64_t from = seen.first; from < seen.length; from += kKeys) {
        const int64_t count = seen.length - from < kKeys ? seen.length - from : kKeys;
        for (int64_t n = 0; n < count; ++n) v[n] = place(base, cache, group, seen, from + n);
        for (int64_t h = 0; h < heads; ++h) {
            const float* share = shares + h * stride + from - seen.first;
            float* to = out + h * dim;
            int64_t i = 0;
            for (; i + kWide * kLanes <= whole; i += kWide * kLanes) {
                F total[kWide];
                for (int c = 0; c < kWide; ++c) total[c] = load(to + i + c * kLanes);
                for (int64_t n = 0; n < count; ++n) {
                    const F part = splat(share[n]);
                    for (int c = 0; c < kWide; ++c) total[c] += part * load(v[n] + i + c * kLanes);
                }
                for (int c = 0; c < kWide; ++c) store(to + i + c * kLanes, total[c]);
            }
            for (; i < whole; i += kLanes) {
                F total = load(to + i);
                for (int64_t n = 0; n < count; ++n) total += splat(share[n]) * load(v[n] + i);
                store(to + i, total);
            }
            for (; i < dim; ++i)
                for (int64_t n = 0; n < count; ++n) to[i] += share[n] * one(v[n] + i);
        }
    }
}

void attend(const float* q, int64_t heads, const Cache& cache, int64_t group, const Seen& seen, const Scores& how,
            float* scratch, float* out) {
    const int64_t count = seen.length - seen.first, stride = (count + kKeys - 1) / kKeys * kKeys;
    if (cache.bfloat) score<uint16_t>(q, heads, cache, group, seen, how.scale, stride, scratch);
    else score<float>(q, heads, cache, group, seen, how.scale, stride, scratch);
    for (int64_t h = 0; h < heads; ++h) {
        float* row = scratch + h * stride;
        for (int64_t i = count; i < stride; ++i) row[i] = kLow;
        if (how.softcap > 0) {
            for (int64_t i = 0; i < count; i += kLanes) {  // cap tanh(x / cap)
                const F twice = exponential(load(row + i) * splat(2.0f / how.softcap));
                store(row + i, splat(how.softcap) * (splat(1.0f) - splat(2.0f) / (twice + splat(1.0f))));
            }
            for (int64_t i = count; i < stride; ++i) row[i] = kLow;
        }
        F top = load(row);
        for (int64_t i = kLanes; i < stride; i += kLanes) top = larger(top, load(row + i));
        const F largest = splat(most(top));
        F total = {};
        for (int64_t i = 0; i < stride; i += kLanes) {
            const F share = exponential(load(row + i) - largest);
            store(row + i, share);
            total += share;
        }
        const F inverse = splat(1.0f / sum(total));
        for (int64_t i = 0; i < stride; i += kLanes) store(row + i, load(row + i) * inverse);
    }
    for (int64_t i = 0; i < heads * cache.head_dim; ++i) out[i] = 0.0f;
    if (cache.bfloat) mix<uint16_t>(scratch, stride, heads, cache, group, seen, out);
    else mix<float>(scratch, stride, heads, cache, group, seen, out);
}

void best(const float* x, int64_t n, float* largest, int64_t* where, float* log_sum) {
    F top = splat(kLow);
    I bad = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const F given = load(x + i);
        bad |= given != given;
        top = larger(top, given);
    }
    float found = most(top);
    int32_t damaged = 0;
    for (int64_t j = 0; j < kLanes; ++j) damaged |= bad[j];
    for (; i < n; ++i) {
        damaged |= x[i] != x[i];
        found = x[i] > found ? x[i] : found;
    }
    F total[2] = {};
    for (i = 0; i + 2 * kLanes <= n; i += 2 * kLanes)
        for (int c = 0; c < 2; ++c) total[c] += exponential(load(x + i + c * kLanes) - splat(found));
    float all = sum(total[0] + total[1]);
    for (; i < n; ++i) {
        float last[kLanes];
        store(last, exponential(splat(x[i] - found)));
        all += last[0];
    }
    for (i = 0; i + kLanes <= n; i += kLanes) {
        const I same = load(x + i) == splat(found);
        int32_t any = 0;
        for (int64_t j = 0; j < kLanes; ++j) any |= same[j];
        if (any) break;
    }
    while (i < n && x[i] != found) ++i;
    *largest = found, *where = i, *log_sum = found + __builtin_logf(all);
    if (damaged || i == n || found > 3.4e38f) *largest = *log_sum = __builtin_nanf(""), *where = 0;
}

// bf16 matrices take x in fp32: a bf16 number becomes fp32 by a shift.
void dense_bfloat(const Matrix& m, const Rows& x, int64_t begin, int64_t end, float* y, int64_t stride) {
    dense<uint16_t>(m, x, begin, end, y, stride);
}

