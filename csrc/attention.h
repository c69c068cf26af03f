// Attention inside each image of a packed batch. Keys are padded to a multiple of 32 only, and no matrix of all pairs of
// tokens is stored.
#pragma once

#include "rows.h"

namespace tokengame::INSTRUCTIONS {

template <class Number>
struct Strided {  // [rows, heads, width]
    const Number* at;
    long row, head;  // strides
};

// Softmax without the division. scores: up to 32 rows (queries) over n keys, in blocks of [32, 32], overwritten ->
// shares: staged, exponentials of factor * score + bias; sums [rows]: what they must be divided by.
template <class Number>
inline void softmax(float* scores, long rows, long n, float factor, const float* bias, Operand<Number>* shares, float* sums) {
    const long padded = up(n, SIDE);
    for (long r = 0; r < rows; r++) {
        float* row = scores + r * SIDE;
        Vector top = same(-1e30f), sum{};
        for (long block = 0; block < padded; block += SIDE)
            for (long k = 0; k < SIDE && block + k < n; k += LANES) {
                float* piece = row + block * SIDE + k;
                const Vector logit = load(piece) * factor + load(bias + block + k);
                store(piece, logit);
                top = vmax(top, logit);
            }
        const Vector highest_logit = same(highest(top));
        for (long block = 0; block < padded; block += SIDE)
            for (long k = 0; k < SIDE; k += PAIR) {
                const float* piece = row + block * SIDE + k;
                Vector low{}, high{};
                if (block + k < n) low = exp2<Number>(load(piece) - highest_logit);
                if (block + k + LANES < n) high = exp2<Number>(load(piece + LANES) - highest_logit);
                sum += low + high;
                store(shares + block * SIDE + r * SIDE + k, low, high);
            }
        sums[r] = total(sum);
    }
}

// One head of one image: q [queries, width], k and v [n, width] -> out [queries, width] with stride out_row.
// bias [n rounded up to a multiple of 32], very low for keys that are padding; factor and bias are in units of log 2.
template <class Number>
void head_attention(Strided<Number> q, Strided<Number> k, Strided<Number> v, long queries, long n, long width,
                    const float* bias, float factor, Number* out, long out_row) {
    static thread_local Buffer key_memory, value_memory, query_memory, share_memory, score_memory;
    const long padded = up(n, SIDE);
    auto *keys = key_memory.take<Operand<Number>>(padded * width), *values = value_memory.take<Operand<Number>>(padded * width);
    auto *query = query_memory.take<Operand<Number>>(SIDE * width), *shares = share_memory.take<Operand<Number>>(SIDE * padded);
    float* scores = score_memory.take<float>(SIDE * padded);
    pack_rows(k.at, k.row, nullptr, n, width, keys);
    pack_columns(v.at, v.row, n, width, values);
    for (long first = 0; first < queries; first += SIDE) {
        const long rows = least(SIDE, queries - first);
        stage(q.at + first * q.row, q.row, rows, width, query);
        for (long key = 0; key < padded; key += SIDE)
            product(query, keys + key * width, width, rows, least(SIDE, n - key), scores + key * SIDE);
        float sums[SIDE];
        softmax<Number>(scores, rows, n, factor, bias, shares, sums);
        alignas(64) float c[BLOCK];
        for (long column = 0; column < width; column += SIDE) {
            product(shares, values + column * padded, n, rows, SIDE, c);
            for (long r = 0; r < rows; r++) {
                const Vector share = same(1 / sums[r]);
                for (long d = 0; d < SIDE; d += PAIR)
                    store(out + (first + r) * out_row + column + d, load(c + r * SIDE + d) * share,
                          load(c + r * SIDE + d + LANES) * share);
            }
        }
    }
}

template <class Number>
void attention(const Number* q, long q_row, long q_head, const Number* k, long k_row, long k_head, const Number* v, long v_row,
               long v_head, const int64_t* query_cu_seqlens, const int64_t* key_cu_seqlens, long images, long heads, long width,
               const float* bias, double scale, Number* out, long threads) {
    EXPECT(threads >= 1 && heads >= 0 && in_tiles(width));
    EXPECT(are_packed(query_cu_seqlens, images, ANY_ROWS, 0) && are_packed(key_cu_seqlens, images, ANY_ROWS, 0));
    static thread_local Buffer bias_memory;
    const float log2e = 1.44269504f;  // the softmax uses powers of 2
    long longest = 0;  // queries of an image
    for (long i = 0; i < images; i++) longest = most<long>(longest, query_cu_seqlens[i + 1] - query_cu_seqlens[i]);
    // with few images and heads, the queries of each are split into parts, so that all threads have work
    const long parts = most(1L, least(4 * threads / most(1L, images * heads), (longest + SIDE - 1) / SIDE));
    in_parallel(threads, images * heads * parts, [&](long task) {
        const long image = task / (heads * parts), h = task / parts % heads, part = task % parts;
        const long start = key_cu_seqlens[image], n = key_cu_seqlens[image + 1] - start;
        const long all = query_cu_seqlens[image + 1] - query_cu_seqlens[image];
        const long part_size = up((all + parts - 1) / parts, ROWS_TOGETHER<Operand<Number>>);
        const long begin = least(all, part * part_size);
        const long first = query_cu_seqlens[image] + begin, queries = least(part_size, all - begin);
        if (queries <= 0 || n <= 0) return;
        float* key_bias = bias_memory.take<float>(up(n, SIDE));
        for (long i = 0; i < up(n, SIDE); i++) key_bias[i] = i >= n ? -1e5f : bias ? bias[start + i] * log2e : 0;
        head_attention<Number>({q + first * q_row + h * q_head, q_row, q_head},
                               {k + start * k_row + h * k_head, k_row, k_head}, {v + start * v_row + h * v_head, v_row, v_head},
                               queries, n, width, key_bias, scale * log2e, out + first * heads * width + h * width,
                               heads * width);
    });
}

}  // namespace tokengame::INSTRUCTIONS
