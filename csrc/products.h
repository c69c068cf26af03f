// Matrix products in blocks of 32 x 32 sums, from operands of float32 or, where the processor multiplies them, of bfloat16.
//
// A left operand [rows, K] is "staged": for every 32 rows, K / 32 steps of [32 rows, 32 columns]; rows that it lacks may hold
// anything. A right operand [K, columns] is "packed": in panels of PANEL columns, one after the other, each with all of K in the
// order in which a product reads it. K and columns are padded with zeros to multiples of 32. Sums are float32.
#pragma once

#include "vectors.h"

namespace tokengame::INSTRUCTIONS {

constexpr long SIDE = 32;            // rows and columns of a product
constexpr long BLOCK = SIDE * SIDE;  // numbers of a staged step

#if defined(__AVX512BF16__)
template <class Number> struct OperandOf { using Type = Number; };  // bfloat16 is multiplied as it is
#else
template <class Number> struct OperandOf { using Type = float; };
#endif
template <class Number> using Operand = typename OperandOf<Number>::Type;

// float32: a panel is [K, PANEL], and the sums of some rows and VECTORS of its columns fit into registers.

constexpr int VECTORS = 2;
constexpr long PANEL = VECTORS * LANES;
constexpr long CHUNK = 8;  // steps whose part of a panel stays in the first cache
constexpr long AHEAD = LANES == 16 ? 24 : 0;  // rows of a panel that are fetched ahead, from the second cache or beyond

// Rows that products compute together: work is split at multiples of it.
template <class Operand> constexpr long ROWS_TOGETHER = 4;

// a [R of the rows, K] staged, b one panel [K, PANEL] -> c [R, V vectors of 32]; added to what c holds, if `more`. FIRST: b was
// not read before. A function of its own, so that the compiler keeps all sums in registers.
template <int R, int V, bool FIRST>
__attribute__((noinline)) void sums_of(const float* a, const float* b, long inner, float* c, bool more) {
    Vector sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = more ? load(c + r * SIDE + v * LANES) : Vector{};
    const auto add = [&](long k) {
        Vector right[V];
        for (int v = 0; v < V; v++) {
            if (FIRST && AHEAD) __builtin_prefetch(b + AHEAD * PANEL + v * LANES);
            right[v] = load(b + v * LANES);
        }
        for (int r = 0; r < R; r++) {
            const Vector left = same(a[r * SIDE + k]);
            for (int v = 0; v < V; v++) sums[r][v] += left * right[v];
        }
        b += PANEL;
    };
    for (; inner >= SIDE; inner -= SIDE, a += BLOCK) {
#pragma GCC unroll 4
        for (long k = 0; k < SIDE; k++) add(k);
    }
    for (long k = 0; k < inner; k++) add(k);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(c + r * SIDE + v * LANES, sums[r][v]);
}

// sums_of for the next of n rows -> how many rows that were, as many as have their sums in registers. Their last may lie beyond
// n, not beyond `room`.
template <int V, bool FIRST>
inline long next_sums(const float* a, const float* b, long inner, long n, long room, float* c, bool more) {
#if LANES == 16
    if (room >= 12 && (n > 16 || (n > 8 && n <= 12))) return sums_of<12, V, FIRST>(a, b, inner, c, more), 12;
    if (room >= 8 && n > 5) return sums_of<8, V, FIRST>(a, b, inner, c, more), 8;
#elif LANES == 8
    if (room >= 6 && n > 4 && n != 8) return sums_of<6, V, FIRST>(a, b, inner, c, more), 6;  // 8 are 4 and 4, not 6 and 2
#endif
    if (room >= 4 && n > 2) return sums_of<4, V, FIRST>(a, b, inner, c, more), 4;
    if (n > 1) return sums_of<2, V, FIRST>(a, b, inner, c, more), 2;
    return sums_of<1, V, FIRST>(a, b, inner, c, more), 1;
}

// As sums_of, for `rows` rows of a block.
template <int V>
inline void sums_of_rows(const float* a, const float* b, long inner, long rows, float* c, bool more) {
    long row = next_sums<V, true>(a, b, inner, rows, SIDE, c, more);
    while (row < rows) row += next_sums<V, false>(a + row * SIDE, b, inner, rows - row, SIDE - row, c + row * SIDE, more);
}

template <class Operand> constexpr long PANEL_COLUMNS = PANEL;

// a [32, K] staged, b [K, 32] packed -> c [32, 32] = a b; only the first `rows` rows and `columns` columns need be right. K is
// `inner`. b may be a part of a longer operand, whose panels have `stride` rows; the product is added to c, if `more`.
// between(step) is called once for each step: other work for the vector units, where they are idle while tiles compute.
template <class Between>
inline void product(const float* a, const float* b, long inner, long stride, long rows, long columns, float* c, bool more,
                    Between between) {
    for (long s = 0; s < up(inner, SIDE) / SIDE; s++) between(s);
    for (long k = 0; k < inner; k += CHUNK * SIDE) {
        const long some = least(CHUNK * SIDE, inner - k);
        for (long column = 0; column < columns; column += PANEL) {
            const float *left = a + k * SIDE, *panel = b + column * stride + k * PANEL;
            if (columns - column <= LANES) sums_of_rows<1>(left, panel, some, rows, c + column, more || k);
            else sums_of_rows<VECTORS>(left, panel, some, rows, c + column, more || k);
        }
    }
}

// Transposes LANES x LANES numbers of 32 bits, by exchanging halves.
inline void transpose(Integers r[LANES]) {
    Integers low, high;  // lanes of a pair of vectors, numbered from 0 to 2 LANES - 1
    for (int i = 0; i < LANES; i++) {
        low[i] = i / 2 + i % 2 * LANES;
        high[i] = low[i] + LANES / 2;
    }
    for (int round = 1; round < LANES; round *= 2) {
        Integers t[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            t[2 * i] = __builtin_shuffle(r[i], r[i + LANES / 2], low);
            t[2 * i + 1] = __builtin_shuffle(r[i], r[i + LANES / 2], high);
        }
        for (int i = 0; i < LANES; i++) r[i] = t[i];
    }
}

// from [rows, columns] with a stride -> to: its transpose [columns, rows], packed. With an index [rows], row i is row index[i]
// of `from`.
template <class Number>
inline void pack_rows(const Number* from, long stride, const int* index, long rows, long columns, float* to) {
    const long inner = up(columns, SIDE);
    for (long first = 0; first < up(rows, SIDE); first += LANES)
        for (long k = 0; k < inner; k += LANES) {
            Integers r[LANES];
            for (long i = 0; i < LANES; i++) {
                const long row = first + i;
                r[i] = Integers{};
                if (row >= rows) continue;
                const Number* at = from + (index ? index[row] : row) * stride + k;
                if (k + LANES <= columns) r[i] = (Integers)load(at);
                else for (long c = 0; c < columns - k; c++) {
                    const float x = number(at[c]);
                    std::memcpy((char*)&r[i] + 4 * c, &x, 4);
                }
            }
            transpose(r);
            float* cell = to + first / PANEL * PANEL * inner + k * PANEL + first % PANEL;
            for (long i = 0; i < LANES; i++) std::memcpy(cell + i * PANEL, &r[i], sizeof r[i]);
        }
}

// from [rows, columns] with a stride -> to: the same matrix [rows, columns], packed.
template <class Number>
inline void pack_columns(const Number* from, long stride, long rows, long columns, float* to) {
    const long inner = up(rows, SIDE);
    for (long first = 0; first < columns; first += PANEL)
        for (long k = 0; k < inner; k++)
            for (long c = 0; c < PANEL; c += LANES)
                store(to + first * inner + k * PANEL + c, k < rows ? load(from + k * stride + first + c) : Vector{});
}

#if defined(__AVX512BF16__)

// bfloat16: a panel is [K / 2, 16, 2], pairs of rows side by side.

constexpr long PAIR_PANEL = 16, PAIR_STEP = SIDE * PAIR_PANEL;  // columns of a panel; its numbers in a step
template <> constexpr long PANEL_COLUMNS<bf16> = PAIR_PANEL;
#if defined(__AMX_BF16__)
template <> constexpr long ROWS_TOGETHER<bf16> = 16;
#endif

// Of whole operands alone.
template <class Between>
inline void product(const bf16* a, const bf16* b, long inner, [[maybe_unused]] long stride, long rows, long, float* c,
                    [[maybe_unused]] bool more, Between between) {
    EXPECT(stride == up(inner, SIDE) && !more);
    const long steps = up(inner, SIDE) / SIDE;
    const bf16* second = b + steps * PAIR_STEP;
#if defined(__AMX_BF16__)
    __asm__ volatile("" ::: "memory");  // the compiler does not know that tiles are read from memory
    const bool both = rows > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long s = 0; s < steps; s++) {
        _tile_loadd(4, a + s * BLOCK, 64);
        _tile_loadd(6, b + s * PAIR_STEP, 64);
        _tile_loadd(7, second + s * PAIR_STEP, 64);
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
#else
    for (long s = 0; s < steps; s++) between(s);
    for (long row = 0; row < rows; row += 8) {
        __m512 sums[8][2];
        for (int r = 0; r < 8; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        for (long s = 0; s < steps; s++)
            for (long pair = 0; pair < 16; pair++) {
                auto left = (__m512bh)_mm512_loadu_si512(b + s * PAIR_STEP + pair * 32);
                auto right = (__m512bh)_mm512_loadu_si512(second + s * PAIR_STEP + pair * 32);
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
#endif
}

inline void pack_rows(const bf16* from, long stride, const int* index, long rows, long columns, bf16* to) {
    const long steps = up(columns, SIDE) / SIDE;
    for (long first = 0; first < up(rows, SIDE); first += PAIR_PANEL)
        for (long s = 0; s < steps; s++) {
            Integers r[16];
            const __mmask32 inside = columns - s * SIDE >= SIDE ? ~0u : (1u << (columns - s * SIDE)) - 1;
            for (long i = 0; i < PAIR_PANEL; i++) {
                const long row = first + i;
                r[i] = Integers{};
                if (row < rows)
                    r[i] = (Integers)_mm512_maskz_loadu_epi16(inside, from + (index ? index[row] : row) * stride + s * SIDE);
            }
            transpose(r);
            for (long pair = 0; pair < 16; pair++)
                _mm512_storeu_si512(to + (first / PAIR_PANEL * steps + s) * PAIR_STEP + pair * 32, (__m512i)r[pair]);
        }
}

inline void pack_columns(const bf16* from, long stride, long rows, long columns, bf16* to) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; i++) low[i] = i / 2 + (i % 2) * 32, high[i] = low[i] + 16;
    const __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high), zero = _mm512_setzero_si512();
    const long steps = up(rows, SIDE) / SIDE;
    for (long k = 0; k < steps * SIDE; k += 2)
        for (long c = 0; c < columns; c += SIDE) {
            __m512i one = k < rows ? _mm512_loadu_si512(from + k * stride + c) : zero;
            __m512i two = k + 1 < rows ? _mm512_loadu_si512(from + (k + 1) * stride + c) : zero;
            bf16* cell = to + (c / PAIR_PANEL * steps + k / SIDE) * PAIR_STEP + k % SIDE * PAIR_PANEL;
            _mm512_storeu_si512(cell, _mm512_permutex2var_epi16(one, lows, two));
            _mm512_storeu_si512(cell + steps * PAIR_STEP, _mm512_permutex2var_epi16(one, highs, two));
        }
}

#endif

template <class Operand>
inline void product(const Operand* a, const Operand* b, long inner, long rows, long columns, float* c) {
    product(a, b, inner, up(inner, SIDE), rows, columns, c, false, [](long) {});
}

// SIDE numbers
template <class Number, class Operand>
inline void copy(const Number* from, Operand* to) {
    for (long k = 0; k < SIDE; k += LANES) store(to + k, load(from + k));
}
inline void copy(const bf16* from, bf16* to) { std::memcpy(to, from, SIDE * sizeof(bf16)); }

// from [rows, columns] with a stride, up to 32 rows -> to [32, columns] staged; the remaining rows are not written.
template <class Number, class Operand>
inline void stage(const Number* from, long stride, long rows, long columns, Operand* to) {
    for (long k = 0; k < columns; k += SIDE)
        for (long r = 0; r < rows; r++) copy(from + r * stride + k, to + k * SIDE + r * SIDE);
}

// Configures the AMX tiles of the calling thread while it exists, then restores their previous configuration: oneDNN (in
// PyTorch) relies on its own between calls.
class Tiles {
#if defined(__AMX_TILE__)
    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } previous;

  public:
    Tiles() {
        Config ours;
        __asm__ volatile("" ::"r"(&ours), "r"(&previous) : "memory");  // the compiler does not know that all of it is read
        _tile_storeconfig(&previous);
        _tile_loadconfig(&ours);
    }
    ~Tiles() {
        if (previous.palette) _tile_loadconfig(&previous);
        else _tile_release();
    }
    Tiles(const Tiles&) = delete;
#else
  public:
    Tiles() {}
#endif
};

}  // namespace tokengame::INSTRUCTIONS
