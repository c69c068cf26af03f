// Several half-blocks in one call: all that is computed between two decisions, without returning to Python.
#pragma once

#include "decision.h"

namespace tokengame::INSTRUCTIONS {

// Rows of a group, about: enough for the weights, which are read anew for each group, few enough to stay in a core's cache.
// Products of float32 take several times as long as those of bfloat16, so that reading weights more often costs little.
template <class Number> constexpr long ROWS_PER_GROUP = sizeof(Operand<Number>) == 2 ? 800 : 200;

// x [rows, dim] -> out [rows, last - first, heads, width]: parts first .. last - 1 of the queries (0), keys (1) and values (2)
// of norm(x).
template <class Number>
void normed_qkv(const Block& b, const Number* x, long rows, long first, long last, Number* out, long threads) {
    const long inner = b.inner();
    const auto* packed = (const Operand<Number>*)b.qkv.packed + first * inner * b.dim;
    const Linear part{packed, b.qkv.bias + first * inner, nullptr};
    normed_linear(x, rows, b.dim, &b.norm, &part, (last - first) * inner, out, threads);
}

// attended [rows, heads, width] -> out [rows, dim]: x + proj([proj_norm](attended))
template <class Number>
void project_attended(const Block& b, const Number* attended, long rows, const Number* x, Number* out, long threads) {
    const Norm* norm = b.proj_norm.weight ? &b.proj_norm : nullptr;
    linear_rows(attended, rows, b.inner(), norm, b.proj, b.dim, x, out, threads);
}

// Turns the first `turned` of the parts of x [rows, parts, heads, width] of block number `block` by the positions of its rows,
// which are rows `first` .. of the batch.
template <class Number>
void rotate(const Block& b, long block, const Rotary& rotary, long first, long rows, long parts, long turned, Number* x) {
    const Angles& angles = rotary.angles;
    const long half = b.width / 2;
    for (long row = 0; row < rows; row++) {
        const int64_t position = rotary.position[first + row];
        if (position < 0) continue;
        const float* turn = angles.at + block * angles.block + position * angles.position;
        Number* head = x + row * parts * b.inner();
        for (long k = 0; k < turned * b.heads; k++, head += b.width) {
            const float *cosine = turn + k % b.heads * angles.head, *sine = cosine + b.width;
            for (long d = 0; d < half; d += LANES) {
                const Vector left = load(head + d), right = load(head + half + d);
                store(head + d, left * load(cosine + d) - right * load(sine + d));
                store(head + half + d, right * load(cosine + half + d) + left * load(sine + half + d));
            }
        }
    }
}

// x [rows of all images, width] with a stride -> mean [images, width] of the rows of each image.
template <class Number>
void mean_rows(const Number* x, long stride, long width, const int64_t* cu_seqlens, long images, Number* mean) {
    static thread_local Buffer memory;
    float* sum = memory.take<float>(width);
    for (long image = 0; image < images; image++) {
        for (long d = 0; d < width; d++) sum[d] = 0;
        const long count = cu_seqlens[image + 1] - cu_seqlens[image];
        for (long row = cu_seqlens[image]; row < cu_seqlens[image + 1]; row++)
            for (long d = 0; d < width; d += LANES) store(sum + d, load(sum + d) + load(x + row * stride + d));
        for (long d = 0; d < width; d += LANES) store(mean + image * width + d, load(sum + d) / same(float(count)));
    }
}

// x [rows, dim] -> query [images, heads, width] by which an image observes the attention of block number `block`: that of its
// first row (class_query), or the mean of all its rows' queries. These are linear in normed rows unless they are turned.
template <class Number>
void observing_queries(const Block& b, long block, const Number* x, const int64_t* cu_seqlens, long images, bool class_query,
                       const Rotary& rotary, Number* query, long threads) {
    static thread_local Buffer row_memory, mean_memory, query_memory;
    const long start = cu_seqlens[0], rows = cu_seqlens[images] - start, inner = b.inner();
    Number* mean = mean_memory.take<Number>(images * b.dim);
    if (class_query) {
        for (long image = 0; image < images; image++)
            std::memcpy(mean + image * b.dim, x + cu_seqlens[image] * b.dim, b.dim * sizeof(Number));
        return normed_qkv<Number>(b, mean, images, 0, 1, query, threads);
    }
    Number* normed = row_memory.take<Number>(rows * b.dim);
    norm_rows(x + start * b.dim, rows, b.dim, b.norm, normed, threads);
    const Linear part{b.qkv.packed, b.qkv.bias, nullptr};
    const auto project = [&](const Number* from, long count, Number* to) {
        linear_rows(from, count, b.dim, nullptr, part, inner, (const Number*)nullptr, to, threads);
    };
    if (rotary.angles.at) {
        Number* queries = query_memory.take<Number>(rows * inner);
        project(normed, rows, queries);
        rotate(b, block, rotary, start, rows, 1, 1, queries);
        return mean_rows(queries - start * inner, inner, inner, cu_seqlens, images, query);
    }
    mean_rows(normed - start * b.dim, b.dim, b.dim, cu_seqlens, images, mean);
    project(mean, images, query);
}

// A group of consecutive images on its way through half-blocks first .. last - 1; see run_half_blocks. All arrays with a row
// for each token are those of the whole batch, and so are row numbers; the group's rows are start .. start + rows - 1.
template <class Number>
struct Group {
    const Block* blocks;
    long first, last, start, rows, threads;
    bool cached;  // whether half-block `first`, an attention, needs queries alone
    Rotary rotary;
    Number *qkv, *attended, *out, *next_keys_values;

    // Parts `from` .. `to` - 1 of the queries (0), keys (1) and values (2) of x, rows `begin` .. of the batch.
    void project(const Block& b, const Number* x, long begin, long count, long from, long to, Number* parts) const {
        parts += begin * (to - from) * b.inner();
        normed_qkv(b, x, count, from, to, parts, 1);
        if (rotary.angles.at) rotate(b, &b - blocks, rotary, begin, count, to - from, least(to, 2L) - from, parts);
    }

    // Queries [.., heads, width] of such an attention, by row number.
    Number* queries() const { return qkv + 2 * start * blocks->inner(); }

    // Rows begin .. begin + count - 1 of x, from half-block `half` to what the next attention reads. After an attention,
    // `half` is that attention, and what it gave is in `attended`.
    void run_rows(long half, bool after_attention, const Number* x, long begin, long count) const {
        const Block* b = blocks + half / 2;
        const long inner = b->inner();
        Number* to = out + begin * b->dim;
        x += begin * b->dim;
        if (after_attention) {
            project_attended(*b, attended + begin * inner, count, x, to, 1);
            x = to, half++;
        }
        if (half % 2 && half < last) {
            residual_mlp<Number>(x, count, b->dim, &b->mlp, to, 1);
            x = to, half++, b++;
        }
        if (half % 2) return;
        if (half < last && half == first && cached) project(*b, x, begin, count, 0, 1, queries());
        else if (half < last) project(*b, x, begin, count, 0, 3, qkv);
        else if (next_keys_values) project(*b, x, begin, count, 1, 3, next_keys_values);
    }

    // The same for all rows. A thread takes its rows through all of it, so that they stay in its cache, and threads wait for
    // each other only before and after attention.
    void run_all_rows(long half, bool after_attention, const Number* x) const {
        const long parts = threads == 1 ? 1 : threads * most(1L, rows / (256 * threads));
        const long size = up((rows + parts - 1) / parts, ROWS_TOGETHER<Operand<Number>>);
        in_parallel(threads, (rows + size - 1) / size, [&](long task) {
            run_rows(half, after_attention, x, start + task * size, least(size, rows - task * size));
        });
    }
};

// As run_half_blocks, for a group of consecutive images, which all threads take together. cu_seqlens points at the group's
// first image, and so do cached.cu_seqlens and next_query; `rows` counts the group's rows.
template <class Number>
void run_group(const Block* blocks, long first, long last, const Number* x, long rows, const int64_t* cu_seqlens, long images,
               const float* bias, const CachedKeysValues<Number>& cached, const ObservationRequest& request,
               const Rotary& rotary, bool class_query, Number* qkv, Number* attended, Number* out, Number* next_keys_values,
               Number* next_query, long threads) {
    const bool cached_first = first < last && first % 2 == 0 && cached.keys;
    const Group<Number> group{blocks, first, last, cu_seqlens[0], rows, threads, cached_first, rotary,
                              qkv, attended, out, next_keys_values};
    group.run_all_rows(first, false, x);
    if (first % 2 && first < last) x = out;
    for (long half = first + first % 2; half < last; half += 2, x = out) {
        const Block& b = blocks[half / 2];
        const long inner = b.inner();
        if (half == first && cached_first)
            attention<Number>(group.queries(), inner, b.width, cached.keys, cached.key_row, cached.key_head, cached.values,
                              cached.value_row, cached.value_head, cu_seqlens, cached.cu_seqlens, images, b.heads, b.width,
                              cached.bias, b.scale, attended, threads);
        else
            attention<Number>(qkv, 3 * inner, b.width, qkv + inner, 3 * inner, b.width, qkv + 2 * inner, 3 * inner, b.width,
                              cu_seqlens, cu_seqlens, images, b.heads, b.width, bias, b.scale, attended, threads);
        group.run_all_rows(half, true, x);
    }
    if (next_query)
        observing_queries(blocks[last / 2], last / 2, x, cu_seqlens, images, class_query, rotary, next_query, threads);
    if (request.batch_agents) {
        const Block& b = blocks[last / 2];
        const long inner = b.inner();
        observe<Number>(next_keys_values, 2 * inner, b.width, next_keys_values + inner, 2 * inner, b.width, b.heads, b.width,
                        next_query, b.scale, cu_seqlens, images, request.prefix, bias, request.position, request.dither,
                        request.total_agents, 1, request.features, request.index, request.batch_agents, request.first_image,
                        threads);
    }
}

// Number of groups to split the images into. A thread takes one group at a time through several half-blocks. 1 means that
// all threads work on all images together.
template <class Number>
inline long groups_of(long rows, long images, long threads) {
    if (images < 2 * threads) return 1;
    const long fewest = images < 8 * threads ? 1 : 3;  // groups of a thread, so that none waits long for the last group
    return least(images, threads * most(fewest, std::lround(double(rows) / (ROWS_PER_GROUP<Number> * threads))));
}

template <class Number>
void run_half_blocks(const Block* blocks, long first, long last, const Number* x, long rows, const int64_t* cu_seqlens,
                     long images, const float* bias, const CachedKeysValues<Number>* cached, const ObservationRequest* request,
                     const Rotary* rotary, long class_query, Number* qkv, Number* attended, Number* out,
                     Number* next_keys_values, Number* next_query, long threads) {
    EXPECT(threads >= 1 && rows >= 0 && 0 <= first && first <= last && are_packed(cu_seqlens, images, rows, 0));
    for ([[maybe_unused]] long half = first; half < last; half++) EXPECT(in_tiles(blocks[half / 2]));
    EXPECT(!cached->keys || (first % 2 == 0 && are_packed(cached->cu_seqlens, images, ANY_ROWS, 0)));
    EXPECT(!next_query || are_packed(cu_seqlens, images, rows, 1));
    EXPECT(!request->batch_agents || (next_keys_values && next_query && last % 2 == 0 && request->prefix >= 0));
    EXPECT(!request->batch_agents || are_packed(cu_seqlens, images, rows, request->prefix));
    const Block& b = blocks[first / 2];
    const long groups = groups_of<Number>(rows, images, threads);
    if (groups == 1) {
        run_group(blocks, first, last, x, rows, cu_seqlens, images, bias, *cached, *request, *rotary, class_query, qkv, attended,
                  out, next_keys_values, next_query, threads);
        return;
    }
    in_parallel(threads, groups, [&](long group) {
        const long image = images * group / groups, end = images * (group + 1) / groups;
        CachedKeysValues<Number> group_cached = *cached;
        ObservationRequest group_request = *request;
        if (group_cached.keys) group_cached.cu_seqlens += image;
        if (group_request.batch_agents) {  // `observe` subtracts the prefix tokens of the group's images only
            group_request.features -= image * group_request.prefix * (b.heads + EXTRA_FEATURES);
            group_request.index -= image * group_request.prefix;
        }
        group_request.first_image = image;
        run_group(blocks, first, last, x, cu_seqlens[end] - cu_seqlens[image], cu_seqlens + image, end - image, bias,
                  group_cached, group_request, *rotary, class_query, qkv, attended, out, next_keys_values,
                  next_query ? next_query + image * b.inner() : nullptr, 1);
    });
}

// Keys and values are not computed: with q.(K n) = (K^T q).n, each query is multiplied by the key matrix of its head instead
// ("folded"), attends to the normed rows themselves, and what it finds is multiplied by the value matrix.
template <class Number>
void last_block(const Block* block, const Number* qkv, const Number* x, long rows, const int64_t* cu_seqlens, long images,
                long prefix, const float* bias, Number* normed, Number* out, long threads) {
    EXPECT(threads >= 1 && rows >= 0 && prefix >= 0 && are_packed(cu_seqlens, images, rows, prefix) && in_tiles(*block));
    static thread_local Buffer query_memory, folded_memory, found_memory, attended_memory, cu_seqlens_memory, packed_memory;
    const Block& b = *block;
    const long tokens = images * prefix, inner = b.inner();
    Number *query = query_memory.take<Number>(tokens * inner), *attended = attended_memory.take<Number>(tokens * inner);
    Number *folded = folded_memory.take<Number>(tokens * b.heads * b.dim);
    Number* found = found_memory.take<Number>(tokens * b.heads * b.dim);
    auto* packed = packed_memory.take<Operand<Number>>(b.width * b.dim);
    int64_t* query_cu_seqlens = cu_seqlens_memory.take<int64_t>(images + 1);  // every head is a query of its own
    for (long image = 0; image <= images; image++) query_cu_seqlens[image] = image * prefix * b.heads;
    for (long image = 0; image < images; image++)
        std::memcpy(out + image * prefix * b.dim, x + cu_seqlens[image] * b.dim, prefix * b.dim * sizeof(Number));
    normed_qkv<Number>(b, out, tokens, 0, 1, query, threads);
    norm_rows(x, rows, b.dim, b.norm, normed, threads);
    each_head(query, tokens, b.heads, b.width, b.dim, folded, [&](long head) {
        pack_columns(qkv + inner * b.dim + head * b.width * b.dim, b.dim, b.width, b.dim, packed);
        return Linear{packed, nullptr, nullptr};
    });
    attention<Number>(folded, b.dim, 0, normed, b.dim, 0, normed, b.dim, 0, query_cu_seqlens, cu_seqlens, images, 1, b.dim, bias,
                      b.scale, found, threads);
    each_head(found, tokens, b.heads, b.dim, b.width, attended, [&](long head) {
        const long first = 2 * inner + head * b.width;
        return Linear{(const Operand<Number>*)b.qkv.packed + first * b.dim, b.qkv.bias + first, nullptr};
    });
    project_attended(b, attended, tokens, out, out, threads);
    residual_mlp(out, tokens, b.dim, &b.mlp, out, threads);
}

}  // namespace tokengame::INSTRUCTIONS
