// What a decision computes from the tokens of an image: the features of its agents, and which kept token absorbs (merges)
// each pruned token.
#pragma once

#include <utility>

#include "attention.h"

namespace tokengame::INSTRUCTIONS {

template <class Number>
struct Heads {  // keys and values of all rows: [rows, heads, width]
    const Number *keys, *values;
    long key_row, key_head, value_row, value_head, heads, width;

    long half() const { return width / 2; }  // only the first half of each head's values is compared
    long metric_width() const { return up(heads * half(), SIDE); }
};

// The metric of a token: its compared values, scaled to length 1, so that products are cosines -> to [metric_width].
// one [metric_width] is working memory, zero beyond the compared values.
template <class Number>
inline void metric_row(const Heads<Number>& h, long row, float* one, Operand<Number>* to) {
    const long half = h.half();
    Vector squares{};
    for (long head = 0; head < h.heads; head++)
        for (long d = 0; d < half; d += LANES) {
            const Number* value = h.values + row * h.value_row + head * h.value_head + d;
            __builtin_prefetch(value + 8 * h.value_row);
            const Vector x = load(value);
            squares += x * x;
            store(one + head * half + d, x);
        }
    const Vector scale = same(1 / std::sqrt(most(total(squares), 1e-24f)));
    for (long d = 0; d < h.metric_width(); d += PAIR) store(to + d, load(one + d) * scale, load(one + d + LANES) * scale);
}

// The metric of rows first .. first + n - 1: [n, metric_width].
template <class Number>
Operand<Number>* metric(const Heads<Number>& h, long first, long n) {
    static thread_local Buffer memory, row_memory;
    auto* rows = memory.take<Operand<Number>>(n * h.metric_width());
    float* one = row_memory.take<float>(h.metric_width());
    for (long d = 0; d < h.metric_width(); d++) one[d] = 0;
    for (long i = 0; i < n; i++) metric_row(h, first + i, one, rows + i * h.metric_width());
    return rows;
}

// Cosines of the rows left [rows] to the rows right [columns] of the metric [*, width]. Calls consume(i, c) for each row
// left[i], with its cosines c [columns] in blocks of 32 that are BLOCK apart.
template <class Operand, class Consume>
void cosines(const Operand* metric, long width, const int* left, long rows, const int* right, long columns, Consume consume) {
    static thread_local Buffer packed_memory, staged_memory, cosine_memory;
    auto *packed = packed_memory.take<Operand>(up(columns, SIDE) * width), *staged = staged_memory.take<Operand>(SIDE * width);
    float* c = cosine_memory.take<float>(up(columns, SIDE) * SIDE);
    pack_rows(metric, width, right, columns, width, packed);
    for (long row = 0; row < rows; row += SIDE) {
        const long some = least(SIDE, rows - row);
        for (long k = 0; k < width; k += SIDE)
            for (long r = 0; r < some; r++)
                std::memcpy(staged + k * SIDE + r * SIDE, metric + left[row + r] * width + k, SIDE * sizeof(Operand));
        for (long column = 0; column < columns; column += SIDE)
            product(staged, packed + column * width, width, some, least(SIDE, columns - column), c + column * SIDE);
        for (long r = 0; r < some; r++) consume(row + r, c + r * SIDE);
    }
}

// query [heads, width] of an image, keys of its rows first .. first + rows - 1 -> attention logits [heads, rows].
template <class Number>
float* class_logits(const Heads<Number>& h, const Number* query, float scale, long first, long rows, const float* bias) {
    static thread_local Buffer memory;
    float* logits = memory.take<float>(h.heads * rows + LANES);  // LANES more may be read
    for (long head = 0; head < h.heads; head++)  // rows in the inner loop: even strides through memory can be prefetched
        for (long i = 0; i < rows; i++) {
            Vector products{};
            const Number* key = h.keys + (first + i) * h.key_row + head * h.key_head;
            for (long d = 0; d < h.width; d += LANES) products += load(key + d) * load(query + head * h.width + d);
            logits[head * rows + i] = total(products) * scale + (bias ? bias[first + i] : 0);
        }
    return logits;
}

// logit [rows], LANES more of which may be read -> log of the sum of their exponentials.
template <class Number>
inline float log_sum_exp(const float* logit, long rows) {
    float top = logit[0];
    for (long i = 1; i < rows; i++) top = most(top, logit[i]);
    Vector sum{};
    for (long i = 0; i < rows; i += LANES) {
        const Vector x = exp<Number>(load(logit + i) - top);
        sum += first_of(rows - i) ? x : Vector{};
    }
    return top + std::log(total(sum));
}

// The class token's attention to the agents of an image -> features [agents, columns]: in the first `heads` columns
// log(attention * rows); mean [agents + LANES]: centred mean attention.
template <class Number>
void observe_attention(const Heads<Number>& h, const Number* query, float scale, long first, long rows, long prefix,
                       const float* bias, long columns, float* features, float* mean) {
    const long agents = rows - prefix;
    const float* logits = class_logits(h, query, scale, first, rows, bias);
    for (long a = 0; a < agents + LANES; a++) mean[a] = 0;
    for (long head = 0; head < h.heads; head++) {
        const float* logit = logits + head * rows;
        const float shift = log_sum_exp<Number>(logit, rows) - std::log(float(rows));
        for (long a = 0; a < agents; a += LANES) store(mean + a, load(mean + a) + exp<Number>(load(logit + prefix + a) - shift));
        for (long a = 0; a < agents; a++) features[a * columns + head] = logit[prefix + a] - shift;
    }
    float average = 0;
    for (long a = 0; a < agents; a++) average += (mean[a] = std::log(most(mean[a], 1e-30f)));
    for (long a = 0; a < agents; a++) mean[a] -= average / agents;
}

// For each of the n agents of an image, rows first .. first + n - 1: the highest cosine to another agent (similarity), and to
// one with a higher attention [n + LANES] (leader); -1 without any. Agent i is written at i * columns. The matrix of cosines
// is symmetric, so only its blocks on and above the diagonal are computed; each gives maxima along rows and along columns.
template <class Number>
void similarities(const Heads<Number>& h, long first, long n, const float* attention, long columns, float* similarity,
                  float* leader) {
    static thread_local Buffer packed_memory, staged_memory, column_memory;
    const long width = h.metric_width(), padded = up(n, SIDE);
    auto* rows = metric(h, first, n);
    auto *packed = packed_memory.take<Operand<Number>>(padded * width), *staged = staged_memory.take<Operand<Number>>(SIDE * width);
    float *column_similarity = column_memory.take<float>(2 * padded), *column_leader = column_similarity + padded;
    pack_rows(rows, width, nullptr, n, width, packed);
    for (long k = 0; k < 2 * padded; k++) column_similarity[k] = -1;
    alignas(64) float c[BLOCK];
    const Vector none = same(-1);
    for (long row = 0; row < n; row += SIDE) {
        const long some = least(SIDE, n - row);
        Vector row_similarity[SIDE], row_leader[SIDE];
        for (long r = 0; r < some; r++) row_similarity[r] = row_leader[r] = none;
        for (long k = 0; k < width; k += SIDE)
            for (long r = 0; r < some; r++)
                std::memcpy(staged + k * SIDE + r * SIDE, rows + (row + r) * width + k, SIDE * sizeof(*staged));
        for (long column = row; column < n; column += SIDE) {
            product(staged, packed + column * width, width, some, least(SIDE, n - column), c);
            for (long k = column; k < least(n, column + SIDE); k += LANES) {
                const Integers lanes = lane_numbers() + int(k);  // agents of the columns
                const Vector column_attention = load(attention + k);
                Vector similarity_k = load(column_similarity + k), leader_k = load(column_leader + k);
                for (long r = 0; r < some; r++) {
                    const Integers others = (lanes < int(n)) & (lanes != int(row + r));  // not the agent itself
                    const Vector row_attention = same(attention[row + r]);
                    const Vector x = others ? load(c + r * SIDE + k - column) : none;
                    row_similarity[r] = vmax(row_similarity[r], x);
                    row_leader[r] = vmax(row_leader[r], column_attention > row_attention ? x : none);
                    if (column == row) continue;  // a block on the diagonal holds both orders of each pair already
                    similarity_k = vmax(similarity_k, x);
                    leader_k = vmax(leader_k, column_attention < row_attention ? x : none);
                }
                store(column_similarity + k, similarity_k);
                store(column_leader + k, leader_k);
            }
        }
        for (long r = 0; r < some; r++) {
            similarity[(row + r) * columns] = most(column_similarity[row + r], highest(row_similarity[r]));
            leader[(row + r) * columns] = most(column_leader[row + r], highest(row_leader[r]));
        }
    }
}

// x [agents, dim], position [agents] -> keep logits [agents] by an actor that reads tokens and their ids.
template <class Number>
void act_on(const Actor& actor, const Number* x, const int64_t* position, long agents, float* logits) {
    static thread_local Buffer memories[2];
    long widest = 0;
    for (long i = 0; i <= actor.count; i++) widest = most<long>(widest, actor.widths[i]);
    float *from = memories[0].take<float>(up(agents, SIDE) * widest), *to = memories[1].take<float>(up(agents, SIDE) * widest);
    const long dim = actor.widths[0];
    for (long a = 0; a < agents; a += SIDE) stage(x + a * dim, dim, least(SIDE, agents - a), dim, from + a * dim);
    for (long i = 0; i < actor.count; i++, std::swap(from, to)) {
        const Linear& layer = actor.layers[i];
        const long outputs = actor.widths[i + 1];
        products(from, agents, actor.widths[i], layer.packed, outputs, [&](long row, long column, const float* c) {
            if (i + 1 == actor.count) {
                logits[row] = c[1] + layer.bias[1] - (c[0] + layer.bias[0]);
                return;
            }
            const float* identity = i ? nullptr : actor.identity + position[row] * outputs + column;
            for (long k = 0; k < SIDE; k += LANES) {
                const Vector y = with_bias(layer, c + k, column + k);
                store(to + staged_at(row, column, outputs) + k, tanh<float>(identity ? y + load(identity + k) : y));
            }
        });
    }
}

// The same by several threads.
template <class Number>
void act(const Actor& actor, const Number* x, const int64_t* position, long agents, float* logits, long threads) {
    const long size = up((agents + threads - 1) / threads, ROWS_TOGETHER<float>);
    in_parallel(threads, (agents + size - 1) / size, [&](long task) {
        const long first = task * size;
        act_on(actor, x + first * actor.widths[0], position + first, least(size, agents - first), logits + first);
    });
}

template <class Number>
struct ImageRows {  // the rows of an image before the decision
    const Number* x;  // [rows, width]
    const float* size;  // [rows], or null: all 1
    long width;

    float weight(long row) const { return size ? size[row] : 1; }
    // sum [width] += weight * x[row]; returns the squared length of x[row]
    float add(long row, float* sum) const {
        const Vector w = same(weight(row));
        Vector squares{};
        for (long d = 0; d < width; d += LANES) {
            const Vector y = load(x + row * width + d);
            squares += y * y;
            store(sum + d, w * y + load(sum + d));
        }
        return total(squares);
    }
};

// pruned [pruned_count], kept [kept_count] of the n agents of an image, rows first .. first + n - 1 -> target [pruned_count]:
// for each pruned token the index in `kept` of the most similar kept token, the first of several.
template <class Number>
void find_targets(const Heads<Number>& h, long first, long n, const int* pruned, long pruned_count, const int* kept,
                  long kept_count, int* target) {
    cosines(metric(h, first, n), h.metric_width(), pruned, pruned_count, kept, kept_count, [&](long i, const float* c) {
        Vector best = same(-2);
        Integers where{};
        const Integers lanes = lane_numbers();
        for (long k = 0; k < kept_count; k += LANES) {
            const Vector x = load(c + k / SIDE * BLOCK + k % SIDE);
            const Integers here = lanes + int(k), better = (x > best) & (here < int(kept_count));
            best = better ? x : best;
            where = better ? here : where;
        }
        const float top = highest(best);
        int found = int(kept_count);
        for (int lane = 0; lane < LANES; lane++)
            if (best[lane] == top) found = least(found, int(where[lane]));
        target[i] = found < kept_count ? found : 0;  // none is greater: not a number
    });
}

// Row `row` and the rows that it absorbs -> x [width]: their weighted sum, scaled to the length of the longest of them;
// size: the sum of their sizes.
template <class Number>
void merge(const ImageRows<Number>& rows, long row, const int* absorbed, long count, Number* x, float* size) {
    static thread_local Buffer memory;
    if (!count) {
        std::memcpy(x, rows.x + row * rows.width, rows.width * sizeof(Number));
        *size = rows.weight(row);
        return;
    }
    float *sum = memory.take<float>(rows.width), sizes = rows.weight(row);
    for (long d = 0; d < rows.width; d++) sum[d] = 0;
    float longest = rows.add(row, sum);
    for (long i = 0; i < count; i++) {
        longest = most(longest, rows.add(absorbed[i], sum));
        sizes += rows.weight(absorbed[i]);
    }
    Vector squares{};
    for (long d = 0; d < rows.width; d += LANES) squares += load(sum + d) * load(sum + d);
    const Vector scale = same(std::sqrt(longest / most(total(squares), 1e-24f)));
    for (long d = 0; d < rows.width; d += LANES) store(x + d, load(sum + d) * scale);
    *size = sizes;
}

template <class Number>
void class_attention(const Number* keys, long key_row, long key_head, long heads, long width, const Number* query,
                     double scale, const int64_t* cu_seqlens, long images, const float* bias, float* out, long threads) {
    EXPECT(threads >= 0 && heads >= 0 && in_tiles(width) && are_packed(cu_seqlens, images, ANY_ROWS, 1));
    const Heads<Number> h{keys, nullptr, key_row, key_head, 0, 0, heads, width};
    in_parallel(threads, images, [&](long image) {
        const long first = cu_seqlens[image], rows = cu_seqlens[image + 1] - first;
        const float* logits = class_logits(h, query + image * heads * width, scale, first, rows, bias);
        for (long head = 0; head < heads; head++) {
            const float shift = log_sum_exp<Number>(logits + head * rows, rows);
            for (long i = 0; i < rows; i++) out[(first + i) * heads + head] = logits[head * rows + i] - shift;
        }
    });
}

template <class Number>
void observe(const Number* keys, long key_row, long key_head, const Number* values, long value_row, long value_head,
             long heads, long width, const Number* query, double scale, const int64_t* cu_seqlens, long images, long prefix,
             const float* bias, const int64_t* position, const float* dither, long total_agents, long with_similarity,
             float* features, int64_t* index, long batch_agents, long first_image, long threads) {
    EXPECT(threads >= 0 && heads >= 0 && in_tiles(width) && prefix >= 0 && total_agents >= 1 && first_image >= 0);
    EXPECT(are_packed(cu_seqlens, images, ANY_ROWS, most(1L, prefix)));
    EXPECT(!index || cu_seqlens[images] - (first_image + images) * prefix <= batch_agents);
    static thread_local Buffer mean_memory;
    const Heads<Number> h{keys, values, key_row, key_head, value_row, value_head, heads, width};
    const long columns = heads + EXTRA_FEATURES;
    in_parallel(threads, images, [&](long image) {
        const long first = cu_seqlens[image], rows = cu_seqlens[image + 1] - first, agents = rows - prefix;
        float *out = features + (first - image * prefix) * columns, *mean = mean_memory.take<float>(agents + LANES);
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
    });
}

// Of the n agents of an image, which are kept and which pruned, and which of the pruned each kept one absorbs.
struct Decided {
    int *kept, *pruned, *target;  // [n] agents; index in `kept` for each of `pruned`
    int *begin, *absorbed;        // [n + 1], [n]: agent kept[i] absorbs the rows absorbed[begin[i]] .. absorbed[begin[i + 1] - 1]
    long kept_count = 0, pruned_count = 0;

    Decided(const uint8_t* keep, long n, Buffer& memory) {
        int* at = memory.take<int>(5 * n + 2);
        kept = at, pruned = kept + n, target = pruned + n, absorbed = target + n, begin = absorbed + n;
        for (long a = 0; a < n; a++) (keep[a] ? kept[kept_count++] : pruned[pruned_count++]) = a;
    }
    void sort(long prefix) {  // by target: fills in begin and absorbed
        for (long i = 0; i <= kept_count; i++) begin[i] = 0;
        for (long i = 0; i < pruned_count; i++) begin[target[i] + 1]++;
        for (long i = 0; i < kept_count; i++) begin[i + 1] += begin[i];
        for (long i = 0; i < pruned_count; i++) absorbed[begin[target[i]]++] = prefix + pruned[i];
        for (long i = kept_count; i > 0; i--) begin[i] = begin[i - 1];
        begin[0] = 0;
    }
};

template <class Number>
void absorb(const Number* values, long value_row, long value_head, long heads, long width, const Number* x, long dim,
            const float* size, const int64_t* position, const uint8_t* keep, const int64_t* cu_seqlens,
            const int64_t* kept_cu_seqlens, long images, long prefix, Number* x_out, float* size_out, int64_t* position_out,
            int64_t* absorber, long threads) {
    EXPECT(threads >= 0 && heads >= 0 && in_tiles(width) && in_tiles(dim) && prefix >= 0);
    EXPECT(are_packed(cu_seqlens, images, ANY_ROWS, prefix) && are_packed(kept_cu_seqlens, images, ANY_ROWS, prefix));
    static thread_local Buffer memory;
    const Heads<Number> h{nullptr, values, 0, 0, value_row, value_head, heads, width};
    in_parallel(threads, images, [&](long image) {
        const long first = cu_seqlens[image], agents = cu_seqlens[image + 1] - first - prefix;
        const long first_agent = first - image * prefix;  // agents of earlier images
        Decided d(keep + first_agent, agents, memory);
        EXPECT(kept_cu_seqlens[image + 1] - kept_cu_seqlens[image] == prefix + d.kept_count && (d.kept_count || !agents));
        if (d.pruned_count) find_targets(h, first + prefix, agents, d.pruned, d.pruned_count, d.kept, d.kept_count, d.target);
        d.sort(prefix);
        if (absorber) {
            for (long i = 0; i < d.kept_count; i++) absorber[first_agent + d.kept[i]] = first_agent + d.kept[i];
            for (long i = 0; i < d.pruned_count; i++)
                absorber[first_agent + d.pruned[i]] = first_agent + d.kept[d.target[i]];
        }
        const ImageRows<Number> rows{x + first * dim, size ? size + first : nullptr, dim};
        for (long i = 0; i < prefix + d.kept_count; i++) {
            const long agent = i - prefix, from = i < prefix ? i : prefix + d.kept[agent], to = kept_cu_seqlens[image] + i;
            const int begin = i < prefix ? 0 : d.begin[agent], end = i < prefix ? 0 : d.begin[agent + 1];
            merge(rows, from, d.absorbed + begin, end - begin, x_out + to * dim, size_out + to);
            position_out[to] = position[first + from];
        }
    });
}

// x [rows, width] -> x_out [kept rows, width], position_out: the prefix tokens and kept agents of the images, as in `absorb`.
template <class Number>
void drop(const Number* x, long width, const int64_t* position, const uint8_t* keep, const int64_t* cu_seqlens,
          const int64_t* kept_cu_seqlens, long images, long prefix, Number* x_out, int64_t* position_out, long threads) {
    in_parallel(threads, images, [&](long image) {
        const uint8_t* image_keep = keep + cu_seqlens[image] - (image + 1) * prefix;  // by row of the image
        long to = kept_cu_seqlens[image];
        for (long row = 0; row < cu_seqlens[image + 1] - cu_seqlens[image]; row++) {
            if (row >= prefix && !image_keep[row]) continue;
            std::memcpy(x_out + to * width, x + (cu_seqlens[image] + row) * width, width * sizeof(Number));
            position_out[to++] = position[cu_seqlens[image] + row];
        }
    });
}

}  // namespace tokengame::INSTRUCTIONS
