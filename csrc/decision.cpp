// What a decision needs of an image's tokens: what they observe, and who absorbs whoever leaves.
#include "tiles.h"

namespace tokengame {

static thread_local std::vector<bf16> metric_memory, staged_memory, packed_memory;
static thread_local std::vector<float> number_memory, row_memory, logit_memory, cosine_memory;

struct Heads {  // of all rows: [M, heads, width]; only the first half of each head's values is compared
    const bf16 *keys, *values;
    long key_row, key_head, value_row, value_head, heads, width;

    long half() const { return width / 2; }
    long compared() const { return up(heads * half(), SIDE); }
};

static float total(__m512 x) { return _mm512_reduce_add_ps(x); }

static __mmask16 first_of(long n) { return n >= 16 ? 0xffff : (1 << n) - 1; }

// What a token tells the others, as a row of length 1: [compared]; `one` [compared] is zero beyond the values.
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
    for (long d = 0; d < h.compared(); d += SIDE)
        store(to + d, _mm512_mul_ps(_mm512_loadu_ps(one + d), scale), _mm512_mul_ps(_mm512_loadu_ps(one + d + 16), scale));
}

// Of the tokens first..first + n - 1: [n, compared].
static bf16* metric(const Heads& h, long first, long n) {
    bf16* rows = scratch(metric_memory, n * h.compared());
    float* one = scratch(row_memory, h.compared());
    std::fill(one, one + h.compared(), 0.f);
    for (long i = 0; i < n; i++) metric_row(h, first + i, one, rows + i * h.compared());
    return rows;
}

// Calls with(i, c) for every row left[i] of the metric, c [columns] its cosines to the rows `right`, in pieces of 16:
// piece p is at c[p / 2 * BLOCK + p % 2 * 16].
template <class With>
static void cosines(const bf16* metric, long width, const int* left, long rows, const int* right, long columns, With with) {
    bf16 *packed = scratch(packed_memory, up(columns, SIDE) * width), *staged = scratch(staged_memory, SIDE * width);
    float* c = scratch(cosine_memory, up(columns, SIDE) * SIDE);
    pack_rows(metric, width, right, columns, width, packed);
    for (long row = 0; row < rows; row += SIDE) {
        const long some = std::min(SIDE, rows - row);
        for (long k = 0; k < width; k += SIDE)
            for (long r = 0; r < some; r++)
                _mm512_storeu_si512(staged + k * SIDE + r * SIDE, _mm512_loadu_si512(metric + left[row + r] * width + k));
        for (long column = 0; column < columns; column += SIDE) product(staged, packed + column * width, width / SIDE, some, c + column * SIDE);
        for (long r = 0; r < some; r++) with(row + r, c + r * SIDE);
    }
}

// Logits [heads, rows] of the class token for all rows of an image.
static float* class_logits(const Heads& h, const bf16* query, float scale, long first, long rows, const float* bias) {
    float* logits = scratch(logit_memory, h.heads * rows);
    for (long head = 0; head < h.heads; head++)  // in even steps through memory, which processors foresee
        for (long i = 0; i < rows; i++) {
            __m512 products = _mm512_setzero_ps();
            const bf16* key = h.keys + (first + i) * h.key_row + head * h.key_head;
            for (long d = 0; d < h.width; d += 16) products = _mm512_fmadd_ps(load(key + d), load(query + head * h.width + d), products);
            logits[head * rows + i] = total(products) * scale + (bias ? bias[first + i] : 0);
        }
    return logits;
}

static float log_of_sum(const float* logit, long rows) {  // of exponentials
    const float most = *std::max_element(logit, logit + rows);
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < rows; i += 16) {
        const __m512 x = _mm512_mask_loadu_ps(_mm512_set1_ps(-1e30f), first_of(rows - i), logit + i);
        sum = _mm512_add_ps(sum, exp(_mm512_sub_ps(x, _mm512_set1_ps(most))));
    }
    return most + std::log(total(sum));
}

// Attention of the class token as agents observe it: features[:, :heads], and centred in the image in `mean`.
static void observe_attention(const Heads& h, const bf16* query, float scale, long first, long rows, long prefix,
                              const float* bias, long columns, float* features, float* mean) {
    const long agents = rows - prefix;
    const float* logits = class_logits(h, query, scale, first, rows, bias);
    const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(columns));
    std::fill(mean, mean + agents, 0.f);
    for (long head = 0; head < h.heads; head++) {
        const float* logit = logits + head * rows;
        const __m512 all = _mm512_set1_ps(log_of_sum(logit, rows) - std::log(float(rows)));
        for (long a = 0; a < agents; a += 16) {
            const __mmask16 there = first_of(agents - a);
            const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(there, logit + prefix + a), all);
            _mm512_mask_storeu_ps(mean + a, there, _mm512_add_ps(_mm512_maskz_loadu_ps(there, mean + a), exp(x)));
            _mm512_mask_i32scatter_ps(features + a * columns + head, there, places, x, 4);
        }
    }
    float average = 0;
    for (long a = 0; a < agents; a++) average += (mean[a] = std::log(std::max(mean[a], 1e-30f)));
    for (long a = 0; a < agents; a++) mean[a] -= average / agents;
}

// Highest cosine to another token, and to one that the class token attends to more: similarity and leader of token i at
// i * columns. Of the matrix of cosines only blocks on and above the diagonal are computed, and read both ways.
static void likeness(const Heads& h, long first, long n, const float* attention, long columns, float* similarity, float* leader) {
    const long width = h.compared(), all = up(n, SIDE);
    const bf16* rows = metric(h, first, n);
    bf16 *packed = scratch(packed_memory, all * width), *staged = scratch(staged_memory, SIDE * width);
    float *alike = scratch(cosine_memory, 2 * all), *lead = alike + all;  // as columns
    pack_rows(rows, width, nullptr, n, width, packed);
    std::fill(alike, alike + 2 * all, -1.f);
    alignas(64) float c[BLOCK];
    for (long row = 0; row < n; row += SIDE) {
        const long some = std::min(SIDE, n - row);
        __m512 own_alike[SIDE], own_lead[SIDE];
        for (long r = 0; r < some; r++) own_alike[r] = own_lead[r] = _mm512_set1_ps(-1);
        stage(rows + row * width, width, some, width, staged);
        for (long column = row; column < n; column += SIDE) {
            product(staged, packed + column * width, width / SIDE, some, c);
            for (long k = column; k < std::min(n, column + SIDE); k += 16) {
                const __mmask16 columns_there = first_of(n - k);
                const __m512 others = _mm512_maskz_loadu_ps(columns_there, attention + k);
                __m512 their_alike = _mm512_loadu_ps(alike + k), their_lead = _mm512_loadu_ps(lead + k);
                for (long r = 0; r < some; r++) {
                    __mmask16 there = columns_there;
                    if (row + r >= k && row + r < k + 16) there &= ~(1 << (row + r - k));  // not oneself
                    const __m512 x = _mm512_loadu_ps(c + r * SIDE + k - column), own = _mm512_set1_ps(attention[row + r]);
                    own_alike[r] = _mm512_mask_max_ps(own_alike[r], there, own_alike[r], x);
                    own_lead[r] = _mm512_mask_max_ps(own_lead[r], _mm512_mask_cmp_ps_mask(there, others, own, _CMP_GT_OQ), own_lead[r], x);
                    if (column == row) continue;  // whole, so that every row has met every column
                    their_alike = _mm512_mask_max_ps(their_alike, there, their_alike, x);
                    their_lead = _mm512_mask_max_ps(their_lead, _mm512_mask_cmp_ps_mask(there, others, own, _CMP_LT_OQ), their_lead, x);
                }
                _mm512_storeu_ps(alike + k, their_alike);
                _mm512_storeu_ps(lead + k, their_lead);
            }
        }
        for (long r = 0; r < some; r++) {
            similarity[(row + r) * columns] = std::max(alike[row + r], _mm512_reduce_max_ps(own_alike[r]));
            leader[(row + r) * columns] = std::max(lead[row + r], _mm512_reduce_max_ps(own_lead[r]));
        }
    }
}

struct Rows {  // of an image, before somebody leaves
    const bf16* x;  // [rows, width]
    const float* size;  // [rows], or null for 1
    long width;

    float weight(long row) const { return size ? size[row] : 1; }
    // to += weight * x; returns the squared length of x
    float add(long row, float* to) const {
        const __m512 w = _mm512_set1_ps(weight(row));
        __m512 squares = _mm512_setzero_ps();
        for (long d = 0; d < width; d += 16) {
            const __m512 y = load(x + row * width + d);
            squares = _mm512_fmadd_ps(y, y, squares);
            _mm512_storeu_ps(to + d, _mm512_fmadd_ps(w, y, _mm512_loadu_ps(to + d)));
        }
        return total(squares);
    }
};

// For each of the leaving agents the index among the `keepers` of the most similar one.
static void absorbers(const Heads& h, long first, long n, const int* leaving, long gone, const int* keepers, long kept, int* target) {
    cosines(metric(h, first, n), h.compared(), leaving, gone, keepers, kept, [&](long i, const float* c) {
        __m512 best = _mm512_set1_ps(-2);
        __m512i whose = _mm512_setzero_si512();
        for (long k = 0; k < kept; k += 16, c += k % SIDE ? 16 : BLOCK - 16) {
            const __m512 x = _mm512_loadu_ps(c);
            const __mmask16 better = _mm512_mask_cmp_ps_mask(first_of(kept - k), x, best, _CMP_GT_OQ);
            best = _mm512_mask_mov_ps(best, better, x);
            whose = _mm512_mask_set1_epi32(whose, better, k);
        }
        const int lane = __builtin_ctz(_mm512_cmp_ps_mask(best, _mm512_set1_ps(_mm512_reduce_max_ps(best)), _CMP_EQ_OQ));
        alignas(64) int pieces[16];
        _mm512_store_si512(pieces, whose);
        target[i] = pieces[lane] + lane;
    });
}

// Row `row` with those that `target` says it absorbs, as long as the longest of them.
static void merge(const Rows& rows, long row, const std::vector<int>& absorbed, bf16* x, float* size) {
    if (absorbed.empty()) {
        std::memcpy(x, rows.x + row * rows.width, rows.width * sizeof(bf16));
        *size = rows.weight(row);
        return;
    }
    float *sum = scratch(row_memory, rows.width), all = rows.weight(row);
    std::fill(sum, sum + rows.width, 0.f);
    float longest = rows.add(row, sum);
    for (int other : absorbed) {
        longest = std::max(longest, rows.add(other, sum));
        all += rows.weight(other);
    }
    __m512 squares = _mm512_setzero_ps();
    for (long d = 0; d < rows.width; d += 16) squares = _mm512_fmadd_ps(_mm512_loadu_ps(sum + d), _mm512_loadu_ps(sum + d), squares);
    const __m512 scale = _mm512_set1_ps(std::sqrt(longest / std::max(total(squares), 1e-24f)));
    for (long d = 0; d < rows.width; d += SIDE)
        store(x + d, _mm512_mul_ps(_mm512_loadu_ps(sum + d), scale), _mm512_mul_ps(_mm512_loadu_ps(sum + d + 16), scale));
    *size = all;
}

}  // namespace tokengame

using namespace tokengame;

extern "C" {

// out [rows, heads]: log of the attention that the class token, query [images, heads * width], pays to each row of its image
void class_attention(const bf16* keys, long key_row, long key_head, long heads, long width, const bf16* query, float scale,
                     const int64_t* bounds, long images, const float* bias, float* out, long threads) {
    const Heads h{keys, nullptr, key_row, key_head, 0, 0, heads, width};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long image = 0; image < images; image++) {
        const long first = bounds[image], rows = bounds[image + 1] - first;
        const float* logits = class_logits(h, query + image * heads * width, scale, first, rows, bias);
        for (long head = 0; head < heads; head++) {
            const float all = log_of_sum(logits + head * rows, rows);
            for (long i = 0; i < rows; i++) out[(first + i) * heads + head] = logits[head * rows + i] - all;
        }
    }
}

// features [agents, heads + 6], see `Observation.features`; where it is wanted, index [3, agents]: place in the grid, image
// (counted from `image_before`) and row of each agent. bounds [images + 1] of rows, of which `prefix` do not play;
// query [images, heads * width]; bias [rows] or null; position [rows]; compare: whether likeness is asked for.
void observe(const bf16* keys, long key_row, long key_head, const bf16* values, long value_row, long value_head, long heads,
             long width, const bf16* query, float scale, const int64_t* bounds, long images, long prefix, const float* bias,
             const int64_t* position, const float* dither, long agents_at_start, long compare, float* features, int64_t* index,
             long agents_in_all, long image_before, long threads) {
    const Heads h{keys, values, key_row, key_head, value_row, value_head, heads, width};
    const long columns = heads + 6;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic)
        for (long image = 0; image < images; image++) {
            const long first = bounds[image], rows = bounds[image + 1] - first, agents = rows - prefix;
            float *out = features + (first - image * prefix) * columns, *mean = scratch(number_memory, agents);
            observe_attention(h, query + image * heads * width, scale, first, rows, prefix, bias, columns, out, mean);
            for (long a = 0; a < agents; a++) {
                const long row = first + prefix + a;
                float* rest = out + a * columns + heads;
                rest[0] = mean[a], rest[1] = bias ? bias[row] : 0, rest[2] = 0, rest[3] = float(agents) / agents_at_start;
                rest[4] = 0, rest[5] = dither[position[row]];
                if (!index) continue;
                int64_t* own = index + row - (image + 1) * prefix;
                own[0] = position[row], own[agents_in_all] = image_before + image, own[2 * agents_in_all] = row;
            }
            if (compare) likeness(h, first + prefix, agents, mean, columns, out + heads + 2, out + heads + 4);
        }
    }
}

// Rows, sizes and positions of those who stay, with whoever leaves absorbed, and, where it is wanted, for each agent who
// stands for it.
// keep [agents]; kept [images + 1] bounds of the rows left.
void absorb(const bf16* values, long value_row, long value_head, long heads, long width, const bf16* x, long columns,
            const float* size, const int64_t* position, const uint8_t* keep, const int64_t* bounds, const int64_t* kept,
            long images, long prefix, bf16* x_out, float* size_out, int64_t* position_out, int64_t* absorber, long threads) {
    const Heads h{nullptr, values, 0, 0, value_row, value_head, heads, width};
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        std::vector<int> keepers, leaving, target;
        std::vector<std::vector<int>> absorbed;
        const std::vector<int> nobody;
#pragma omp for schedule(dynamic)
        for (long image = 0; image < images; image++) {
            const long first = bounds[image], agents = bounds[image + 1] - first - prefix;
            const long before = first - image * prefix;  // agents of earlier images
            const uint8_t* stays = keep + before;
            keepers.clear(), leaving.clear();
            for (long a = 0; a < agents; a++) (stays[a] ? keepers : leaving).push_back(a);
            target.assign(leaving.size(), 0), absorbed.assign(keepers.size(), {});
            if (!leaving.empty())
                absorbers(h, first + prefix, agents, leaving.data(), leaving.size(), keepers.data(), keepers.size(), target.data());
            for (size_t i = 0; i < leaving.size(); i++) absorbed[target[i]].push_back(prefix + leaving[i]);
            if (absorber) {
                for (int a : keepers) absorber[before + a] = before + a;
                for (size_t i = 0; i < leaving.size(); i++) absorber[before + leaving[i]] = before + keepers[target[i]];
            }
            const Rows rows{x + first * columns, size ? size + first : nullptr, columns};
            for (long i = 0; i < prefix + long(keepers.size()); i++) {
                const long from = i < prefix ? i : prefix + keepers[i - prefix], to = kept[image] + i;
                merge(rows, from, i < prefix ? nobody : absorbed[i - prefix], x_out + to * columns, size_out + to);
                position_out[to] = position[first + from];
            }
        }
    }
}
}
