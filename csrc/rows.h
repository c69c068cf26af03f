// What a block does to each row on its own: norm, linear layers, activation, residual. Weights are packed once.
#pragma once

#include "parallel.h"

namespace tokengame::INSTRUCTIONS {

// Calls write(k, low, high) for each k = 0, PAIR .. of a row x [width] with norm(x)[k ..] in low and high. at(k) points at
// numbers k .. k + PAIR - 1 of x.
template <class At, class Write>
inline void normed_row(At at, long width, const Norm& norm, Write write) {
    const long numbers = width - norm.spare;
    Vector sums[2]{}, squares[2]{};  // two of each, since a sum waits for the one before it
    for (long k = 0; k < width; k += PAIR)
        for (int half = 0; half < 2; half++) sums[half] += load(at(k) + half * LANES);
    const Vector mean = same(norm.rms ? 0 : total(sums[0] + sums[1]) / numbers);
    const auto square = [&](auto off_at) {
        for (long k = 0; k < width; k += PAIR)
            for (int half = 0; half < 2; half++) {
                const Vector off = off_at(k, half * LANES);
                squares[half] += off * off;
            }
    };
    const auto off_at = [&](long k, long half) { return load(at(k) + half) - mean; };
    if (norm.counted) square([&](long k, long half) { return off_at(k, half) * load(norm.counted + k + half); });
    else square(off_at);
    const Vector scale = same(1 / std::sqrt(total(squares[0] + squares[1]) / numbers + float(norm.eps)));
    const auto normed = [&](long k, long half) {
        return off_at(k, half) * scale * load(norm.weight + k + half) + load(norm.bias + k + half);
    };
    for (long k = 0; k < width; k += PAIR) write(k, normed(k, 0), normed(k, LANES));
}

// Where number `column` of row `row` of a staged operand [rows, inputs] is.
inline long staged_at(long row, long column, long inputs) {
    return row / SIDE * SIDE * inputs + column / SIDE * BLOCK + row % SIDE * SIDE + column % SIDE;
}

// from [rows, width] -> to: norm(from), staged.
template <class Number, class Operand>
inline void stage_normed(const Number* from, long rows, long width, const Norm& norm, Operand* to) {
    for (long r = 0; r < rows; r++)
        normed_row([&](long k) { return from + r * width + k; }, width, norm,
                   [&](long k, Vector low, Vector high) { store(to + staged_at(r, k, width), low, high); });
}

// staged [rows, width] -> norm(staged), in its place.
template <class Operand>
inline void norm_staged(Operand* staged, long rows, long width, const Norm& norm) {
    for (long r = 0; r < rows; r++) {
        const auto at = [&](long k) { return staged + staged_at(r, k, width); };
        normed_row(at, width, norm, [&](long k, Vector low, Vector high) { store(at(k), low, high); });
    }
}

// Rows that a thread takes at a time. width: numbers of a row at its widest; weights: numbers of all weights. The rows stay
// in the cache while all weights pass through it; the more weights, the more rows should share one pass.
template <class Operand>
inline long rows_at_once(long rows, long width, long weights, long threads) {
    const long together = ROWS_TOGETHER<Operand>, bytes = least(most(weights * 2, 256 * 1024L), 1024 * 1024L);
    const long fits = most(SIDE, bytes / (width * long(sizeof(Operand))) / SIDE * SIDE);
    const long rounds = most(1L, std::lround(double(rows) / (fits * threads)));  // equal ones, so that no thread waits long
    return up((rows + rounds * threads - 1) / (rounds * threads), together);
}

// a [rows, K] staged, packed [inputs, outputs], of which the K inputs from `first_input` on are multiplied: adds the product to
// sums [rows, outputs] (blocks of [32, 32]; not read for the first input). With the last input calls epilogue(row, column, c)
// for each row and every 32nd column, with c [32] of the sums. The epilogue of a block runs on the vector units while tiles
// compute the next block. Without sums all inputs are multiplied at once.
template <class Operand, class Epilogue>
inline void add_products(const Operand* a, long rows, long inner, const void* packed, long first_input, long inputs,
                         long outputs, float* sums, Epilogue epilogue) {
    alignas(64) float memory[2][BLOCK];
    const long steps = inner / SIDE;
    const bool last = first_input + inner == inputs;
    const float* previous = nullptr;
    long row = 0, column = 0, count = 0, block = 0;  // of the previous block; count: its rows
    auto finish = [&](long from, long to) {
        for (long r = from; r < to; r++) epilogue(row + r, column, previous + r * SIDE);
    };
    for (long next = 0; next < outputs; next += SIDE)
        for (long first = 0; first < rows; first += SIDE, block++) {
            const long some = least(SIDE, rows - first);
            const Operand* panel = (const Operand*)packed + next * inputs + first_input * PANEL_COLUMNS<Operand>;
            float* now = sums ? sums + block * BLOCK : memory[block % 2];
            product(a + first * inner, panel, inner, inputs, some, SIDE, now, first_input,
                    [&](long s) { finish(count * s / steps, count * (s + 1) / steps); });
            previous = now, row = first, column = next, count = last ? some : 0;
        }
    finish(0, count);
}

// a [rows, inputs] staged, packed [inputs, outputs]: all of them at once.
template <class Operand, class Epilogue>
inline void products(const Operand* a, long rows, long inputs, const void* packed, long outputs, Epilogue epilogue) {
    add_products(a, rows, inputs, packed, 0, inputs, outputs, nullptr, epilogue);
}

// c: LANES columns, from `column` on, of a row of the product -> (c + bias) * scale
inline Vector with_bias(const Linear& linear, const float* c, long column) {
    const Vector y = load(c) + load(linear.bias + column);
    return linear.scale ? y * load(linear.scale + column) : y;
}

// c [32]: columns of a row of the product -> out[column ..] = [residual[column ..] +] (c + bias) * scale
template <class Number>
inline void write(const Linear& linear, const float* c, long column, const Number* residual, Number* out) {
    const auto of = [&](long k) {
        const Vector y = with_bias(linear, c + k, column + k);
        return residual ? y + load(residual + column + k) : y;
    };
    for (long k = 0; k < SIDE; k += PAIR) store(out + column + k, of(k), of(k + LANES));
}

// x [rows, inputs] -> out [rows, outputs]: [residual +] linear([norm](x)); norm and residual may be null.
template <class Number>
void linear_rows(const Number* x, long rows, long inputs, const Norm* norm, const Linear& linear, long outputs,
                 const Number* residual, Number* out, long threads) {
    EXPECT(rows >= 0 && threads >= 1 && inputs > 0 && in_tiles(inputs) && in_tiles(outputs));
    static thread_local Buffer staged;
    const long size = rows_at_once<Operand<Number>>(rows, inputs, inputs * outputs, threads);
    in_parallel(threads, (rows + size - 1) / size, [&](long task) {
        auto* a = staged.take<Operand<Number>>(up(size, SIDE) * inputs);
        const long first = task * size, some = least(size, rows - first);
        const Number* from = x + first * inputs;
        if (norm) stage_normed(from, some, inputs, *norm, a);
        else for (long r = 0; r < some; r += SIDE) stage(from + r * inputs, inputs, least(SIDE, some - r), inputs, a + r * inputs);
        products(a, some, inputs, linear.packed, outputs, [&](long row, long column, const float* c) {
            const long at = (first + row) * outputs;
            write(linear, c, column, residual ? residual + at : nullptr, out + at);
        });
    });
}

template <class Number>
void pack_weight(const Number* weight, long outputs, long inputs, void* packed) {
    EXPECT(outputs >= 0 && inputs >= 0);
    pack_rows(weight, inputs, nullptr, outputs, inputs, (Operand<Number>*)packed);
}

template <class Number>
void normed_linear(const Number* x, long rows, long inputs, const Norm* norm, const Linear* linear, long outputs, Number* out,
                   long threads) {
    linear_rows(x, rows, inputs, norm, *linear, outputs, (const Number*)nullptr, out, threads);
}

template <class Number>
void residual_linear(const Number* x, long rows, long inputs, const Linear* linear, long outputs, const Number* residual,
                     Number* out, long threads) {
    linear_rows(x, rows, inputs, nullptr, *linear, outputs, residual, out, threads);
}

// a [rows, dim] staged -> h [rows, some] staged: numbers `first` .. of activation(fc1(a))
template <class Number>
void expand(const Mlp& mlp, const Operand<Number>* a, long rows, long dim, long first, long some, Operand<Number>* h) {
    products(a, rows, dim, (const Operand<Number>*)mlp.fc1.packed + first * dim, some, [&](long row, long column, const float* c) {
        auto* to = h + staged_at(row, column, some);
        const auto of = [&](long k) {
            return activated<Number>(mlp.activation, with_bias(mlp.fc1, c + k, first + column + k));
        };
        for (long k = 0; k < SIDE; k += PAIR) store(to + k, of(k), of(k + LANES));
    });
}

// The same where fc1 gives gates and values. A gate waits in h for its value, which comes later.
template <class Number>
void expand_gated(const Mlp& mlp, const Operand<Number>* a, long rows, long dim, long first, long some, Operand<Number>* h) {
    const auto* packed = (const Operand<Number>*)mlp.fc1.packed + 2 * first * dim;
    products(a, rows, dim, packed, 2 * some, [&](long row, long column, const float* c) {
        const bool value = column / SIDE % 2;
        auto* to = h + staged_at(row, column / SIDE / 2 * SIDE, some);
        const auto of = [&](long k) {
            const Vector y = with_bias(mlp.fc1, c + k, 2 * first + column + k);
            return value ? load(to + k) * y : activated<Number>(mlp.activation, y);
        };
        for (long k = 0; k < SIDE; k += PAIR) store(to + k, of(k), of(k + LANES));
    });
}

// Numbers of a hidden layer that are computed and multiplied at a time, so that many rows fit into the cache together. Products
// of bfloat16 are too fast for sums that are added to in memory.
template <class Operand> constexpr long HIDDEN_AT_ONCE = 12 * SIDE;
template <> constexpr long HIDDEN_AT_ONCE<bf16> = INT64_MAX;

template <class Number>
void residual_mlp(const Number* x, long rows, long dim, const Mlp* mlp, Number* out, long threads) {
    const long hidden = mlp->hidden;
    EXPECT(rows >= 0 && threads >= 1 && dim > 0 && in_tiles(dim) && hidden > 0 && in_tiles(hidden));
    EXPECT(mlp->activation >= GELU && mlp->activation <= SILU);
    static thread_local Buffer staged, middle, sum_memory;
    const long slice = mlp->fc2_norm.weight ? hidden : least(hidden, HIDDEN_AT_ONCE<Operand<Number>>);
    const bool sliced = slice < hidden;
    const long width = sliced ? slice + 2 * dim : hidden;  // with a slice the rows and their sums are kept
    const long size = rows_at_once<Operand<Number>>(rows, width, (mlp->gated ? 3 : 2) * dim * hidden, threads);
    in_parallel(threads, (rows + size - 1) / size, [&](long task) {
        auto* a = staged.take<Operand<Number>>(up(size, SIDE) * dim);
        auto* h = middle.take<Operand<Number>>(up(size, SIDE) * slice);
        float* sums = sliced ? sum_memory.take<float>(up(size, SIDE) * dim) : nullptr;
        const long first = task * size, some = least(size, rows - first);
        stage_normed(x + first * dim, some, dim, mlp->norm, a);
        if (mlp->fc1_norm.weight) norm_staged(a, some, dim, mlp->fc1_norm);
        for (long part = 0; part < hidden; part += slice) {
            const long inner = least(slice, hidden - part);
            if (mlp->gated) expand_gated<Number>(*mlp, a, some, dim, part, inner, h);
            else expand<Number>(*mlp, a, some, dim, part, inner, h);
            if (mlp->fc2_norm.weight) norm_staged(h, some, hidden, mlp->fc2_norm);
            add_products(h, some, inner, mlp->fc2.packed, part, hidden, dim, sums, [&](long row, long column, const float* c) {
                const long at = (first + row) * dim;
                write(mlp->fc2, c, column, x + at, out + at);
            });
        }
    });
}

struct Grid {  // the patches of an image
    long channels, height, width, patch;

    long columns() const { return width / patch; }
    long patches() const { return height / patch * columns(); }
    long inputs() const { return channels * patch * patch; }

    // image [channels, height, width] -> row `row` of a staged operand [.., inputs rounded up to a multiple of 32]: the pixels
    // of patch `index`, then zeros.
    template <class Number, class Operand>
    void stage(const Number* image, long index, long row, Operand* to) const {
        const Number* corner = image + index / columns() * patch * width + index % columns() * patch;
        const long padded = up(inputs(), SIDE);
        for (long k = 0; k < inputs(); k += patch) {  // a line of the patch
            const Number* line = corner + (k / patch / patch * height + k / patch % patch) * width;
            if (patch % LANES == 0) {
                for (long x = 0; x < patch; x += LANES) some(line + x, to + staged_at(row, k + x, padded));
            } else {
                for (long x = 0; x < patch; x++) one(to + staged_at(row, k + x, padded), line[x]);
            }
        }
        for (long k = inputs(); k < padded; k++) to[staged_at(row, k, padded)] = 0;
    }

    template <class Number, class Operand>
    static void some(const Number* from, Operand* to) { store(to, load(from)); }
    static void some(const bf16* from, bf16* to) { std::memcpy(to, from, LANES * sizeof(bf16)); }
    static void one(float* to, float x) { *to = x; }
    static void one(float* to, bf16 x) { *to = number(x); }
    static void one(bf16* to, bf16 x) { *to = x; }
};

template <class Number>
void embed(const Number* pixels, long images, long channels, long height, long width, long patch, const Linear* linear,
           long outputs, const Number* start, long prefix, Number* out, long threads) {
    EXPECT(images >= 0 && threads >= 1 && prefix >= 0 && in_tiles(outputs));
    EXPECT(channels > 0 && patch > 0 && height >= patch && width >= patch);
    static thread_local Buffer staged;
    const Grid grid{channels, height, width, patch};
    const long inputs = up(grid.inputs(), SIDE), patches = grid.patches(), rows = images * patches;
    const long size = rows_at_once<Operand<Number>>(rows, inputs, 0, threads);
    for (long image = 0; image < images; image++)
        std::memcpy(out + image * (prefix + patches) * outputs, start, prefix * outputs * sizeof(Number));
    in_parallel(threads, (rows + size - 1) / size, [&](long task) {
        auto* a = staged.take<Operand<Number>>(up(size, SIDE) * inputs);
        const long first = task * size, some = least(size, rows - first);
        for (long r = 0; r < some; r++)
            grid.stage(pixels + (first + r) / patches * channels * height * width, (first + r) % patches, r, a);
        products(a, some, inputs, linear->packed, outputs, [&](long row, long column, const float* c) {
            const long image = (first + row) / patches, token = prefix + (first + row) % patches;
            write(*linear, c, column, start + token * outputs, out + (image * (prefix + patches) + token) * outputs);
        });
    });
}

// x [rows, dim] -> out [rows, dim]: norm(x)
template <class Number>
void norm_rows(const Number* x, long rows, long dim, const Norm& norm, Number* out, long threads) {
    const long tasks = least(rows, 4 * threads);
    in_parallel(threads, tasks, [&](long task) {
        for (long r = rows * task / tasks; r < rows * (task + 1) / tasks; r++)
            normed_row([&](long k) { return x + r * dim + k; }, dim, norm,
                       [&](long k, Vector low, Vector high) { store(out + r * dim + k, low, high); });
    });
}

// x [rows, heads, inner] -> out [rows, heads, outer]: the product of each head with its own packed matrix [inner, outer], of
// which matrix(head) gives the weight and bias; a null bias is none.
template <class Number, class Matrix>
void each_head(const Number* x, long rows, long heads, long inner, long outer, Number* out, Matrix matrix) {
    static thread_local Buffer staged;
    Tiles tiles;
    auto* a = staged.take<Operand<Number>>(SIDE * inner);
    for (long head = 0; head < heads; head++) {
        const Linear linear = matrix(head);
        for (long first = 0; first < rows; first += SIDE) {
            const long some = least(SIDE, rows - first);
            stage(x + (first * heads + head) * inner, heads * inner, some, inner, a);
            products(a, some, inner, linear.packed, outer, [&](long row, long column, const float* c) {
                Number* to = out + ((first + row) * heads + head) * outer;
                const auto of = [&](long k) { return linear.bias ? with_bias(linear, c + k, column + k) : load(c + k); };
                for (long k = 0; k < SIDE; k += PAIR) store(to + column + k, of(k), of(k + LANES));
            });
        }
    }
}

}  // namespace tokengame::INSTRUCTIONS
