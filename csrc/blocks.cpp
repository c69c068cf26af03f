// Several halves of blocks in one call: what lies between two decisions, without the way back to Python.
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

extern "C" {

void normed_linear(const bf16*, long, long, const float*, const float*, float, const bf16*, const float*, long, bf16*, long);
void residual_linear(const bf16*, long, long, const bf16*, const float*, const float*, long, const bf16*, bf16*, long);
void residual_mlp(const bf16*, long, long, const float*, const float*, float, const bf16*, const float*, long, const bf16*,
                  const float*, const float*, bf16*, long);
void attention(const bf16*, long, long, const bf16*, long, long, const bf16*, long, long, const int64_t*, const int64_t*,
               long, long, long, const float*, float, bf16*, long);

struct Norm {
    const float *weight, *bias;
    double eps;
};

struct Linear {
    const bf16* packed;
    const float *bias, *scale;
};

struct Block {
    Norm norm1, norm2;
    Linear qkv, proj, fc1, fc2;
    long dim, heads, width, hidden;
    double scale;
};

struct Memory {  // [rows, heads, width] each, laid out as `bounds`; without keys there is none
    const bf16 *keys, *values;
    long key_row, key_head, value_row, value_head;
    const int64_t* bounds;
    const float* bias;
};

static void linear_of(const Block& b, const bf16* x, long rows, long first, long last, bf16* out, long threads) {
    const long inner = b.heads * b.width;
    normed_linear(x, rows, b.dim, b.norm1.weight, b.norm1.bias, b.norm1.eps, b.qkv.packed + first * inner * b.dim,
                  b.qkv.bias + first * inner, (last - first) * inner, out, threads);
}

// Halves first..last - 1 of `blocks` (2 i is the attention of block i, 2 i + 1 its MLP) on x [rows, dim], to `out`; the
// first attention looks at `memory` where there is one. qkv [rows, 3, heads, width] holds the last other attention's
// afterwards; heard [rows, heads * width] is for us to write in. Where they are wanted, keys and values
// [rows, 2, heads, width] of an attention that comes next, and queries [images, heads, width] of each image's first row.
void stretch(const Block* blocks, long first, long last, const bf16* x, long rows, const int64_t* bounds, long images,
             const float* bias, const Memory* memory, bf16* qkv, bf16* heard, bf16* out, bf16* next, bf16* query, long threads) {
    for (long half = first; half < last; half++, x = out) {
        const Block& b = blocks[half / 2];
        const long inner = b.heads * b.width;
        if (half % 2) {
            residual_mlp(x, rows, b.dim, b.norm2.weight, b.norm2.bias, b.norm2.eps, b.fc1.packed, b.fc1.bias, b.hidden,
                         b.fc2.packed, b.fc2.bias, b.fc2.scale, out, threads);
            continue;
        }
        if (half == first && memory->keys) {
            linear_of(b, x, rows, 0, 1, qkv, threads);
            attention(qkv, inner, b.width, memory->keys, memory->key_row, memory->key_head, memory->values, memory->value_row,
                      memory->value_head, bounds, memory->bounds, images, b.heads, b.width, memory->bias, b.scale, heard, threads);
        } else {
            linear_of(b, x, rows, 0, 3, qkv, threads);
            attention(qkv, 3 * inner, b.width, qkv + inner, 3 * inner, b.width, qkv + 2 * inner, 3 * inner, b.width, bounds,
                      bounds, images, b.heads, b.width, bias, b.scale, heard, threads);
        }
        residual_linear(heard, rows, inner, b.proj.packed, b.proj.bias, b.proj.scale, b.dim, x, out, threads);
    }
    const Block& b = blocks[last / 2];
    if (next) linear_of(b, x, rows, 1, 3, next, threads);
    if (query) {
        for (long image = 0; image < images; image++)
            std::memcpy(heard + image * b.dim, x + bounds[image] * b.dim, b.dim * sizeof(bf16));
        linear_of(b, heard, images, 0, 1, query, threads);
    }
}
}
