// A whole game in one call, from pixels to predictions: a thread plays a few images to their end while their rows are in
// its cache, and meets nobody before.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "network.h"

struct Game {  // a merge game, its policy a line in what agents observe
    const Block* blocks;
    long depth;
    Linear patches, head;
    Norm norm;
    const bf16 *start, *last_qkv;  // [prefix + agents, dim], see `embed`; the last block's own weight, see `close_block`
    long channels, height, width, patch, prefix, classes;
    const int64_t* stages;  // blocks
    long decisions;
    const float *lines, *dither;  // [decisions, heads + 6 + 1], the last a bias; [agents]
    const float* cuts;  // [decisions, images]: whose logit is above it stays

    long agents() const { return height / patch * (width / patch); }
    long rows() const { return prefix + agents(); }
    long dim() const { return blocks->dim; }
    long end() const { return 2 * depth - 2; }  // the last block is closed
};

struct Results {
    bf16 *prediction, *opening;  // [images, classes]; null or [images, rows, dim] before the first decision
    int64_t* kept;  // [decisions, images]
    uint8_t* alive;  // [images, agents] at the end
};

class Space {  // memory that is given out piece by piece; without any, how much of it would be
    char* const memory;

  public:
    long used = 0;

    explicit Space(char* memory) : memory(memory) {}
    template <class T>
    T* take(long number) {
        T* at = memory ? (T*)(memory + used) : nullptr;
        used += (number * long(sizeof(T)) + 63) / 64 * 64;
        return at;
    }
};

struct Packed {  // rows of some images
    bf16* x;
    float *size, *bias;
    int64_t *position, *bounds;

    Packed(Space& space, long rows, long dim, long images)
        : x(space.take<bf16>(rows * dim)), size(space.take<float>(rows)), bias(space.take<float>(rows)),
          position(space.take<int64_t>(rows)), bounds(space.take<int64_t>(images + 1)) {}
};

class Table {  // at which a thread plays
    const Game& game;
    const long threads, inner, columns;
    Packed now, then;  // then: before the latest decision
    bf16 *qkv, *heard, *next, *query;
    float* features;
    uint8_t* keep;

    // Who stays in an image, by what its `agents` observe: at least the one who wants most to.
    long decide(const float* line, float cut, const float* seen, long agents, uint8_t* stays) const {
        long kept = 0, best = 0;
        float most = -INFINITY;
        for (long a = 0; a < agents; a++, seen += columns) {
            float logit = line[columns];
            for (long c = 0; c < columns; c++) logit += line[c] * seen[c];
            if (logit > most) most = logit, best = a;
            kept += stays[a] = logit > cut;
        }
        if (!kept) stays[best] = kept = 1;
        return kept;
    }

    void begin(const bf16* images, long number) {
        embed(images, number, game.channels, game.height, game.width, game.patch, game.patches.packed, game.patches.bias,
              game.dim(), game.start, game.prefix, now.x, threads);
        for (long image = 0; image <= number; image++) now.bounds[image] = image * game.rows();
        for (long row = 0; row < number * game.rows(); row++) now.position[row] = std::max(-1L, row % game.rows() - game.prefix);
    }

    // Runs to the decision of a stage, from the one before; what agents observe is in `features`.
    void turn(long stage, long number, const Memory& memory) {
        const long first = stage ? 2 * game.stages[stage - 1] : 0, rows = now.bounds[number];
        const Look look{now.position, game.dither, game.agents(), game.prefix, features, nullptr, rows - game.prefix * number, 0};
        run(game.blocks, first, 2 * game.stages[stage], now.x, rows, now.bounds, number, stage ? now.bias : nullptr,
            memory, look, qkv, heard, now.x, next, query, threads);
    }

    // Whoever leaves is absorbed; what is left can still hear it once.
    Memory remove(long stage, long number, const float* cuts, int64_t* kept) {
        const Block& b = *game.blocks;
        const float* sizes = stage ? now.size : nullptr;
        then.bounds[0] = 0;
        for (long image = 0; image < number; image++) {
            const long first = now.bounds[image] - image * game.prefix, agents = now.bounds[image + 1] - now.bounds[image] - game.prefix;
            kept[image] = decide(game.lines + stage * (columns + 1), cuts[image], features + first * columns, agents, keep + first);
            then.bounds[image + 1] = then.bounds[image] + game.prefix + kept[image];
        }
        absorb(next + inner, 2 * inner, b.width, b.heads, b.width, now.x, b.dim, sizes, now.position, keep,
               now.bounds, then.bounds, number, game.prefix, then.x, then.size, then.position, nullptr, threads);
        for (long row = 0; row < then.bounds[number]; row++) then.bias[row] = std::log(then.size[row]);
        std::swap(now, then);
        return {next, next + inner, 2 * inner, b.width, 2 * inner, b.width, then.bounds, stage ? then.bias : nullptr};
    }

    void finish(long number, const Memory& memory, bf16* prediction) {
        const Block& last = game.blocks[game.depth - 1];
        const long first = 2 * game.stages[game.decisions - 1], rows = now.bounds[number];
        run(game.blocks, first, game.end(), now.x, rows, now.bounds, number, now.bias, memory, {}, qkv,
            heard, now.x, nullptr, nullptr, threads);
        bf16 *normed = heard, *closed = then.x;
        close_block(&last, game.last_qkv, now.x, rows, now.bounds, number, game.prefix, now.bias, normed, closed, threads);
        for (long image = 1; image < number; image++)  // the class token alone
            std::memmove(closed + image * game.dim(), closed + image * game.prefix * game.dim(), game.dim() * sizeof(bf16));
        normed_linear(closed, number, game.dim(), game.norm.weight, game.norm.bias, game.norm.eps, game.head.packed, game.head.bias,
                      game.classes, prediction, threads);
    }

  public:
    Table(const Game& game, long images, long threads, Space& space)
        : game(game), threads(threads), inner(game.blocks->inner()), columns(game.blocks->heads + 6),
          now(space, images * game.rows(), game.dim(), images), then(space, images * game.rows(), game.dim(), images),
          qkv(space.take<bf16>(images * game.rows() * 3 * inner)),
          heard(space.take<bf16>(images * game.rows() * std::max(inner, game.dim()))),
          next(space.take<bf16>(images * game.rows() * 2 * inner)), query(space.take<bf16>(images * inner)),
          features(space.take<float>(images * game.agents() * columns)), keep(space.take<uint8_t>(images * game.agents())) {}

    // Images first..first + number - 1 of `all`, from their pixels to the end.
    void play(const bf16* images, long first, long number, long all, const Results& to) {
        begin(images + first * game.channels * game.height * game.width, number);
        Memory memory{};
        for (long stage = 0; stage < game.decisions; stage++) {
            turn(stage, number, memory);
            const long size = game.rows() * game.dim();
            if (!stage && to.opening) std::memcpy(to.opening + first * size, now.x, number * size * sizeof(bf16));
            memory = remove(stage, number, game.cuts + stage * all + first, to.kept + stage * all + first);
        }
        finish(number, memory, to.prediction + first * game.classes);
        for (long image = 0; image < number; image++)
            for (long row = now.bounds[image] + game.prefix; row < now.bounds[image + 1]; row++)
                to.alive[(first + image) * game.agents() + now.position[row]] = 1;
    }
};

struct Plan {
    long groups, most, tables;  // of images; how many in one; groups at a time

    Plan(const Game& game, long number, long threads)
        : groups(groups_of(number * game.rows(), number, threads)), most((number + groups - 1) / groups), tables(std::min(groups, threads)) {}

    long size(const Game& game) const {  // bytes of a table
        Space space(nullptr);
        Table(game, most, 1, space);
        return space.used;
    }
};

extern "C" {

// Bytes of memory that `play` works in.
long workspace(const Game* game, long number, long threads) {
    const Plan plan(*game, number, threads);
    return plan.tables * plan.size(*game);
}

void play(const Game* game, const bf16* images, long number, const Results* to, char* memory, long threads) {
    const Plan plan(*game, number, threads);
    const long size = plan.size(*game);
    if (plan.groups == 1) {  // not within a parallel region: those of the kernels would make new threads every time
        Space space(memory);
        Table(*game, number, threads, space).play(images, 0, number, number, *to);
        return;
    }
#pragma omp parallel num_threads(plan.tables)
    {
        Space space(memory + omp_get_thread_num() * size);
        Table table(*game, plan.most, 1, space);
#pragma omp for schedule(dynamic)
        for (long group = 0; group < plan.groups; group++) {
            const long first = number * group / plan.groups, end = number * (group + 1) / plan.groups;
            table.play(images, first, end - first, number, *to);
        }
    }
}
}
