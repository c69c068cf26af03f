// A network, and what is asked of it, as tokengame/structs.py lays it out in memory; and the kernels that run it.
#pragma once

#include <cstdint>

using bf16 = uint16_t;

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

    long inner() const { return heads * width; }
};

struct Memory {  // [rows, heads, width] each, laid out as `bounds`; without keys there is none
    const bf16 *keys, *values;
    long key_row, key_head, value_row, value_head;
    const int64_t* bounds;
    const float* bias;
};

struct Look {  // what agents observe of the attention that comes next, see `observe`; without agents nothing
    const int64_t* position;
    const float* dither;
    long agents_at_start, prefix;
    float* features;
    int64_t* index;
    long agents, image;
};

// The halves of a stretch for some images, see `stretch`.
void run(const Block* blocks, long first, long last, const bf16* x, long rows, const int64_t* bounds, long images,
         const float* bias, const Memory& memory, const Look& look, bf16* qkv, bf16* heard, bf16* out, bf16* next,
         bf16* query, long threads);

// Into how many groups images are dealt, of which a thread takes one at a time through several halves; 1: all threads
// take all images together.
long groups_of(long rows, long images, long threads);

extern "C" {

void normed_linear(const bf16*, long, long, const float*, const float*, float, const bf16*, const float*, long, bf16*, long);
void residual_linear(const bf16*, long, long, const bf16*, const float*, const float*, long, const bf16*, bf16*, long);
void residual_mlp(const bf16*, long, long, const float*, const float*, float, const bf16*, const float*, long, const bf16*,
                  const float*, const float*, bf16*, long);
void attention(const bf16*, long, long, const bf16*, long, long, const bf16*, long, long, const int64_t*, const int64_t*,
               long, long, long, const float*, float, bf16*, long);
void embed(const bf16*, long, long, long, long, long, const bf16*, const float*, long, const bf16*, long, bf16*, long);
void norm_rows(const bf16*, long, long, const float*, const float*, float, bf16*, long);
void each_head(const bf16*, long, long, long, const bf16*, long, bf16*);
void each_head_linear(const bf16*, long, long, long, const bf16*, const float*, long, bf16*);

void observe(const bf16*, long, long, const bf16*, long, long, long, long, const bf16*, float, const int64_t*, long, long, const float*,
             const int64_t*, const float*, long, long, float*, int64_t*, long, long, long);
void absorb(const bf16*, long, long, long, long, const bf16*, long, const float*, const int64_t*, const uint8_t*, const int64_t*,
            const int64_t*, long, long, bf16*, float*, int64_t*, int64_t*, long);
void close_block(const Block*, const bf16*, const bf16*, long, const int64_t*, long, long, const float*, bf16*, bf16*, long);
}
