// Attention inside each image of a packed batch: nothing padded but to 32, no matrix of all pairs in memory.
#include "tiles.h"

namespace tokengame {

static thread_local std::vector<bf16> key_memory, value_memory, query_memory, share_memory;
static thread_local std::vector<float> score_memory, bias_memory;

struct Operand {  // [rows, heads, width]
    const bf16* at;
    long row, head;  // strides
};

// Scores of up to 32 queries over n keys, blocks of [32, 32], to shares [staged] that want dividing by `sums`.
static void softmax(float* scores, long rows, long n, float factor, const float* bias, bf16* shares, float* sums) {
    const __m512 scale = _mm512_set1_ps(factor), nothing = _mm512_setzero_ps();
    for (long r = 0; r < rows; r++) {
        float* row = scores + r * SIDE;
        auto piece = [&](long k) { return row + k / SIDE * BLOCK + k % SIDE; };  // of 16 keys
        __m512 most = _mm512_set1_ps(-1e30f), sum = nothing;
        for (long k = 0; k < n; k += 16) {
            const __m512 logit = _mm512_fmadd_ps(_mm512_loadu_ps(piece(k)), scale, _mm512_loadu_ps(bias + k));
            _mm512_storeu_ps(piece(k), logit);
            most = _mm512_max_ps(most, logit);
        }
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        for (long k = 0; k < n; k += SIDE) {
            const bool both = k + 16 < n;
            const __m512 low = exp2(_mm512_sub_ps(_mm512_loadu_ps(piece(k)), top));
            const __m512 high = both ? exp2(_mm512_sub_ps(_mm512_loadu_ps(piece(k + 16)), top)) : nothing;
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
            store(shares + k * SIDE + r * SIDE, low, high);
        }
        sums[r] = _mm512_reduce_add_ps(sum);
    }
}

// One head of one image: queries first..last of `asking` rows over n keys.
static void head(Operand q, Operand k, Operand v, long asking, long n, long width, const float* bias, float factor, bf16* out, long out_row) {
    const long padded = up(n, SIDE), steps = width / SIDE;
    bf16 *keys = scratch(key_memory, padded * width), *values = scratch(value_memory, padded * width);
    bf16 *query = scratch(query_memory, SIDE * width), *shares = scratch(share_memory, SIDE * padded);
    float* scores = scratch(score_memory, SIDE * padded);
    pack_rows(k.at, k.row, nullptr, n, width, keys);
    pack_columns(v.at, v.row, n, width, values);
    for (long first = 0; first < asking; first += SIDE) {
        const long rows = std::min(SIDE, asking - first);
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

// asked, seen: [images + 1] first rows; bias [rows of k] or null, added to the logits of each key; out [rows of q, heads * width].
void attention(const bf16* q, long q_row, long q_head, const bf16* k, long k_row, long k_head, const bf16* v, long v_row,
               long v_head, const int64_t* asked, const int64_t* seen, long images, long heads, long width,
               const float* bias, float scale, bf16* out, long threads) {
    const float log2e = 1.44269504f;
    long least = SIDE;  // queries that a task takes at least
    long longest = 0;
    for (long i = 0; i < images; i++) longest = std::max<long>(longest, asked[i + 1] - asked[i]);
    long parts = std::max<long>(1, std::min((4 * threads) / (images * heads), (longest + least - 1) / least));
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < images * heads * parts; task++) {
            const long image = task / (heads * parts), h = task / parts % heads, part = task % parts;
            const long n = seen[image + 1] - seen[image], all = asked[image + 1] - asked[image];
            const long each = up((all + parts - 1) / parts, SIDE), begin = std::min(all, part * each);
            const long first = asked[image] + begin, some = std::min(each, all - begin), start = seen[image];
            if (some <= 0 || n <= 0) continue;
            float* own = scratch(bias_memory, up(n, SIDE));
            for (long i = 0; i < up(n, SIDE); i++) own[i] = i >= n ? -1e5f : bias ? bias[start + i] * log2e : 0;
            head({q + first * q_row + h * q_head, q_row, q_head}, {k + start * k_row + h * k_head, k_row, k_head},
                 {v + start * v_row + h * v_head, v_row, v_head}, some, n, width, own, scale * log2e,
                 out + first * heads * width + h * width, heads * width);
        }
    }
}
}
