// Attention inside each image of a packed batch. Keys are padded to a multiple of 32 only, and no matrix of all pairs of
// tokens is stored.
#include "tiles.h"

namespace tokengame {

static thread_local std::vector<bf16> key_memory, value_memory, query_memory, share_memory;
static thread_local std::vector<float> score_memory, bias_memory;

struct Operand {  // [rows, heads, width]
    const bf16* at;
    long row, head;  // strides
};

// Softmax without the division. scores: up to 32 rows (queries) over n keys, in blocks of [32, 32], overwritten ->
// shares: staged, exponentials of factor * score + bias; sums [rows]: what they must be divided by.
static void softmax(float* scores, long rows, long n, float factor, const float* bias, bf16* shares, float* sums) {
    const __m512 scale = _mm512_set1_ps(factor), zero = _mm512_setzero_ps();
    for (long r = 0; r < rows; r++) {
        float* row = scores + r * SIDE;
        auto piece = [&](long k) { return row + k / SIDE * BLOCK + k % SIDE; };  // 16 keys from key k on
        __m512 highest = _mm512_set1_ps(-1e30f), sum = zero;
        for (long k = 0; k < n; k += 16) {
            const __m512 logit = _mm512_fmadd_ps(_mm512_loadu_ps(piece(k)), scale, _mm512_loadu_ps(bias + k));
            _mm512_storeu_ps(piece(k), logit);
            highest = _mm512_max_ps(highest, logit);
        }
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
        for (long k = 0; k < n; k += SIDE) {
            const bool both = k + 16 < n;
            const __m512 low = exp2(_mm512_sub_ps(_mm512_loadu_ps(piece(k)), top));
            const __m512 high = both ? exp2(_mm512_sub_ps(_mm512_loadu_ps(piece(k + 16)), top)) : zero;
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
            store(shares + k * SIDE + r * SIDE, low, high);
        }
        sums[r] = _mm512_reduce_add_ps(sum);
    }
}

// One head of one image: q [queries, width], k and v [n, width] -> out [queries, width] with stride out_row.
// bias [n rounded up to a multiple of 32], very low for keys that are padding; factor and bias are in units of log 2.
static void head_attention(Operand q, Operand k, Operand v, long queries, long n, long width, const float* bias, float factor,
                           bf16* out, long out_row) {
    const long padded = up(n, SIDE), steps = width / SIDE;
    bf16 *keys = scratch(key_memory, padded * width), *values = scratch(value_memory, padded * width);
    bf16 *query = scratch(query_memory, SIDE * width), *shares = scratch(share_memory, SIDE * padded);
    float* scores = scratch(score_memory, SIDE * padded);
    pack_rows(k.at, k.row, nullptr, n, width, keys);
    pack_columns(v.at, v.row, n, width, values);
    for (long first = 0; first < queries; first += SIDE) {
        const long rows = std::min(SIDE, queries - first);
        stage(q.at + first * q.row, q.row, rows, width, query);
        for (long key = 0; key < padded; key += SIDE) product(query, keys + key * width, steps, rows, scores + key * SIDE);
        float sums[SIDE];
        softmax(scores, rows, n, factor, bias, shares, sums);
        alignas(64) float c[BLOCK];
        for (long column = 0; column < width; column += SIDE) {
            product(shares, values + column * padded, padded / SIDE, rows, c);
            for (long r = 0; r < rows; r++) {
                const __m512 share = _mm512_set1_ps(1 / sums[r]);
                store(out + (first + r) * out_row + column, _mm512_mul_ps(_mm512_loadu_ps(c + r * SIDE), share),
                      _mm512_mul_ps(_mm512_loadu_ps(c + r * SIDE + 16), share));
            }
        }
    }
}

}  // namespace tokengame

using namespace tokengame;

extern "C" {

void attention(const bf16* q, long q_row, long q_head, const bf16* k, long k_row, long k_head, const bf16* v, long v_row,
               long v_head, const int64_t* query_cu_seqlens, const int64_t* key_cu_seqlens, long images, long heads, long width,
               const float* bias, float scale, bf16* out, long threads) {
    const float log2e = 1.44269504f;  // the softmax uses powers of 2
    long fewest = SIDE;  // queries of a task
    long longest = 0;  // queries of an image
    for (long i = 0; i < images; i++) longest = std::max<long>(longest, query_cu_seqlens[i + 1] - query_cu_seqlens[i]);
    // with few images and heads, the queries of each are split into parts, so that all threads have work
    long parts = std::max<long>(1, std::min((4 * threads) / (images * heads), (longest + fewest - 1) / fewest));
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < images * heads * parts; task++) {
            const long image = task / (heads * parts), h = task / parts % heads, part = task % parts;
            const long n = key_cu_seqlens[image + 1] - key_cu_seqlens[image];
            const long all = query_cu_seqlens[image + 1] - query_cu_seqlens[image];
            const long part_size = up((all + parts - 1) / parts, SIDE), begin = std::min(all, part * part_size);
            const long first = query_cu_seqlens[image] + begin, queries = std::min(part_size, all - begin);
            const long start = key_cu_seqlens[image];
            if (queries <= 0 || n <= 0) continue;
            float* key_bias = scratch(bias_memory, up(n, SIDE));
            for (long i = 0; i < up(n, SIDE); i++) key_bias[i] = i >= n ? -1e5f : bias ? bias[start + i] * log2e : 0;
            head_attention({q + first * q_row + h * q_head, q_row, q_head}, {k + start * k_row + h * k_head, k_row, k_head},
                           {v + start * v_row + h * v_head, v_row, v_head}, queries, n, width, key_bias, scale * log2e,
                           out + first * heads * width + h * width, heads * width);
        }
    }
}
}
