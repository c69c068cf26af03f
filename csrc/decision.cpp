// What a decision needs of an image's tokens: what they observe, and who absorbs whoever leaves.
#include "tiles.h"

namespace tokengame {

static thread_local std::vector<bf16> metric_memory, staged_memory, packed_memory;
static thread_local std::vector<float> number_memory, row_memory;
static thread_local std::vector<int> index_memory;

struct Heads {  // of all rows: [M, heads, width]; only the first half of each head's values is compared
    const bf16 *keys, *values;
    long key_row, key_head, value_row, value_head, heads, width;

    long half() const { return width / 2; }
    long compared() const { return up(heads * half(), SIDE); }
};

static float total(__m512 x) { return _mm512_reduce_add_ps(x); }

// Rows of length 1 that say what the tokens first..first + n - 1 tell the others: [n, compared].
static bf16* metric(const Heads& h, long first, long n) {
    const long width = h.compared(), half = h.half();
    bf16* rows = scratch(metric_memory, n * width);
    std::vector<float> one(width + 32, 0.f);
    for (long i = 0; i < n; i++) {
        __m512 squares = _mm512_setzero_ps();
        for (long head = 0; head < h.heads; head++)
            for (long d = 0; d < half; d += 16) {
                __m512 x = load(h.values + (first + i) * h.value_row + head * h.value_head + d);
                squares = _mm512_fmadd_ps(x, x, squares);
                _mm512_storeu_ps(one.data() + head * half + d, x);
            }
        const __m512 scale = _mm512_set1_ps(1 / std::max(std::sqrt(total(squares)), 1e-12f));
        for (long d = 0; d < width; d += SIDE)
            store(rows + i * width + d, _mm512_mul_ps(_mm512_loadu_ps(one.data() + d), scale),
                  _mm512_mul_ps(_mm512_loadu_ps(one.data() + d + 16), scale));
    }
    return rows;
}

// Calls with(row, column, c [32, 32]) for every block of cosines of rows `left` and `right` of the metric.
template <class With>
static void cosines(const bf16* metric, long width, const int* left, long rows, const int* right, long columns, With with) {
    bf16 *packed = scratch(packed_memory, up(columns, SIDE) * width), *staged = scratch(staged_memory, SIDE * width);
    alignas(64) float c[BLOCK];
    pack_rows(metric, width, right, columns, width, packed);
    for (long row = 0; row < rows; row += SIDE) {
        for (long k = 0; k < width; k += SIDE)
            for (long r = 0; r < SIDE; r++) {
                const bf16* from = metric + left[std::min(row + r, rows - 1)] * width + k;
                _mm512_storeu_si512(staged + k * SIDE + r * SIDE, _mm512_loadu_si512(from));
            }
        for (long column = 0; column < columns; column += SIDE) {
            product(staged, packed + column * width, width / SIDE, c);
            with(row, column, c);
        }
    }
}

// Attention of the class token, see `State.features`: features[:, :heads], and centred in the image in `mean`.
static void class_attention(const Heads& h, const bf16* query, float scale, long first, long rows, long prefix,
                            const float* bias, long columns, float* features, float* mean) {
    const long agents = rows - prefix;
    std::vector<float> logit(rows);
    for (long a = 0; a < agents; a++) mean[a] = 0;
    for (long head = 0; head < h.heads; head++) {
        float most = -1e30f, sum = 0;
        for (long i = 0; i < rows; i++) {
            __m512 products = _mm512_setzero_ps();
            const bf16* key = h.keys + (first + i) * h.key_row + head * h.key_head;
            for (long d = 0; d < h.width; d += 16) products = _mm512_fmadd_ps(load(key + d), load(query + head * h.width + d), products);
            logit[i] = total(products) * scale + (bias ? bias[first + i] : 0);
            most = std::max(most, logit[i]);
        }
        for (long i = 0; i < rows; i++) sum += std::exp(logit[i] - most);
        const float all = most + std::log(sum) - std::log(float(rows));
        for (long a = 0; a < agents; a++) {
            features[a * columns + head] = logit[prefix + a] - all;
            mean[a] += std::exp(logit[prefix + a] - all);
        }
    }
    float average = 0;
    for (long a = 0; a < agents; a++) average += (mean[a] = std::log(std::max(mean[a], 1e-30f)));
    for (long a = 0; a < agents; a++) mean[a] -= average / agents;
}

// Highest cosine to another token, and to one that the class token attends to more.
static void likeness(const Heads& h, long first, long n, const float* attention, long columns, float* similarity, float* leader) {
    int* all = scratch(index_memory, n);
    for (long i = 0; i < n; i++) all[i] = i;
    for (long i = 0; i < n; i++) similarity[i * columns] = leader[i * columns] = -1;
    cosines(metric(h, first, n), h.compared(), all, n, all, n, [&](long row, long column, const float* c) {
        for (long i = row; i < std::min(n, row + SIDE); i++) {
            const __m512 own = _mm512_set1_ps(attention[i]), none = _mm512_set1_ps(-1);
            __m512 alike = none, lead = none;
            for (long k = column; k < std::min(n, column + SIDE); k += 16) {
                __mmask16 there = n - k >= 16 ? 0xffff : (1 << (n - k)) - 1;
                if (i >= k && i < k + 16) there &= ~(1 << (i - k));  // not oneself
                const __m512 x = _mm512_loadu_ps(c + (i - row) * SIDE + k - column);
                const __mmask16 ahead = _mm512_mask_cmp_ps_mask(there, _mm512_maskz_loadu_ps(there, attention + k), own, _CMP_GT_OQ);
                alike = _mm512_mask_max_ps(alike, there, alike, x);
                lead = _mm512_mask_max_ps(lead, ahead, lead, x);
            }
            similarity[i * columns] = std::max(similarity[i * columns], _mm512_reduce_max_ps(alike));
            leader[i * columns] = std::max(leader[i * columns], _mm512_reduce_max_ps(lead));
        }
    });
}

struct Rows {  // of an image, before somebody leaves
    const bf16* x;  // [rows, width]
    const float* size;  // [rows], or null for 1
    long width;

    float weight(long row) const { return size ? size[row] : 1; }
    float length(long row) const {
        __m512 squares = _mm512_setzero_ps();
        for (long d = 0; d < width; d += 16) {
            __m512 y = load(x + row * width + d);
            squares = _mm512_fmadd_ps(y, y, squares);
        }
        return std::sqrt(total(squares));
    }
    void add(long row, float* to) const {  // to += weight * x
        const __m512 w = _mm512_set1_ps(weight(row));
        for (long d = 0; d < width; d += 16)
            _mm512_storeu_ps(to + d, _mm512_fmadd_ps(w, load(x + row * width + d), _mm512_loadu_ps(to + d)));
    }
};

// For each of the leaving agents the index among the `keepers` of the most similar one.
static void absorbers(const Heads& h, long first, long n, const int* leaving, long gone, const int* keepers, long kept, int* target) {
    std::vector<float> best(gone, -1e30f);
    cosines(metric(h, first, n), h.compared(), leaving, gone, keepers, kept, [&](long row, long column, const float* c) {
        for (long i = row; i < std::min(gone, row + SIDE); i++)
            for (long k = column; k < std::min(kept, column + SIDE); k++) {
                const float x = c[(i - row) * SIDE + k - column];
                if (x > best[i]) best[i] = x, target[i] = k;
            }
    });
}

// Row `row` with those that `target` says it absorbs, as long as the longest of them.
static void merge(const Rows& rows, long row, const std::vector<int>& absorbed, bf16* x, float* size) {
    if (absorbed.empty()) {
        std::memcpy(x, rows.x + row * rows.width, rows.width * sizeof(bf16));
        *size = rows.weight(row);
        return;
    }
    float *sum = scratch(row_memory, rows.width), longest = rows.length(row), all = rows.weight(row);
    std::fill(sum, sum + rows.width, 0.f);
    rows.add(row, sum);
    for (int other : absorbed) {
        rows.add(other, sum);
        longest = std::max(longest, rows.length(other));
        all += rows.weight(other);
    }
    __m512 squares = _mm512_setzero_ps();
    for (long d = 0; d < rows.width; d += 16) squares = _mm512_fmadd_ps(_mm512_loadu_ps(sum + d), _mm512_loadu_ps(sum + d), squares);
    const __m512 scale = _mm512_set1_ps(longest / std::max(std::sqrt(total(squares)), 1e-12f));
    for (long d = 0; d < rows.width; d += SIDE)
        store(x + d, _mm512_mul_ps(_mm512_loadu_ps(sum + d), scale), _mm512_mul_ps(_mm512_loadu_ps(sum + d + 16), scale));
    *size = all;
}

}  // namespace tokengame

using namespace tokengame;

extern "C" {

// features [agents, heads + 6], see `Observation.features`. bounds [images + 1] of rows, of which `prefix` do not play;
// query [images, heads * width]; bias [rows] or null; position [rows]; compare: whether likeness is asked for.
void observe(const bf16* keys, long key_row, long key_head, const bf16* values, long value_row, long value_head, long heads,
             long width, const bf16* query, float scale, const int64_t* bounds, long images, long prefix, const float* bias,
             const int64_t* position, const float* dither, long agents_at_start, long compare, float* features, long threads) {
    const Heads h{keys, values, key_row, key_head, value_row, value_head, heads, width};
    const long columns = heads + 6;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic)
        for (long image = 0; image < images; image++) {
            const long first = bounds[image], rows = bounds[image + 1] - first, agents = rows - prefix;
            float *out = features + (first - image * prefix) * columns, *mean = scratch(number_memory, agents);
            class_attention(h, query + image * heads * width, scale, first, rows, prefix, bias, columns, out, mean);
            for (long a = 0; a < agents; a++) {
                const long row = first + prefix + a;
                float* rest = out + a * columns + heads;
                rest[0] = mean[a], rest[1] = bias ? bias[row] : 0, rest[2] = 0, rest[3] = float(agents) / agents_at_start;
                rest[4] = 0, rest[5] = dither[position[row]];
            }
            if (compare) likeness(h, first + prefix, agents, mean, columns, out + heads + 2, out + heads + 4);
        }
    }
}

// Rows, sizes and positions of those who stay, with whoever leaves absorbed, and for each agent who stands for it.
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
            for (int a : keepers) absorber[before + a] = before + a;
            for (size_t i = 0; i < leaving.size(); i++) {
                absorbed[target[i]].push_back(prefix + leaving[i]);
                absorber[before + leaving[i]] = before + keepers[target[i]];
            }
            const Rows rows{x + first * columns, size ? size + first : nullptr, columns};
            for (long i = 0; i < prefix + long(keepers.size()); i++) {
                const long from = i < prefix ? i : prefix + keepers[i - prefix], to = kept[image] + i;
                merge(rows, from, i < prefix ? std::vector<int>{} : absorbed[i - prefix], x_out + to * columns, size_out + to);
                position_out[to] = position[first + from];
            }
        }
    }
}
}
