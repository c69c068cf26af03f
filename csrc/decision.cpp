// What a decision computes from the tokens of an image: the features of its agents, and which kept token absorbs (merges)
// each pruned token.
#include "tiles.h"

namespace tokengame {

static thread_local std::vector<bf16> metric_memory, staged_memory, packed_memory;
static thread_local std::vector<float> mean_memory, row_memory, logit_memory, cosine_memory;

struct Heads {  // keys and values of all rows: [rows, heads, width]
    const bf16 *keys, *values;
    long key_row, key_head, value_row, value_head, heads, width;

    long half() const { return width / 2; }  // only the first half of each head's values is compared
    long metric_width() const { return up(heads * half(), SIDE); }
};

static float total(__m512 x) { return _mm512_reduce_add_ps(x); }

static __mmask16 first_of(long n) { return n >= 16 ? 0xffff : (1 << n) - 1; }  // mask of the first n lanes

// The metric of a token: its compared values, scaled to length 1, so that products are cosines -> to [metric_width].
// one [metric_width] is working memory, zero beyond the compared values.
static void metric_row(const Heads& h, long row, float* one, bf16* to) {
    const long half = h.half();
    __m512 squares = _mm512_setzero_ps();
    for (long head = 0; head < h.heads; head++)
        for (long d = 0; d < half; d += 16) {
            const bf16* value = h.values + row * h.value_row + head * h.value_head + d;
            _mm_prefetch((const char*)(value + 8 * h.value_row), _MM_HINT_T0);
            __m512 x = load(value);
            squares = _mm512_fmadd_ps(x, x, squares);
            _mm512_storeu_ps(one + head * half + d, x);
        }
    const __m512 scale = _mm512_rsqrt14_ps(_mm512_set1_ps(std::max(total(squares), 1e-24f)));
    for (long d = 0; d < h.metric_width(); d += SIDE)
        store(to + d, _mm512_mul_ps(_mm512_loadu_ps(one + d), scale), _mm512_mul_ps(_mm512_loadu_ps(one + d + 16), scale));
}

// The metric of rows first .. first + n - 1: [n, metric_width].
static bf16* metric(const Heads& h, long first, long n) {
    bf16* rows = scratch(metric_memory, n * h.metric_width());
    float* one = scratch(row_memory, h.metric_width());
    std::fill(one, one + h.metric_width(), 0.f);
    for (long i = 0; i < n; i++) metric_row(h, first + i, one, rows + i * h.metric_width());
    return rows;
}

// Cosines of the rows left [rows] to the rows right [columns] of the metric [*, width]. Calls consume(i, c) for each row
// left[i], with its cosines c [columns] in pieces of 16: piece p is at c[p / 2 * BLOCK + p % 2 * 16].
template <class Consume>
static void cosines(const bf16* metric, long width, const int* left, long rows, const int* right, long columns, Consume consume) {
    bf16 *packed = scratch(packed_memory, up(columns, SIDE) * width), *staged = scratch(staged_memory, SIDE * width);
    float* c = scratch(cosine_memory, up(columns, SIDE) * SIDE);
    pack_rows(metric, width, right, columns, width, packed);
    for (long row = 0; row < rows; row += SIDE) {
        const long some = std::min(SIDE, rows - row);
        for (long k = 0; k < width; k += SIDE)
            for (long r = 0; r < some; r++)
                _mm512_storeu_si512(staged + k * SIDE + r * SIDE, _mm512_loadu_si512(metric + left[row + r] * width + k));
        for (long column = 0; column < columns; column += SIDE)
            product(staged, packed + column * width, width / SIDE, some, c + column * SIDE);
        for (long r = 0; r < some; r++) consume(row + r, c + r * SIDE);
    }
}

// query [heads, width] of an image, keys of its rows first .. first + rows - 1 -> attention logits [heads, rows].
static float* class_logits(const Heads& h, const bf16* query, float scale, long first, long rows, const float* bias) {
    float* logits = scratch(logit_memory, h.heads * rows);
    for (long head = 0; head < h.heads; head++)  // rows in the inner loop: even strides through memory can be prefetched
        for (long i = 0; i < rows; i++) {
            __m512 products = _mm512_setzero_ps();
            const bf16* key = h.keys + (first + i) * h.key_row + head * h.key_head;
            for (long d = 0; d < h.width; d += 16)
                products = _mm512_fmadd_ps(load(key + d), load(query + head * h.width + d), products);
            logits[head * rows + i] = total(products) * scale + (bias ? bias[first + i] : 0);
        }
    return logits;
}

// logit [rows] -> log of the sum of their exponentials.
static float log_sum_exp(const float* logit, long rows) {
    const float highest = *std::max_element(logit, logit + rows);
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < rows; i += 16) {
        const __m512 x = _mm512_mask_loadu_ps(_mm512_set1_ps(-1e30f), first_of(rows - i), logit + i);
        sum = _mm512_add_ps(sum, exp(_mm512_sub_ps(x, _mm512_set1_ps(highest))));
    }
    return highest + std::log(total(sum));
}

// The class token's attention to the agents of an image -> features [agents, columns]: in the first `heads` columns
// log(attention * rows); mean [agents]: centred mean attention.
static void observe_attention(const Heads& h, const bf16* query, float scale, long first, long rows, long prefix,
                              const float* bias, long columns, float* features, float* mean) {
    const long agents = rows - prefix;
    const float* logits = class_logits(h, query, scale, first, rows, bias);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(columns));
    std::fill(mean, mean + agents, 0.f);
    for (long head = 0; head < h.heads; head++) {
        const float* logit = logits + head * rows;
        const __m512 shift = _mm512_set1_ps(log_sum_exp(logit, rows) - std::log(float(rows)));
        for (long a = 0; a < agents; a += 16) {
            const __mmask16 valid = first_of(agents - a);
            const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(valid, logit + prefix + a), shift);
            _mm512_mask_storeu_ps(mean + a, valid, _mm512_add_ps(_mm512_maskz_loadu_ps(valid, mean + a), exp(x)));
            _mm512_mask_i32scatter_ps(features + a * columns + head, valid, offsets, x, 4);
        }
    }
    float average = 0;
    for (long a = 0; a < agents; a++) average += (mean[a] = std::log(std::max(mean[a], 1e-30f)));
    for (long a = 0; a < agents; a++) mean[a] -= average / agents;
}

// For each of the n agents of an image, rows first .. first + n - 1: the highest cosine to another agent (similarity), and to
// one with a higher attention [n] (leader); -1 without any. Agent i is written at i * columns. The matrix of cosines is
// symmetric, so only its blocks on and above the diagonal are computed; each gives maxima along rows and along columns.
static void similarities(const Heads& h, long first, long n, const float* attention, long columns, float* similarity,
                         float* leader) {
    const long width = h.metric_width(), padded = up(n, SIDE);
    const bf16* rows = metric(h, first, n);
    bf16 *packed = scratch(packed_memory, padded * width), *staged = scratch(staged_memory, SIDE * width);
    float *column_similarity = scratch(cosine_memory, 2 * padded), *column_leader = column_similarity + padded;
    pack_rows(rows, width, nullptr, n, width, packed);
    std::fill(column_similarity, column_similarity + 2 * padded, -1.f);
    alignas(64) float c[BLOCK];
    for (long row = 0; row < n; row += SIDE) {
        const long some = std::min(SIDE, n - row);
        __m512 row_similarity[SIDE], row_leader[SIDE];
        for (long r = 0; r < some; r++) row_similarity[r] = row_leader[r] = _mm512_set1_ps(-1);
        stage(rows + row * width, width, some, width, staged);
        for (long column = row; column < n; column += SIDE) {
            product(staged, packed + column * width, width / SIDE, some, c);
            for (long k = column; k < std::min(n, column + SIDE); k += 16) {
                const __mmask16 valid = first_of(n - k);
                const __m512 column_attention = _mm512_maskz_loadu_ps(valid, attention + k);
                __m512 similarity_k = _mm512_loadu_ps(column_similarity + k), leader_k = _mm512_loadu_ps(column_leader + k);
                for (long r = 0; r < some; r++) {
                    __mmask16 others = valid;
                    if (row + r >= k && row + r < k + 16) others &= ~(1 << (row + r - k));  // not the agent itself
                    const __m512 x = _mm512_loadu_ps(c + r * SIDE + k - column);
                    const __m512 row_attention = _mm512_set1_ps(attention[row + r]);
                    row_similarity[r] = _mm512_mask_max_ps(row_similarity[r], others, row_similarity[r], x);
                    const __mmask16 higher = _mm512_mask_cmp_ps_mask(others, column_attention, row_attention, _CMP_GT_OQ);
                    row_leader[r] = _mm512_mask_max_ps(row_leader[r], higher, row_leader[r], x);
                    if (column == row) continue;  // a block on the diagonal holds both orders of each pair already
                    similarity_k = _mm512_mask_max_ps(similarity_k, others, similarity_k, x);
                    const __mmask16 lower = _mm512_mask_cmp_ps_mask(others, column_attention, row_attention, _CMP_LT_OQ);
                    leader_k = _mm512_mask_max_ps(leader_k, lower, leader_k, x);
                }
                _mm512_storeu_ps(column_similarity + k, similarity_k);
                _mm512_storeu_ps(column_leader + k, leader_k);
            }
        }
        for (long r = 0; r < some; r++) {
            similarity[(row + r) * columns] = std::max(column_similarity[row + r], _mm512_reduce_max_ps(row_similarity[r]));
            leader[(row + r) * columns] = std::max(column_leader[row + r], _mm512_reduce_max_ps(row_leader[r]));
        }
    }
}

struct ImageRows {  // the rows of an image before the decision
    const bf16* x;  // [rows, width]
    const float* size;  // [rows], or null: all 1
    long width;

    float weight(long row) const { return size ? size[row] : 1; }
    // sum [width] += weight * x[row]; returns the squared length of x[row]
    float add(long row, float* sum) const {
        const __m512 w = _mm512_set1_ps(weight(row));
        __m512 squares = _mm512_setzero_ps();
        for (long d = 0; d < width; d += 16) {
            const __m512 y = load(x + row * width + d);
            squares = _mm512_fmadd_ps(y, y, squares);
            _mm512_storeu_ps(sum + d, _mm512_fmadd_ps(w, y, _mm512_loadu_ps(sum + d)));
        }
        return total(squares);
    }
};

// pruned [pruned_count], kept [kept_count] of the n agents of an image, rows first .. first + n - 1 -> target [pruned_count]:
// for each pruned token the index in `kept` of the most similar kept token.
static void find_targets(const Heads& h, long first, long n, const int* pruned, long pruned_count, const int* kept,
                         long kept_count, int* target) {
    cosines(metric(h, first, n), h.metric_width(), pruned, pruned_count, kept, kept_count, [&](long i, const float* c) {
        __m512 best = _mm512_set1_ps(-2);
        __m512i best_piece = _mm512_setzero_si512();
        for (long k = 0; k < kept_count; k += 16, c += k % SIDE ? 16 : BLOCK - 16) {
            const __m512 x = _mm512_loadu_ps(c);
            const __mmask16 better = _mm512_mask_cmp_ps_mask(first_of(kept_count - k), x, best, _CMP_GT_OQ);
            best = _mm512_mask_mov_ps(best, better, x);
            best_piece = _mm512_mask_set1_epi32(best_piece, better, k);
        }
        const int lane = __builtin_ctz(_mm512_cmp_ps_mask(best, _mm512_set1_ps(_mm512_reduce_max_ps(best)), _CMP_EQ_OQ));
        alignas(64) int pieces[16];
        _mm512_store_si512(pieces, best_piece);
        target[i] = pieces[lane] + lane;
    });
}

// Row `row` and the rows that it absorbs -> x [width]: their weighted sum, scaled to the length of the longest of them;
// size: the sum of their sizes.
static void merge(const ImageRows& rows, long row, const std::vector<int>& absorbed, bf16* x, float* size) {
    if (absorbed.empty()) {
        std::memcpy(x, rows.x + row * rows.width, rows.width * sizeof(bf16));
        *size = rows.weight(row);
        return;
    }
    float *sum = scratch(row_memory, rows.width), sizes = rows.weight(row);
    std::fill(sum, sum + rows.width, 0.f);
    float longest = rows.add(row, sum);
    for (int other : absorbed) {
        longest = std::max(longest, rows.add(other, sum));
        sizes += rows.weight(other);
    }
    __m512 squares = _mm512_setzero_ps();
    for (long d = 0; d < rows.width; d += 16)
        squares = _mm512_fmadd_ps(_mm512_loadu_ps(sum + d), _mm512_loadu_ps(sum + d), squares);
    const __m512 scale = _mm512_set1_ps(std::sqrt(longest / std::max(total(squares), 1e-24f)));
    for (long d = 0; d < rows.width; d += SIDE)
        store(x + d, _mm512_mul_ps(_mm512_loadu_ps(sum + d), scale), _mm512_mul_ps(_mm512_loadu_ps(sum + d + 16), scale));
    *size = sizes;
}

}  // namespace tokengame

using namespace tokengame;

extern "C" {

void class_attention(const bf16* keys, long key_row, long key_head, long heads, long width, const bf16* query, float scale,
                     const int64_t* cu_seqlens, long images, const float* bias, float* out, long threads) {
    const Heads h{keys, nullptr, key_row, key_head, 0, 0, heads, width};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long image = 0; image < images; image++) {
        const long first = cu_seqlens[image], rows = cu_seqlens[image + 1] - first;
        const float* logits = class_logits(h, query + image * heads * width, scale, first, rows, bias);
        for (long head = 0; head < heads; head++) {
            const float shift = log_sum_exp(logits + head * rows, rows);
            for (long i = 0; i < rows; i++) out[(first + i) * heads + head] = logits[head * rows + i] - shift;
        }
    }
}

void observe(const bf16* keys, long key_row, long key_head, const bf16* values, long value_row, long value_head, long heads,
             long width, const bf16* query, float scale, const int64_t* cu_seqlens, long images, long prefix, const float* bias,
             const int64_t* position, const float* dither, long total_agents, long with_similarity, float* features,
             int64_t* index, long batch_agents, long first_image, long threads) {
    const Heads h{keys, values, key_row, key_head, value_row, value_head, heads, width};
    const long columns = heads + EXTRA_FEATURES;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic)
        for (long image = 0; image < images; image++) {
            const long first = cu_seqlens[image], rows = cu_seqlens[image + 1] - first, agents = rows - prefix;
            float *out = features + (first - image * prefix) * columns, *mean = scratch(mean_memory, agents);
            observe_attention(h, query + image * heads * width, scale, first, rows, prefix, bias, columns, out, mean);
            for (long a = 0; a < agents; a++) {
                const long row = first + prefix + a;
                float* extra = out + a * columns + heads;  // similarity and leader are filled in below
                extra[0] = mean[a], extra[1] = bias ? bias[row] : 0, extra[2] = 0, extra[3] = float(agents) / total_agents;
                extra[4] = 0, extra[5] = dither[position[row]];
                if (!index) continue;
                int64_t* column = index + row - (image + 1) * prefix;
                column[0] = position[row], column[batch_agents] = first_image + image, column[2 * batch_agents] = row;
            }
            if (with_similarity) similarities(h, first + prefix, agents, mean, columns, out + heads + 2, out + heads + 4);
        }
    }
}

void absorb(const bf16* values, long value_row, long value_head, long heads, long width, const bf16* x, long dim,
            const float* size, const int64_t* position, const uint8_t* keep, const int64_t* cu_seqlens,
            const int64_t* kept_cu_seqlens, long images, long prefix, bf16* x_out, float* size_out, int64_t* position_out,
            int64_t* absorber, long threads) {
    const Heads h{nullptr, values, 0, 0, value_row, value_head, heads, width};
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        std::vector<int> kept, pruned, target;  // agents of the image; index in `kept` for each of `pruned`
        std::vector<std::vector<int>> absorbed;  // rows of the image that each of `kept` absorbs
        const std::vector<int> none;
#pragma omp for schedule(dynamic)
        for (long image = 0; image < images; image++) {
            const long first = cu_seqlens[image], agents = cu_seqlens[image + 1] - first - prefix;
            const long first_agent = first - image * prefix;  // agents of earlier images
            const uint8_t* image_keep = keep + first_agent;
            kept.clear(), pruned.clear();
            for (long a = 0; a < agents; a++) (image_keep[a] ? kept : pruned).push_back(a);
            target.assign(pruned.size(), 0), absorbed.assign(kept.size(), {});
            if (!pruned.empty())
                find_targets(h, first + prefix, agents, pruned.data(), pruned.size(), kept.data(), kept.size(), target.data());
            for (size_t i = 0; i < pruned.size(); i++) absorbed[target[i]].push_back(prefix + pruned[i]);
            if (absorber) {
                for (int a : kept) absorber[first_agent + a] = first_agent + a;
                for (size_t i = 0; i < pruned.size(); i++) absorber[first_agent + pruned[i]] = first_agent + kept[target[i]];
            }
            const ImageRows rows{x + first * dim, size ? size + first : nullptr, dim};
            for (long i = 0; i < prefix + long(kept.size()); i++) {
                const long from = i < prefix ? i : prefix + kept[i - prefix], to = kept_cu_seqlens[image] + i;
                merge(rows, from, i < prefix ? none : absorbed[i - prefix], x_out + to * dim, size_out + to);
                position_out[to] = position[first + from];
            }
        }
    }
}
}
