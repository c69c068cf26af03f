// Several half-blocks in one call: all that is computed between two decisions, without returning to Python.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "network.h"

namespace tokengame {

// Rows of a group, about: enough for the weights, which are read anew for each group, few enough to stay in a core's cache.
constexpr long ROWS_PER_GROUP = 800;

// x [rows, dim] -> out [rows, last - first, heads, width]: parts first .. last - 1 of the queries (0), keys (1) and values (2)
// of norm1(x).
static void normed_qkv(const Block& b, const bf16* x, long rows, long first, long last, bf16* out, long threads) {
    const long inner = b.inner();
    normed_linear(x, rows, b.dim, b.norm1.weight, b.norm1.bias, b.norm1.eps, b.qkv.packed + first * inner * b.dim,
                  b.qkv.bias + first * inner, (last - first) * inner, out, threads);
}

void run_group(const Block* blocks, long first, long last, const bf16* x, long rows, const int64_t* cu_seqlens, long images,
               const float* bias, const CachedKeysValues& cached, const ObservationRequest& request, bf16* qkv, bf16* attended,
               bf16* out, bf16* next_keys_values, bf16* next_query, long threads) {
    const long start = cu_seqlens[0];  // attention adds it itself; functions of single rows get pointers to the group's rows
    for (long half = first; half < last; half++, x = out) {
        const Block& b = blocks[half / 2];
        const long inner = b.inner(), offset = start * b.dim;
        if (half % 2) {
            residual_mlp(x + offset, rows, b.dim, b.norm2.weight, b.norm2.bias, b.norm2.eps, b.fc1.packed, b.fc1.bias, b.hidden,
                         b.fc2.packed, b.fc2.bias, b.fc2.scale, out + offset, threads);
            continue;
        }
        if (half == first && cached.keys) {
            bf16* q = qkv + 2 * start * inner;  // so that the group's queries begin where its rows of qkv begin
            normed_qkv(b, x + offset, rows, 0, 1, q + start * inner, threads);
            attention(q, inner, b.width, cached.keys, cached.key_row, cached.key_head, cached.values, cached.value_row,
                      cached.value_head, cu_seqlens, cached.cu_seqlens, images, b.heads, b.width, cached.bias, b.scale, attended,
                      threads);
        } else {
            normed_qkv(b, x + offset, rows, 0, 3, qkv + start * 3 * inner, threads);
            attention(qkv, 3 * inner, b.width, qkv + inner, 3 * inner, b.width, qkv + 2 * inner, 3 * inner, b.width, cu_seqlens,
                      cu_seqlens, images, b.heads, b.width, bias, b.scale, attended, threads);
        }
        residual_linear(attended + start * inner, rows, inner, b.proj.packed, b.proj.bias, b.proj.scale, b.dim, x + offset,
                        out + offset, threads);
    }
    if (!next_keys_values && !next_query) return;
    const Block& b = blocks[last / 2];
    const long inner = b.inner();
    if (next_keys_values) normed_qkv(b, x + start * b.dim, rows, 1, 3, next_keys_values + start * 2 * inner, threads);
    if (next_query) {
        std::vector<bf16> first_rows(images * b.dim);
        for (long image = 0; image < images; image++)
            std::memcpy(first_rows.data() + image * b.dim, x + cu_seqlens[image] * b.dim, b.dim * sizeof(bf16));
        normed_qkv(b, first_rows.data(), images, 0, 1, next_query, threads);
    }
    if (request.batch_agents)
        observe(next_keys_values, 2 * inner, b.width, next_keys_values + inner, 2 * inner, b.width, b.heads, b.width, next_query,
                b.scale, cu_seqlens, images, request.prefix, bias, request.position, request.dither, request.total_agents, 1,
                request.features, request.index, request.batch_agents, request.first_image, threads);
}

long groups_of(long rows, long images, long threads) {
    if (images < 2 * threads) return 1;
    const long least = images < 8 * threads ? 1 : 3;  // groups of a thread, so that none waits long for the last group
    return std::min(images, threads * std::max(least, std::lround(double(rows) / (ROWS_PER_GROUP * threads))));
}

}  // namespace tokengame

using namespace tokengame;

extern "C" {

void run_half_blocks(const Block* blocks, long first, long last, const bf16* x, long rows, const int64_t* cu_seqlens,
                     long images, const float* bias, const CachedKeysValues* cached, const ObservationRequest* request,
                     bf16* qkv, bf16* attended, bf16* out, bf16* next_keys_values, bf16* next_query, long threads) {
    const Block& b = blocks[first / 2];
    const long groups = groups_of(rows, images, threads);
    if (groups == 1) {
        run_group(blocks, first, last, x, rows, cu_seqlens, images, bias, *cached, *request, qkv, attended, out, next_keys_values,
                  next_query, threads);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long group = 0; group < groups; group++) {
        const long image = images * group / groups, end = images * (group + 1) / groups;
        CachedKeysValues group_cached = *cached;
        ObservationRequest group_request = *request;
        if (group_cached.keys) group_cached.cu_seqlens += image;
        if (group_request.batch_agents) {  // `observe` subtracts the prefix tokens of the group's images only
            group_request.features -= image * group_request.prefix * (b.heads + EXTRA_FEATURES);
            group_request.index -= image * group_request.prefix;
        }
        group_request.first_image = image;
        run_group(blocks, first, last, x, cu_seqlens[end] - cu_seqlens[image], cu_seqlens + image, end - image, bias,
                  group_cached, group_request, qkv, attended, out, next_keys_values,
                  next_query ? next_query + image * b.inner() : nullptr, 1);
    }
}

// Keys and values are not computed: with q.(K n) = (K^T q).n, each query is multiplied by the key matrix of its head instead
// ("folded"), attends to the normed rows themselves, and what it finds is multiplied by the value matrix.
void last_block(const Block* block, const bf16* qkv, const bf16* x, long rows, const int64_t* cu_seqlens, long images,
                long prefix, const float* bias, bf16* normed, bf16* out, long threads) {
    const Block& b = *block;
    const long tokens = images * prefix, inner = b.inner();
    std::vector<bf16> query(tokens * inner), folded(tokens * b.heads * b.dim), found(folded.size()), attended(tokens * inner);
    std::vector<int64_t> query_cu_seqlens(images + 1);  // every head is a query of its own
    for (long image = 0; image <= images; image++) query_cu_seqlens[image] = image * prefix * b.heads;
    for (long image = 0; image < images; image++)
        std::memcpy(out + image * prefix * b.dim, x + cu_seqlens[image] * b.dim, prefix * b.dim * sizeof(bf16));
    normed_qkv(b, out, tokens, 0, 1, query.data(), threads);
    norm_rows(x, rows, b.dim, b.norm1.weight, b.norm1.bias, b.norm1.eps, normed, threads);
    each_head(query.data(), tokens, b.heads, b.width, qkv + inner * b.dim, b.dim, folded.data());
    attention(folded.data(), b.dim, 0, normed, b.dim, 0, normed, b.dim, 0, query_cu_seqlens.data(), cu_seqlens, images, 1, b.dim,
              bias, b.scale, found.data(), threads);
    each_head_linear(found.data(), tokens, b.heads, b.dim, b.qkv.packed + 2 * inner * b.dim, b.qkv.bias + 2 * inner, b.width,
                     attended.data());
    residual_linear(attended.data(), tokens, inner, b.proj.packed, b.proj.bias, b.proj.scale, b.dim, out, out, threads);
    residual_mlp(out, tokens, b.dim, b.norm2.weight, b.norm2.bias, b.norm2.eps, b.fc1.packed, b.fc1.bias, b.hidden, b.fc2.packed,
                 b.fc2.bias, b.fc2.scale, out, threads);
}
}
