// What all kernels are made of: matrix products in blocks of 32 x 32 numbers, and vectors of 16 floats.
//
// A left operand [rows, K] is "staged": for every 32 rows, K / 32 steps of [32 rows, 32 columns], so that a tile of the
// processor is 1 KiB of contiguous memory. A right operand [K, columns] is "packed": for every 16 columns (a panel), K / 32
// steps of [16 pairs of rows, 16 columns, 2 rows of the pair]. Both are bfloat16, K and columns padded with zeros to multiples
// of 32; rows that a staged operand lacks may hold anything. Sums are float32.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "network.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

namespace tokengame {

constexpr long SIDE = 32;                // rows and columns of a product
constexpr long BLOCK = SIDE * SIDE;      // numbers of a staged step
constexpr long PANEL = 16;               // columns of a packed panel
constexpr long STEP = SIDE * PANEL;      // numbers of a packed step

// n rounded up to a multiple
inline long up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// 16 numbers from memory as float32
inline __m512 load(const bf16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

// 32 numbers to memory, rounded to bfloat16
inline void store(bf16* to, __m512 low, __m512 high) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Working memory for `size` numbers, aligned to 64 bytes. `memory` belongs to a thread and is kept from call to call.
template <class T>
T* scratch(std::vector<T>& memory, long size) {
    if (long(memory.size()) < size + 64) memory.resize(size + 64);
    return (T*)((uintptr_t(memory.data()) + 63) / 64 * 64);
}

// Configures the AMX tiles of the calling thread while it exists, then restores their previous configuration: oneDNN (in
// PyTorch) relies on its own between calls.
class Tiles {
    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } previous;

  public:
    Tiles() {
        if (!has_amx) return;
        Config ours;
        _tile_storeconfig(&previous);
        _tile_loadconfig(&ours);
    }
    ~Tiles() {
        if (!has_amx) return;
        if (previous.palette) _tile_loadconfig(&previous);
        else _tile_release();
    }
    Tiles(const Tiles&) = delete;
};

// a [32, K] staged, b [K, 32] packed (two panels) -> c [32, 32] = a b; only the first `rows` rows need be right. K is 32 *
// steps. between(step) is called once for each step: other work for the vector units, which are idle while the tiles compute.
template <class Between>
inline void product(const bf16* a, const bf16* b, long steps, long rows, float* c, Between between) {
    const bf16* second = b + steps * STEP;
    if (has_amx) {
        __asm__ volatile("" ::: "memory");  // the compiler does not know that tiles are read from memory
        const bool both = rows > 16;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long s = 0; s < steps; s++) {
            _tile_loadd(4, a + s * BLOCK, 64);
            _tile_loadd(6, b + s * STEP, 64);
            _tile_loadd(7, second + s * STEP, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (both) {
                _tile_loadd(5, a + s * BLOCK + BLOCK / 2, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            between(s);
        }
        _tile_stored(0, c, 128);
        _tile_stored(1, c + 16, 128);
        if (both) {
            _tile_stored(2, c + BLOCK / 2, 128);
            _tile_stored(3, c + BLOCK / 2 + 16, 128);
        }
        return;
    }
    for (long s = 0; s < steps; s++) between(s);
    for (long row = 0; row < rows; row += 8) {
        __m512 sums[8][2];
        for (int r = 0; r < 8; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        for (long s = 0; s < steps; s++)
            for (long pair = 0; pair < 16; pair++) {
                auto left = (__m512bh)_mm512_loadu_si512(b + s * STEP + pair * 32);
                auto right = (__m512bh)_mm512_loadu_si512(second + s * STEP + pair * 32);
                for (int r = 0; r < 8; r++) {
                    int32_t both;
                    std::memcpy(&both, a + s * BLOCK + (row + r) * SIDE + pair * 2, 4);
                    auto x = (__m512bh)_mm512_set1_epi32(both);
                    sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, left);
                    sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, right);
                }
            }
        for (int r = 0; r < 8; r++) {
            _mm512_storeu_ps(c + (row + r) * SIDE, sums[r][0]);
            _mm512_storeu_ps(c + (row + r) * SIDE + 16, sums[r][1]);
        }
    }
}

inline void product(const bf16* a, const bf16* b, long steps, long rows, float* c) {
    product(a, b, steps, rows, c, [](long) {});
}

// from [rows, columns] with a stride, up to 32 rows -> to [32, columns] staged; the remaining rows are not written.
inline void stage(const bf16* from, long stride, long rows, long columns, bf16* to) {
    for (long k = 0; k < columns; k += SIDE)
        for (long r = 0; r < rows; r++) _mm512_storeu_si512(to + k * SIDE + r * SIDE, _mm512_loadu_si512(from + r * stride + k));
}

// Transposes 16 x 16 numbers of 32 bits.
inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// from [rows, columns] with a stride -> to: its transpose [columns, rows], packed. With an index [rows], row i is row index[i]
// of `from`.
inline void pack_rows(const bf16* from, long stride, const int* index, long rows, long columns, bf16* to) {
    const long steps = columns / SIDE;
    for (long first = 0; first < up(rows, SIDE); first += PANEL)
        for (long s = 0; s < steps; s++) {
            __m512i r[16];
            for (long i = 0; i < PANEL; i++) {
                long row = first + i;
                r[i] = row < rows ? _mm512_loadu_si512(from + (index ? index[row] : row) * stride + s * SIDE)
                                  : _mm512_setzero_si512();
            }
            transpose(r);
            for (long pair = 0; pair < 16; pair++)
                _mm512_storeu_si512(to + (first / PANEL * steps + s) * STEP + pair * 32, r[pair]);
        }
}

// from [rows, columns] with a stride -> to: the same matrix [rows, columns], packed.
inline void pack_columns(const bf16* from, long stride, long rows, long columns, bf16* to) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; i++) low[i] = i / 2 + (i % 2) * 32, high[i] = low[i] + 16;
    const __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high), zero = _mm512_setzero_si512();
    const long steps = up(rows, SIDE) / SIDE;
    for (long k = 0; k < steps * SIDE; k += 2)
        for (long c = 0; c < columns; c += SIDE) {
            __m512i one = k < rows ? _mm512_loadu_si512(from + k * stride + c) : zero;
            __m512i two = k + 1 < rows ? _mm512_loadu_si512(from + (k + 1) * stride + c) : zero;
            bf16* cell = to + (c / PANEL * steps + k / SIDE) * STEP + k % SIDE * PANEL;
            _mm512_storeu_si512(cell, _mm512_permutex2var_epi16(one, lows, two));
            _mm512_storeu_si512(cell + steps * STEP, _mm512_permutex2var_epi16(one, highs, two));
        }
}

// 2^x with a relative error of 1 / 7,000, a quarter of the error of rounding to bfloat16.
inline __m512 exp2(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole), y = _mm512_set1_ps(0.05502884f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.24225878f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.69325324f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.99995125f)), whole);
}

// e^x with the same error
inline __m512 exp(__m512 x) {
    return exp2(_mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _mm512_set1_ps(-1e5f)));
}

// GELU, x Phi(x), with an error of 4e-5: Phi(x) - 1/2 = x P(x^2) with a polynomial P fitted on [-4.25, 4.25]; beyond it Phi is
// taken as 0 or 1.
inline __m512 gelu(__m512 x) {
    const __m512 edge = _mm512_set1_ps(4.25f);
    __m512 inner = _mm512_max_ps(_mm512_min_ps(x, edge), _mm512_sub_ps(_mm512_setzero_ps(), edge));
    __m512 square = _mm512_mul_ps(inner, inner), y = _mm512_set1_ps(4.5751241e-11f);
    for (float c : {-4.5385211e-9f, 1.9941867e-7f, -5.1625299e-6f, 8.8653465e-5f, -1.0801388e-3f, 9.7226384e-3f,
                    -6.6197282e-2f, 3.9882381e-1f})
        y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(c));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(inner, y, _mm512_set1_ps(0.5f)));
}

}  // namespace tokengame
