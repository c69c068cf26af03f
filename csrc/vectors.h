// Vectors of LANES float32 numbers, in the compilers' own vector types: the same source serves every processor, and only the
// few operations that have no operator are intrinsics. Everything here is in the namespace of one instruction set, so that the
// linker never takes a function that was compiled for another processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "interface.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

namespace tokengame::INSTRUCTIONS {

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));  // also what a comparison gives: -1 true, 0 false
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class T>
inline T least(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T most(T a, T b) {
    return a < b ? b : a;
}
inline long up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }  // n rounded up to a multiple

inline Vector same(float x) { return x - Vector{}; }
inline Vector vmax(Vector a, Vector b) {
#if LANES == 16
    return _mm512_max_ps(a, b);
#elif LANES == 8
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
inline Vector vmin(Vector a, Vector b) {
#if LANES == 16
    return _mm512_min_ps(a, b);
#elif LANES == 8
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

inline Vector load(const float* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline Vector load(const bf16* from) {
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return (Vector)(__builtin_convertvector(x, Bits) << 16);
}
inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }
inline void store(bf16* to, Vector x) {  // rounded to the nearest, ties to even
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    std::memcpy(to, &rounded, sizeof rounded);
#else
    const Bits bits = (Bits)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Halves halves = __builtin_convertvector(x == x ? rounded : rounded * 0 + 0x7fc0, Halves);
    std::memcpy(to, &halves, sizeof halves);
#endif
}
// PAIR numbers: two vectors, which are rounded to bfloat16 together where the processor can
constexpr long PAIR = 2 * LANES;
template <class Number>
inline void store(Number* to, Vector low, Vector high) {
    store(to, low);
    store(to + LANES, high);
}
#if defined(__AVX512BF16__)
inline void store(bf16* to, Vector low, Vector high) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(to, &rounded, sizeof rounded);
}
#endif
inline float number(float x) { return x; }
inline float number(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline float total(Vector x) {
#if LANES == 16
    return _mm512_reduce_add_ps(x);
#else
    float lanes[LANES];
    store(lanes, x);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
#endif
}
inline float highest(Vector x) {
#if LANES == 16
    return _mm512_reduce_max_ps(x);
#else
    float lanes[LANES];
    store(lanes, x);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = most(lanes[i], lanes[i + n]);
    return lanes[0];
#endif
}

inline Integers lane_numbers() {
    Integers lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes;
}
inline Integers first_of(long n) { return lane_numbers() < int(n > LANES ? LANES : n); }  // true in the first n lanes

// 2^x for x <= 0 or a little more; x below -125 gives 2^-125. Relative error for float32 2.4e-7; for bfloat16 1 / 7,000, a
// quarter of the error of rounding to it.
template <class Number>
inline Vector exp2(Vector x) {
    const Vector to_whole = same(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
    x = vmax(x, same(-125.f));
    const Vector shifted = x + to_whole, rest = x - (shifted - to_whole);
    const Bits exponent = (Bits)shifted << 23;  // the last bits of `shifted` are the whole number
    if (sizeof(Number) == 2) {
        Vector y = 0.05502884f * rest + 0.24225878f;
        y = y * rest + 0.69325324f;
        return (Vector)((Bits)(y * rest + 0.99995125f) + exponent);
    }
    Vector y = 0.00132764713f * rest + 0.00967554096f;
    y = y * rest + 0.0555071309f;
    y = y * rest + 0.240221202f;
    y = y * rest + 0.693146944f;
    return (Vector)((Bits)(y * rest + 1.0000001f) + exponent);
}

// e^x with the same error
template <class Number>
inline Vector exp(Vector x) {
    return exp2<Number>(x * 1.44269504f);
}

constexpr float GELU_BF16[] = {1.9941867e-7f,  -5.1625299e-6f, 8.8653465e-5f, -1.0801388e-3f,
                               9.7226384e-3f, -6.6197282e-2f, 3.9882381e-1f};
constexpr float GELU_FLOAT[] = {0.000874936214f, -0.0011864107f, 0.0036589192f, -0.00671533793f, 0.00965119784f,
                                -0.0139633204f,  0.0196451435f,  -0.0257464571f, 0.0321165953f,  -0.0392068131f,
                                0.0484995915f,   -0.0653280549f, 0.130928113f};

// GELU, x Phi(x): Phi(x) - 1/2 = x P(x^2) with a polynomial P fitted where |x| is below an edge, so that the largest error
// of Phi is smallest; beyond it Phi is taken as 0 or 1. Error of Phi for float32 1.4e-7, of GELU for bfloat16 4e-5.
template <class Number>
inline Vector gelu(Vector x) {
    if (sizeof(Number) == 2) {
        const Vector inner = vmax(vmin(x, same(4.25f)), same(-4.25f)), square = inner * inner;
        Vector y = 4.5751241e-11f * square - 4.5385211e-9f;
        for (float c : GELU_BF16) y = y * square + c;
        return x * (inner * y + 0.5f);
    }
    const Vector inner = vmax(vmin(x, same(5.4f)), same(-5.4f));
    const Vector t = inner * inner * float(2 / (5.4 * 5.4)) - 1.f;  // between -1 and 1, where rounding errors stay small
    Vector y = 0.000392858013f * t - 0.00102836871f;
    for (float c : GELU_FLOAT) y = y * t + c;
    return x * (inner * y + 0.5f);
}

// x / (1 + e^-z)
template <class Number>
inline Vector gate(Vector x, Vector z) {
    const Vector small = exp<Number>(-vmax(z, -z));  // never overflows
    return x * (z < 0 ? small : same(1)) / (1 + small);
}

template <class Number>
inline Vector activated(long activation, Vector x) {
    switch (activation) {
        case QUICK_GELU: return gate<Number>(x, 1.702f * x);
        case SILU: return gate<Number>(x, x);
        case TANH_GELU: return gate<Number>(x, x * (1.595769122f + 0.0713548163f * x * x));  // 2 sqrt(2 / pi) (x + 0.044715 x^3)
        default: return gelu<Number>(x);
    }
}

// Error for float32 2e-7; of what is not a number it makes none.
template <class Number>
inline Vector tanh(Vector x) {
    const Vector size = vmax(x, -x), small = exp<Number>(-2 * size), y = (1 - small) / (1 + small);
    return x < 0 ? -y : x >= 0 ? y : x;
}

// What a debug build (-DTOKENGAME_DEBUG, as by scripts/sanitize) checks of the arguments of every function of the table, and
// of what these functions pass to each other. In any other build nothing is left of it.
struct Violated {};
#if defined(TOKENGAME_DEBUG)
#define EXPECT(condition)                                                                            \
    do {                                                                                             \
        if (!(condition)) {                                                                          \
            std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);       \
            throw Violated();                                                                        \
        }                                                                                            \
    } while (0)
#else
#define EXPECT(condition) ((void)0)
#endif

inline bool in_tiles(long width) { return width >= 0 && width % 32 == 0; }
inline bool in_tiles(const Block& b) {
    return in_tiles(b.dim) && in_tiles(b.width) && in_tiles(b.mlp.hidden) && b.dim > 0 && b.heads > 0;
}
// Whether images follow each other in an array of so many rows, each with at least `fewest` of them.
inline bool are_packed(const int64_t* cu_seqlens, long images, long rows, long fewest) {
    if (images < 0 || (images > 0 && (cu_seqlens[0] < 0 || cu_seqlens[images] > rows))) return false;
    for (long image = 0; image < images; image++)
        if (cu_seqlens[image + 1] - cu_seqlens[image] < fewest) return false;
    return true;
}
constexpr long ANY_ROWS = INT64_MAX;  // of functions that are not told how many there are

// Working memory of a thread, kept from call to call, aligned to 64 bytes. Without memory std::bad_alloc is thrown.
class Buffer {
    void* at = nullptr;
    size_t size = 0;

  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(at); }
    template <class T>
    T* take(long number) {
        const size_t wanted = (number * sizeof(T) + 127) / 64 * 64;
        if (wanted > size) {
            std::free(at);
            at = std::aligned_alloc(64, wanted);
            size = at ? wanted : 0;
            if (!at) throw std::bad_alloc();
        }
        return (T*)at;
    }
};

}  // namespace tokengame::INSTRUCTIONS
