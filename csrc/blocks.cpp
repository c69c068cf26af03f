// Several halves of blocks in one call: what lies between two decisions, without the way back to Python.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "network.h"

constexpr long ROWS = 800;  // that a thread takes through blocks: weights come in anew for them, and they stay in its cache

static void linear_of(const Block& b, const bf16* x, long rows, long first, long last, bf16* out, long threads) {
    const long inner = b.inner();
    normed_linear(x, rows, b.dim, b.norm1.weight, b.norm1.bias, b.norm1.eps, b.qkv.packed + first * inner * b.dim,
                  b.qkv.bias + first * inner, (last - first) * inner, out, threads);
}

void run(const Block* blocks, long first, long last, const bf16* x, long rows, const int64_t* bounds, long images,
         const float* bias, const Memory& memory, const Look& look, bf16* qkv, bf16* heard, bf16* out, bf16* next,
         bf16* query, long threads) {
    const long start = bounds[0];  // attention is given whole arrays, what concerns single rows only its own
    for (long half = first; half < last; half++, x = out) {
        const Block& b = blocks[half / 2];
        const long inner = b.inner(), own = start * b.dim;
        if (half % 2) {
            residual_mlp(x + own, rows, b.dim, b.norm2.weight, b.norm2.bias, b.norm2.eps, b.fc1.packed, b.fc1.bias, b.hidden,
                         b.fc2.packed, b.fc2.bias, b.fc2.scale, out + own, threads);
            continue;
        }
        if (half == first && memory.keys) {
            bf16* q = qkv + 2 * start * inner;  // rows of these images begin where they do in [rows, 3, heads, width]
            linear_of(b, x + own, rows, 0, 1, q + start * inner, threads);
            attention(q, inner, b.width, memory.keys, memory.key_row, memory.key_head, memory.values, memory.value_row,
                      memory.value_head, bounds, memory.bounds, images, b.heads, b.width, memory.bias, b.scale, heard, threads);
        } else {
            linear_of(b, x + own, rows, 0, 3, qkv + start * 3 * inner, threads);
            attention(qkv, 3 * inner, b.width, qkv + inner, 3 * inner, b.width, qkv + 2 * inner, 3 * inner, b.width, bounds,
                      bounds, images, b.heads, b.width, bias, b.scale, heard, threads);
        }
        residual_linear(heard + start * inner, rows, inner, b.proj.packed, b.proj.bias, b.proj.scale, b.dim, x + own, out + own, threads);
    }
    if (!next && !query) return;
    const Block& b = blocks[last / 2];
    const long inner = b.inner();
    if (next) linear_of(b, x + start * b.dim, rows, 1, 3, next + start * 2 * inner, threads);
    if (query) {
        std::vector<bf16> firsts(images * b.dim);
        for (long image = 0; image < images; image++)
            std::memcpy(firsts.data() + image * b.dim, x + bounds[image] * b.dim, b.dim * sizeof(bf16));
        linear_of(b, firsts.data(), images, 0, 1, query, threads);
    }
    if (look.agents)
        observe(next, 2 * inner, b.width, next + inner, 2 * inner, b.width, b.heads, b.width, query, b.scale, bounds, images, look.prefix,
                bias, look.position, look.dither, look.agents_at_start, 1, look.features, look.index,
                look.agents, look.image, threads);
}

long groups_of(long rows, long images, long threads) {
    if (images < 2 * threads) return 1;
    const long least = images < 8 * threads ? 1 : 3;  // rounds, so that no thread waits long for the last images
    return std::min(images, threads * std::max(least, std::lround(double(rows) / (ROWS * threads))));
}

extern "C" {

// Halves first..last - 1 of `blocks` (2 i is the attention of block i, 2 i + 1 its MLP) on x [rows, dim], to `out`; the
// first attention looks at `memory` where there is one. qkv [rows, 3, heads, width] holds the last other attention's
// afterwards; heard [rows, heads * width] is for us to write in. Where they are wanted, keys and values
// [rows, 2, heads, width] of an attention that comes next, queries [images, heads, width] of each image's first row, and
// what agents observe of both.
void stretch(const Block* blocks, long first, long last, const bf16* x, long rows, const int64_t* bounds, long images,
             const float* bias, const Memory* memory, const Look* look, bf16* qkv, bf16* heard, bf16* out, bf16* next,
             bf16* query, long threads) {
    const Block& b = blocks[first / 2];
    const long groups = groups_of(rows, images, threads);
    if (groups == 1) {
        run(blocks, first, last, x, rows, bounds, images, bias, *memory, *look, qkv, heard, out, next, query, threads);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long group = 0; group < groups; group++) {
        const long image = images * group / groups, end = images * (group + 1) / groups;
        Memory own = *memory;
        Look its = *look;
        if (own.keys) own.bounds += image;
        if (its.agents) its.features -= image * its.prefix * (b.heads + 6), its.index -= image * its.prefix;  // of agents alone
        its.image = image;
        run(blocks, first, last, x, bounds[end] - bounds[image], bounds + image, end - image, bias, own, its, qkv, heard, out, next,
            query ? query + image * b.inner() : nullptr, 1);
    }
}

// The last block for the first `prefix` rows of each image alone: out [images * prefix, dim]. Keys and values are never
// computed: queries go through the key matrix, what they hear through the value matrix. qkv: the layer's own weight.
void close_block(const Block* block, const bf16* qkv, const bf16* x, long rows, const int64_t* bounds, long images, long prefix,
                 const float* bias, bf16* normed, bf16* out, long threads) {
    const Block& b = *block;
    const long few = images * prefix, inner = b.inner();
    std::vector<bf16> query(few * inner), asked(few * b.heads * b.dim), heard(asked.size()), spoken(few * inner);
    std::vector<int64_t> asking(images + 1);
    for (long image = 0; image <= images; image++) asking[image] = image * prefix * b.heads;
    for (long image = 0; image < images; image++)
        std::memcpy(out + image * prefix * b.dim, x + bounds[image] * b.dim, prefix * b.dim * sizeof(bf16));
    linear_of(b, out, few, 0, 1, query.data(), threads);
    norm_rows(x, rows, b.dim, b.norm1.weight, b.norm1.bias, b.norm1.eps, normed, threads);
    each_head(query.data(), few, b.heads, b.width, qkv + inner * b.dim, b.dim, asked.data());
    attention(asked.data(), b.dim, 0, normed, b.dim, 0, normed, b.dim, 0, asking.data(), bounds, images, 1, b.dim, bias, b.scale,
              heard.data(), threads);
    each_head_linear(heard.data(), few, b.heads, b.dim, b.qkv.packed + 2 * inner * b.dim, b.qkv.bias + 2 * inner, b.width, spoken.data());
    residual_linear(spoken.data(), few, inner, b.proj.packed, b.proj.bias, b.proj.scale, b.dim, out, out, threads);
    residual_mlp(out, few, b.dim, b.norm2.weight, b.norm2.bias, b.norm2.eps, b.fc1.packed, b.fc1.bias, b.hidden, b.fc2.packed,
                 b.fc2.bias, b.fc2.scale, out, threads);
}
}
