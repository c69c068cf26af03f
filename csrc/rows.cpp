// What a block does to each row on its own: norm, linear layers, activation, residual. Weights are packed once.
#include "tiles.h"

namespace tokengame {

bool has_amx = false;

struct LayerNorm {
    const float *weight, *bias;  // [width]
    float eps;
};

// x [width] -> to: norm(x), in pieces of 32 numbers that are `stride` apart.
static void normed_row(const bf16* x, long width, LayerNorm norm, bf16* to, long stride) {
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (long k = 0; k < width; k += 16) sum = _mm512_add_ps(sum, load(x + k));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
    for (long k = 0; k < width; k += 16) {
        __m512 off = _mm512_sub_ps(load(x + k), mean);
        squares = _mm512_fmadd_ps(off, off, squares);
    }
    const __m512 scale = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + norm.eps));
    auto normed = [&](long k) {
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(load(x + k), mean), scale);
        return _mm512_fmadd_ps(y, _mm512_loadu_ps(norm.weight + k), _mm512_loadu_ps(norm.bias + k));
    };
    for (long k = 0; k < width; k += SIDE) store(to + k / SIDE * stride, normed(k), normed(k + 16));
}

// from [rows, width] -> to: norm(from), staged.
static void stage_normed(const bf16* from, long rows, long width, LayerNorm norm, bf16* to) {
    for (long r = 0; r < rows; r++)
        normed_row(from + r * width, width, norm, to + r / SIDE * SIDE * width + r % SIDE * SIDE, BLOCK);
}

// Rows that a thread takes at a time. width: numbers of a row at its widest; weights: numbers of all weights. The rows stay
// in the cache while all weights pass through it; the more weights, the more rows should share one pass.
static long rows_at_once(long rows, long width, long weights, long threads) {
    const long cache = std::clamp(weights, 128 * 1024L, 512 * 1024L);  // numbers of 2 bytes
    const long fits = std::max(SIDE, cache / width / SIDE * SIDE);
    const long rounds = std::max(1L, std::lround(double(rows) / (fits * threads)));  // equal ones, so that no thread waits long
    return up((rows + rounds * threads - 1) / (rounds * threads), SIDE);
}

// a [rows, inputs] staged, packed [inputs, outputs]: calls epilogue(row, column, c) for each row and every 32nd column, with
// c [32] of their product. The epilogue of a block runs on the vector units while the tiles compute the next block.
template <class Epilogue>
static void products(const bf16* a, long rows, long inputs, const bf16* packed, long outputs, Epilogue epilogue) {
    alignas(64) float memory[2][BLOCK];
    const long steps = inputs / SIDE;
    long row = 0, column = 0, count = 0;  // of the previous block; count: its rows
    float *now = memory[0], *previous = memory[1];
    auto finish = [&](long from, long to) {
        for (long r = from; r < to; r++) epilogue(row + r, column, previous + r * SIDE);
    };
    for (long next = 0; next < outputs; next += SIDE)
        for (long first = 0; first < rows; first += SIDE) {
            const long some = std::min(SIDE, rows - first);
            product(a + first * inputs, packed + next * inputs, steps, some, now,
                    [&](long s) { finish(count * s / steps, count * (s + 1) / steps); });
            std::swap(now, previous);
            row = first, column = next, count = some;
        }
    finish(0, count);
}

static thread_local std::vector<bf16> staged_memory, hidden_memory;

struct Layer {  // a linear layer
    const bf16* packed;  // [inputs, outputs]
    const float *bias, *scale;  // [outputs]; scale is the LayerScale that follows, or null
    long inputs, outputs;

    // c [16]: columns column .. column + 15 of a row of the product -> (c + bias) * scale
    __m512 of(const float* c, long column) const {
        __m512 y = _mm512_add_ps(_mm512_loadu_ps(c), _mm512_loadu_ps(bias + column));
        return scale ? _mm512_mul_ps(y, _mm512_loadu_ps(scale + column)) : y;
    }
    // c [32]: columns of a row of the product -> out[column ..] = [residual[column ..] +] (c + bias) * scale
    void write(const float* c, long column, const bf16* residual, bf16* out) const {
        __m512 low = of(c, column), high = of(c + 16, column + 16);
        if (residual) {
            low = _mm512_add_ps(low, load(residual + column));
            high = _mm512_add_ps(high, load(residual + column + 16));
        }
        store(out + column, low, high);
    }
};

// x [rows, inputs] -> out [rows, outputs]: [residual +] linear([norm](x)); norm and residual may be null.
static void linear_rows(const bf16* x, long rows, const LayerNorm* norm, Layer linear, const bf16* residual, bf16* out,
                        long threads) {
    const long size = rows_at_once(rows, linear.inputs, linear.inputs * linear.outputs, threads);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        bf16* a = scratch(staged_memory, size * linear.inputs);
#pragma omp for schedule(dynamic)
        for (long first = 0; first < rows; first += size) {
            const long some = std::min(size, rows - first);
            const bf16* from = x + first * linear.inputs;
            if (norm) stage_normed(from, some, linear.inputs, *norm, a);
            else for (long r = 0; r < some; r += SIDE)
                stage(from + r * linear.inputs, linear.inputs, std::min(SIDE, some - r), linear.inputs, a + r * linear.inputs);
            products(a, some, linear.inputs, linear.packed, linear.outputs, [&](long row, long column, const float* c) {
                const long at = (first + row) * linear.outputs;
                linear.write(c, column, residual ? residual + at : nullptr, out + at);
            });
        }
    }
}

struct Grid {  // the patches of an image
    long channels, height, width, patch;

    long columns() const { return width / patch; }
    long patches() const { return height / patch * columns(); }
    long inputs() const { return channels * patch * patch; }

    // image [channels, height, width] -> to: pixels of the patches index .. index + some - 1, which lie in one row of the grid,
    // as staged rows first .. first + some - 1.
    void stage(const bf16* image, long index, long some, long first, bf16* to) const {
        const bf16* corner = image + index / columns() * patch * width + index % columns() * patch;
        for (long k = 0; k < inputs(); k += patch) {
            const bf16* line = corner + (k / patch / patch * height + k / patch % patch) * width;
            for (long p = 0; p < some; p++) {
                bf16* at = to + (first + p) / SIDE * SIDE * inputs() + k / SIDE * BLOCK + (first + p) % SIDE * SIDE + k % SIDE;
                for (long x = 0; x < patch; x += 8)
                    _mm_storeu_si128((__m128i*)(at + x), _mm_loadu_si128((const __m128i*)(line + p * patch + x)));
            }
        }
    }
};

}  // namespace tokengame

using namespace tokengame;

extern "C" {

void pack_weight(const bf16* weight, long outputs, long inputs, bf16* packed) {
    pack_rows(weight, inputs, nullptr, outputs, inputs, packed);
}

void normed_linear(const bf16* x, long rows, long inputs, const float* norm_weight, const float* norm_bias, float eps,
                   const bf16* packed, const float* bias, long outputs, bf16* out, long threads) {
    LayerNorm norm{norm_weight, norm_bias, eps};
    linear_rows(x, rows, &norm, {packed, bias, nullptr, inputs, outputs}, nullptr, out, threads);
}

void residual_linear(const bf16* x, long rows, long inputs, const bf16* packed, const float* bias, const float* scale,
                     long outputs, const bf16* residual, bf16* out, long threads) {
    linear_rows(x, rows, nullptr, {packed, bias, scale, inputs, outputs}, residual, out, threads);
}

void residual_mlp(const bf16* x, long rows, long dim, const float* norm_weight, const float* norm_bias, float eps,
                  const bf16* packed1, const float* bias1, long hidden, const bf16* packed2, const float* bias2,
                  const float* scale, bf16* out, long threads) {
    LayerNorm norm{norm_weight, norm_bias, eps};
    Layer linear1{packed1, bias1, nullptr, dim, hidden}, linear2{packed2, bias2, scale, hidden, dim};
    const long size = rows_at_once(rows, hidden, 2 * dim * hidden, threads);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        bf16 *a = scratch(staged_memory, size * dim), *h = scratch(hidden_memory, size * hidden);
#pragma omp for schedule(dynamic)
        for (long first = 0; first < rows; first += size) {
            const long some = std::min(size, rows - first);
            stage_normed(x + first * dim, some, dim, norm, a);
            products(a, some, dim, packed1, hidden, [&](long row, long column, const float* c) {
                bf16* to = h + row / SIDE * SIDE * hidden + column * SIDE + row % SIDE * SIDE;
                store(to, gelu(linear1.of(c, column)), gelu(linear1.of(c + 16, column + 16)));
            });
            products(h, some, hidden, packed2, dim, [&](long row, long column, const float* c) {
                const long at = (first + row) * dim;
                linear2.write(c, column, x + at, out + at);
            });
        }
    }
}

void embed(const bf16* pixels, long images, long channels, long height, long width, long patch, const bf16* packed,
           const float* bias, long outputs, const bf16* start, long prefix, bf16* out, long threads) {
    const Grid grid{channels, height, width, patch};
    const Layer linear{packed, bias, nullptr, grid.inputs(), outputs};
    const long patches = grid.patches(), rows = images * patches, size = rows_at_once(rows, grid.inputs(), 0, threads);
    for (long image = 0; image < images; image++)
        std::memcpy(out + image * (prefix + patches) * outputs, start, prefix * outputs * sizeof(bf16));
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        bf16* a = scratch(staged_memory, size * grid.inputs());
#pragma omp for schedule(dynamic)
        for (long first = 0; first < rows; first += size) {
            const long some = std::min(size, rows - first);
            for (long r = 0, count; r < some; r += count) {
                const long image = (first + r) / patches, index = (first + r) % patches;
                count = std::min(some - r, grid.columns() - index % grid.columns());
                grid.stage(pixels + image * channels * height * width, index, count, r, a);
            }
            products(a, some, grid.inputs(), packed, outputs, [&](long row, long column, const float* c) {
                const long image = (first + row) / patches, token = prefix + (first + row) % patches;
                linear.write(c, column, start + token * outputs, out + (image * (prefix + patches) + token) * outputs);
            });
        }
    }
}

void norm_rows(const bf16* x, long rows, long dim, const float* norm_weight, const float* norm_bias, float eps, bf16* out,
               long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++) normed_row(x + r * dim, dim, {norm_weight, norm_bias, eps}, out + r * dim, SIDE);
}

void each_head(const bf16* x, long rows, long heads, long inner, const bf16* weights, long outer, bf16* out) {
    Tiles tiles;
    bf16 *packed = scratch(hidden_memory, inner * outer), *a = scratch(staged_memory, SIDE * inner);
    alignas(64) float c[BLOCK];
    for (long head = 0; head < heads; head++) {
        pack_columns(weights + head * inner * outer, outer, inner, outer, packed);
        for (long first = 0; first < rows; first += SIDE) {
            const long some = std::min(SIDE, rows - first);
            stage(x + (first * heads + head) * inner, heads * inner, some, inner, a);
            for (long column = 0; column < outer; column += SIDE) {
                product(a, packed + column * inner, inner / SIDE, some, c);
                for (long r = 0; r < some; r++)
                    store(out + ((first + r) * heads + head) * outer + column, _mm512_load_ps(c + r * SIDE),
                          _mm512_load_ps(c + r * SIDE + 16));
            }
        }
    }
}

void each_head_linear(const bf16* x, long rows, long heads, long inner, const bf16* packed, const float* bias, long outer,
                      bf16* out) {
    Tiles tiles;
    bf16* a = scratch(staged_memory, SIDE * inner);
    for (long head = 0; head < heads; head++) {
        const Layer linear{packed + head * outer * inner, bias + head * outer, nullptr, inner, outer};
        for (long first = 0; first < rows; first += SIDE) {
            const long some = std::min(SIDE, rows - first);
            stage(x + (first * heads + head) * inner, heads * inner, some, inner, a);
            products(a, some, inner, linear.packed, outer, [&](long row, long column, const float* c) {
                linear.write(c, column, nullptr, out + ((first + row) * heads + head) * outer);
            });
        }
    }
}
}
