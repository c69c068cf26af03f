// What a block does to each row: norm, linear layers, activation, residual. Weights are packed once.
#include "tiles.h"

namespace tokengame {

bool has_amx = false;

struct Norm {
    const float *weight, *bias;  // [K]
    float eps;
};

// 32 staged rows, normed as LayerNorm does.
static void stage_normed(const bf16* from, long rows, long width, Norm norm, bf16* to) {
    for (long r = 0; r < SIDE; r++) {
        if (r >= rows) {
            for (long k = 0; k < width; k += SIDE) _mm512_storeu_si512(to + k * SIDE + r * SIDE, _mm512_setzero_si512());
            continue;
        }
        const bf16* x = from + r * width;
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (long k = 0; k < width; k += 16) sum = _mm512_add_ps(sum, load(x + k));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
        for (long k = 0; k < width; k += 16) {
            __m512 apart = _mm512_sub_ps(load(x + k), mean);
            squares = _mm512_fmadd_ps(apart, apart, squares);
        }
        const __m512 scale = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + norm.eps));
        auto normed = [&](long k) {
            __m512 y = _mm512_mul_ps(_mm512_sub_ps(load(x + k), mean), scale);
            return _mm512_fmadd_ps(y, _mm512_loadu_ps(norm.weight + k), _mm512_loadu_ps(norm.bias + k));
        };
        for (long k = 0; k < width; k += SIDE) store(to + k * SIDE + r * SIDE, normed(k), normed(k + 16));
    }
}

// Rows that a thread takes at a time: they stay in its cache while it goes through the weights.
static long rows_at_once(long rows, long width, long threads) {
    long fits = std::max(SIDE, (256 * 1024) / (2 * width) / SIDE * SIDE);
    return std::min(fits, up((rows + threads - 1) / threads, SIDE));
}

// Calls with(block, column, c [32, 32]) for every product of staged blocks and packed weights [inputs, outputs].
template <class With>
static void products(const bf16* a, long blocks, long inputs, const bf16* packed, long outputs, With with) {
    alignas(64) float c[BLOCK];
    for (long column = 0; column < outputs; column += SIDE)
        for (long block = 0; block < blocks; block++) {
            product(a + block * SIDE * inputs, packed + column * inputs, inputs / SIDE, c);
            with(block, column, c);
        }
}

static thread_local std::vector<bf16> staged_memory, hidden_memory;

struct Linear {
    const bf16* packed;  // [inputs, outputs]
    const float *bias, *scale;  // [outputs]; scale may be null: LayerScale
    long inputs, outputs;

    __m512 of(const float* c, long column) const {
        __m512 y = _mm512_add_ps(_mm512_loadu_ps(c), _mm512_loadu_ps(bias + column));
        return scale ? _mm512_mul_ps(y, _mm512_loadu_ps(scale + column)) : y;
    }
    // out = [residual +] (c + bias) * scale, for the rows that are there
    void write(const float* c, long column, long rows, const bf16* residual, bf16* out) const {
        for (long r = 0; r < rows; r++) {
            __m512 low = of(c + r * SIDE, column), high = of(c + r * SIDE + 16, column + 16);
            long at = r * outputs + column;
            if (residual) low = _mm512_add_ps(low, load(residual + at)), high = _mm512_add_ps(high, load(residual + at + 16));
            store(out + at, low, high);
        }
    }
};

// out [M, outputs] = [residual +] linear([norm] x [M, inputs])
static void linear_rows(const bf16* x, long rows, const Norm* norm, Linear linear, const bf16* residual, bf16* out, long threads) {
    const long size = rows_at_once(rows, linear.inputs, threads);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        bf16* a = scratch(staged_memory, size * linear.inputs);
#pragma omp for schedule(dynamic)
        for (long first = 0; first < rows; first += size) {
            const long some = std::min(size, rows - first);
            for (long b = 0; b < some; b += SIDE) {
                const bf16* from = x + (first + b) * linear.inputs;
                if (norm) stage_normed(from, some - b, linear.inputs, *norm, a + b * linear.inputs);
                else stage(from, linear.inputs, some - b, linear.inputs, a + b * linear.inputs);
            }
            products(a, up(some, SIDE) / SIDE, linear.inputs, linear.packed, linear.outputs,
                     [&](long block, long column, const float* c) {
                         long at = (first + block * SIDE) * linear.outputs;
                         linear.write(c, column, std::min(SIDE, some - block * SIDE), residual ? residual + at : nullptr, out + at);
                     });
        }
    }
}

struct Grid {  // of an image
    long channels, height, width, patch;

    long columns() const { return width / patch; }
    long patches() const { return height / patch * columns(); }
    long inputs() const { return channels * patch * patch; }

    // One patch as a row of a staged block; `patch` is 8, 16 or 32.
    void stage(const bf16* image, long index, bf16* to) const {
        const bf16* corner = image + index / columns() * patch * width + index % columns() * patch;
        long k = 0;
        for (long c = 0; c < channels; c++)
            for (long y = 0; y < patch; y++)
                for (long x = 0; x < patch; x += 8, k += 8)
                    _mm_storeu_si128((__m128i*)(to + k / SIDE * BLOCK + k % SIDE),
                                     _mm_loadu_si128((const __m128i*)(corner + (c * height + y) * width + x)));
    }
};

}  // namespace tokengame

using namespace tokengame;

extern "C" {

// weight [outputs, inputs] as a packed right operand
void pack_weight(const bf16* weight, long outputs, long inputs, bf16* packed) { pack_rows(weight, inputs, nullptr, outputs, inputs, packed); }

void normed_linear(const bf16* x, long rows, long inputs, const float* weight, const float* shift, float eps,
                   const bf16* packed, const float* bias, long outputs, bf16* out, long threads) {
    Norm norm{weight, shift, eps};
    linear_rows(x, rows, &norm, {packed, bias, nullptr, inputs, outputs}, nullptr, out, threads);
}

void residual_linear(const bf16* x, long rows, long inputs, const bf16* packed, const float* bias, const float* scale,
            long outputs, const bf16* residual, bf16* out, long threads) {
    linear_rows(x, rows, nullptr, {packed, bias, scale, inputs, outputs}, residual, out, threads);
}

// out = x + scale * second(gelu(first(norm(x))))
void residual_mlp(const bf16* x, long rows, long width, const float* weight, const float* shift, float eps, const bf16* packed1,
         const float* bias1, long hidden, const bf16* packed2, const float* bias2, const float* scale, bf16* out, long threads) {
    Norm norm{weight, shift, eps};
    Linear first{packed1, bias1, nullptr, width, hidden}, second{packed2, bias2, scale, hidden, width};
    const long size = rows_at_once(rows, hidden, threads);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        bf16 *a = scratch(staged_memory, size * width), *h = scratch(hidden_memory, size * hidden);
#pragma omp for schedule(dynamic)
        for (long start = 0; start < rows; start += size) {
            const long some = std::min(size, rows - start), blocks = up(some, SIDE) / SIDE;
            for (long b = 0; b < some; b += SIDE) stage_normed(x + (start + b) * width, some - b, width, norm, a + b * width);
            products(a, blocks, width, packed1, hidden, [&](long block, long column, const float* c) {
                bf16* to = h + block * SIDE * hidden + column * SIDE;
                for (long r = 0; r < SIDE; r++)
                    store(to + r * SIDE, gelu(first.of(c + r * SIDE, column)), gelu(first.of(c + r * SIDE + 16, column + 16)));
            });
            products(h, blocks, hidden, packed2, width, [&](long block, long column, const float* c) {
                long at = (start + block * SIDE) * width;
                second.write(c, column, std::min(SIDE, some - block * SIDE), x + at, out + at);
            });
        }
    }
}

// out [images, prefix + patches, outputs] = start [prefix + patches, outputs], to patches their convolution added
void embed(const bf16* images, long number, long channels, long height, long width, long patch, const bf16* packed,
           const float* bias, long outputs, const bf16* start, long prefix, bf16* out, long threads) {
    const Grid grid{channels, height, width, patch};
    const Linear linear{packed, bias, nullptr, grid.inputs(), outputs};
    const long patches = grid.patches(), rows = number * patches, size = rows_at_once(rows, grid.inputs(), threads);
    for (long image = 0; image < number; image++)
        std::memcpy(out + image * (prefix + patches) * outputs, start, prefix * outputs * sizeof(bf16));
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        bf16* a = scratch(staged_memory, size * grid.inputs());
#pragma omp for schedule(dynamic)
        for (long first = 0; first < rows; first += size) {
            const long some = std::min(size, rows - first);
            for (long r = 0; r < some; r++) {
                const long image = (first + r) / patches;
                grid.stage(images + image * channels * height * width, (first + r) % patches,
                           a + r / SIDE * SIDE * grid.inputs() + r % SIDE * SIDE);
            }
            products(a, up(some, SIDE) / SIDE, grid.inputs(), packed, outputs, [&](long block, long column, const float* c) {
                for (long r = 0; r < std::min(SIDE, some - block * SIDE); r++) {
                    const long row = first + block * SIDE + r, image = row / patches, own = prefix + row % patches;
                    linear.write(c + r * SIDE, column, 1, start + own * outputs, out + (image * (prefix + patches) + own) * outputs);
                }
            });
        }
    }
}
}
