// The fused forward: a whole forward pass with pruning in one call, from pixels to logits. A thread runs one group of images
// from beginning to end while their rows are in its cache, without waiting for other threads.
#pragma once

#include "blocks.h"

namespace tokengame::INSTRUCTIONS {

class Arena {  // hands out memory piece by piece; with a null pointer it only counts how much is needed
    char* const memory;

  public:
    long used = 0;  // bytes

    explicit Arena(char* memory) : memory(memory) {}
    template <class T>
    T* take(long number) {
        T* at = memory ? (T*)(memory + used) : nullptr;
        used += (number * long(sizeof(T)) + 63) / 64 * 64;
        return at;
    }
};

template <class Number>
struct PackedRows {  // rows of a group of images
    Number* x;  // [rows, dim]
    float *size, *bias;  // [rows]
    int64_t *position, *cu_seqlens;  // [rows], [images + 1]

    PackedRows(Arena& arena, long rows, long dim, long images)
        : x(arena.take<Number>(rows * dim)), size(arena.take<float>(rows)), bias(arena.take<float>(rows)),
          position(arena.take<int64_t>(rows)), cu_seqlens(arena.take<int64_t>(images + 1)) {}
};

template <class Number>
class Worker {  // runs groups of images, one after the other, in its own working memory
    const FusedGame<Number>& game;
    const long threads, inner, columns;  // columns: features of an agent
    PackedRows<Number> now, spare;  // spare: receives the kept rows of a decision, then the two are swapped
    Number *qkv, *attended, *next_keys_values, *next_query;  // as in run_half_blocks
    float* features;  // [agents, columns]
    uint8_t* keep;  // [agents]

    // features [agents, columns] of an image, policy [columns + 1] -> keep [agents]: whether an agent's logit is above the
    // threshold; if none is, the agent with the highest logit is kept. Returns how many are kept.
    long decide(const float* policy, float threshold, const float* features, long agents, uint8_t* keep) const {
        long kept = 0, best = 0;
        float highest = -INFINITY;
        for (long a = 0; a < agents; a++, features += columns) {
            float logit = policy[columns];
            for (long c = 0; c < columns; c++) logit += policy[c] * features[c];
            if (logit > highest) highest = logit, best = a;
            kept += keep[a] = logit > threshold;
        }
        if (!kept) keep[best] = kept = 1;
        return kept;
    }

    void embed_images(const Number* pixels, long images) {
        embed(pixels, images, game.channels, game.height, game.width, game.patch, &game.patches, game.dim(), game.start,
              game.prefix, now.x, threads);
        for (long image = 0; image <= images; image++) now.cu_seqlens[image] = image * game.rows();
        for (long row = 0; row < images * game.rows(); row++) now.position[row] = most(-1L, row % game.rows() - game.prefix);
    }

    // Runs the half-blocks between the previous decision and the decision of this stage. Writes `features`.
    void run_to_decision(long stage, long images, const CachedKeysValues<Number>& cached) {
        const long first = stage ? 2 * game.stages[stage - 1] : 0, rows = now.cu_seqlens[images];
        const ObservationRequest request{now.position, game.dither, game.agents(), game.prefix, features, nullptr,
                                         rows - game.prefix * images, 0};
        run_group<Number>(game.blocks, first, 2 * game.stages[stage], now.x, rows, now.cu_seqlens, images, stage ? now.bias : nullptr,
                  cached, request, qkv, attended, now.x, next_keys_values, next_query, threads);
    }

    // Decides, and merges the pruned tokens into kept ones. Returns the keys and values of all tokens before the decision:
    // the next attention still uses them, so that the kept tokens attend to the pruned ones once more.
    CachedKeysValues<Number> prune(long stage, long images, const float* thresholds, int64_t* kept) {
        const Block& b = *game.blocks;
        const float* sizes = stage ? now.size : nullptr;
        spare.cu_seqlens[0] = 0;
        for (long image = 0; image < images; image++) {
            const long first = now.cu_seqlens[image] - image * game.prefix;
            const long agents = now.cu_seqlens[image + 1] - now.cu_seqlens[image] - game.prefix;
            kept[image] = decide(game.linear + stage * (columns + 1), thresholds[image], features + first * columns, agents,
                                 keep + first);
            spare.cu_seqlens[image + 1] = spare.cu_seqlens[image] + game.prefix + kept[image];
        }
        absorb<Number>(next_keys_values + inner, 2 * inner, b.width, b.heads, b.width, now.x, b.dim, sizes, now.position, keep,
               now.cu_seqlens, spare.cu_seqlens, images, game.prefix, spare.x, spare.size, spare.position, nullptr, threads);
        for (long row = 0; row < spare.cu_seqlens[images]; row++) spare.bias[row] = std::log(spare.size[row]);
        const PackedRows<Number> before = now;
        now = spare, spare = before;  // now: the kept rows; spare: the rows before the decision
        return {next_keys_values, next_keys_values + inner, 2 * inner, b.width, 2 * inner, b.width, spare.cu_seqlens,
                stage ? spare.bias : nullptr};
    }

    // Runs what follows the last decision -> logits [images, classes]. Overwrites `spare` and `attended`.
    void finish(long images, const CachedKeysValues<Number>& cached, Number* logits) {
        const Block& last = game.blocks[game.depth - 1];
        const long count = game.stage_count, first = count ? 2 * game.stages[count - 1] : 0, rows = now.cu_seqlens[images];
        const float* bias = count ? now.bias : nullptr;
        run_group<Number>(game.blocks, first, game.end(), now.x, rows, now.cu_seqlens, images, bias, cached, {}, qkv, attended,
                          now.x, nullptr, nullptr, threads);
        Number *normed = attended, *prefix_rows = spare.x;
        last_block<Number>(&last, game.last_qkv, now.x, rows, now.cu_seqlens, images, game.prefix, bias, normed, prefix_rows,
                   threads);
        for (long image = 1; image < images; image++)  // the class token is the first prefix token
            std::memmove(prefix_rows + image * game.dim(), prefix_rows + image * game.prefix * game.dim(),
                         game.dim() * sizeof(Number));
        normed_linear<Number>(prefix_rows, images, game.dim(), &game.norm, &game.head, game.classes, logits, threads);
    }

  public:
    // For groups of up to `images` images.
    Worker(const FusedGame<Number>& game, long images, long threads, Arena& arena)
        : game(game), threads(threads), inner(game.blocks->inner()), columns(game.blocks->heads + EXTRA_FEATURES),
          now(arena, images * game.rows(), game.dim(), images), spare(arena, images * game.rows(), game.dim(), images),
          qkv(arena.take<Number>(images * game.rows() * 3 * inner)),
          attended(arena.take<Number>(images * game.rows() * most(inner, game.dim()))),
          next_keys_values(arena.take<Number>(images * game.rows() * 2 * inner)), next_query(arena.take<Number>(images * inner)),
          features(arena.take<float>(images * game.agents() * columns)), keep(arena.take<uint8_t>(images * game.agents())) {}

    // The forward pass of images first .. first + images - 1 of a batch of batch_images. pixels and results: of the batch.
    void forward(const Number* pixels, long first, long images, long batch_images, const FusedResults<Number>& results) {
        embed_images(pixels + first * game.channels * game.height * game.width, images);
        CachedKeysValues<Number> cached{};
        for (long stage = 0; stage < game.stage_count; stage++) {
            run_to_decision(stage, images, cached);
            const long size = game.rows() * game.dim();
            if (!stage && results.tokens_before)
                std::memcpy(results.tokens_before + first * size, now.x, images * size * sizeof(Number));
            cached = prune(stage, images, game.thresholds + stage * batch_images + first,
                           results.kept + stage * batch_images + first);
        }
        finish(images, cached, results.logits + first * game.classes);
        for (long image = 0; image < images; image++)
            for (long row = now.cu_seqlens[image] + game.prefix; row < now.cu_seqlens[image + 1]; row++)
                results.alive[(first + image) * game.agents() + now.position[row]] = 1;
    }
};

struct Schedule {  // how the images of a batch are spread over threads
    long groups, group_size, workers;  // groups of images; most images of a group; groups that run at the same time

    Schedule(long rows, long images, long threads)  // rows: of an image
        : groups(groups_of(images * rows, images, threads)), group_size((images + groups - 1) / groups),
          workers(least(groups, threads)) {}
};

template <class Number>
long worker_bytes(const FusedGame<Number>& game, long images) {  // working memory for groups of so many images
    Arena arena(nullptr);
    Worker<Number>(game, images, 1, arena);
    return arena.used;
}

template <class Number>
long fused_workspace(const FusedGame<Number>* game, long images, long threads) {
    const Schedule schedule(game->rows(), images, threads);
    return schedule.workers * worker_bytes(*game, schedule.group_size);
}

template <class Number>
void fused_forward(const FusedGame<Number>* game, const Number* pixels, long images, const FusedResults<Number>* results,
                   char* memory, long threads) {
    const Schedule schedule(game->rows(), images, threads);
    if (schedule.groups == 1) {  // all threads work on all images
        Arena arena(memory);
        Worker<Number>(*game, images, threads, arena).forward(pixels, 0, images, images, *results);
        return;
    }
    const long bytes = worker_bytes(*game, schedule.group_size);
    in_parallel(schedule.workers, schedule.groups, [&](long group) {
        Arena arena(memory + omp_get_thread_num() * bytes);
        const long first = images * group / schedule.groups, end = images * (group + 1) / schedule.groups;
        Worker<Number>(*game, schedule.group_size, 1, arena).forward(pixels, first, end - first, images, *results);
    });
}

}  // namespace tokengame::INSTRUCTIONS
