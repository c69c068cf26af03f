// The fused forward: a whole forward pass with pruning in one call, from pixels to logits. A thread runs one group of images
// from beginning to end while their rows are in its cache, without waiting for other threads.
#pragma once

#include <algorithm>

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
    float *features, *logits;  // [agents, columns], [agents]
    uint8_t* keep;  // [agents]

    bool observes() const { return !game.actor.layers; }  // whether the policy reads features

    // features [agents, columns] of an image, policy [columns + 1] -> `logits` [agents].
    void judge(const float* policy, const float* features, long agents) const {
        for (long a = 0; a < agents; a++, features += columns) {
            float logit = policy[columns];
            for (long c = 0; c < columns; c++) logit += policy[c] * features[c];
            logits[a] = logit;
        }
    }

    // Makes `logits` [agents] relative to that of the last of the best ones that make up `share` of them: above 0 within.
    void relate(float share, long agents) const {
        static thread_local Buffer memory;
        const float smallest = 1e-6f;  // as SMALLEST in tokengame/policies/networks.py
        int* order = memory.take<int>(agents);
        for (long a = 0; a < agents; a++) order[a] = int(a);
        const long number = most(1L, long(std::nearbyint(float(agents) * share)));
        const auto better = [&](int a, int b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
        std::nth_element(order, order + number - 1, order + agents, better);
        const float last = logits[order[number - 1]];
        for (long i = 0; i < agents; i++) {
            float& logit = logits[order[i]];
            logit = i < number ? most(logit - last, smallest) : least(logit - last, 0.f);
        }
    }

    // Decides on the agents of an image, rows row .. row + agents - 1 -> keep [agents]; if none is kept, the one with the
    // highest logit is. Returns how many are kept.
    long decide(long stage, float threshold, long row, const float* features, long agents, uint8_t* keep) const {
        if (observes()) judge(game.linear + stage * (columns + 1), features, agents);
        else act(game.actor, now.x + row * game.dim(), now.position + row, agents, logits, threads);
        const long best = std::max_element(logits, logits + agents) - logits;
        if (game.shares) relate(game.shares[stage], agents);
        long kept = 0;
        for (long a = 0; a < agents; a++) kept += keep[a] = logits[a] > threshold;
        if (!kept) keep[best] = kept = 1;
        return kept;
    }

    Rotary rotary() const { return {now.position, game.angles}; }

    void embed_images(const Number* input, long images) {
        const long size = game.rows() * game.dim();
        if (game.patches.packed) {
            embed(input, images, game.channels, game.height, game.width, game.patch, &game.patches, game.dim(), game.start,
                  game.prefix, now.x, threads);
        } else {
            std::memcpy(now.x, input, images * size * sizeof(Number));
        }
        for (long image = 0; image <= images; image++) now.cu_seqlens[image] = image * game.rows();
        for (long row = 0; row < images * game.rows(); row++) now.position[row] = most(-1L, row % game.rows() - game.prefix);
    }

    // Runs the half-blocks between the previous decision and the decision of this stage. Writes `features`, if they are read.
    void run_to_decision(long stage, long images, const CachedKeysValues<Number>& cached) {
        const long first = stage ? 2 * game.stages[stage - 1] : 0, last = 2 * game.stages[stage], rows = now.cu_seqlens[images];
        const long agents = rows - game.prefix * images;
        const ObservationRequest request{now.position, game.dither, game.agents, game.prefix, features, nullptr, agents, 0};
        const bool ahead = game.merges && observes();  // of the attention that comes next
        run_group<Number>(game.blocks, first, last, now.x, rows, now.cu_seqlens, images, stage && game.merges ? now.bias : nullptr,
                          cached, ahead ? request : ObservationRequest{}, rotary(), game.class_query, qkv, attended, now.x,
                          game.merges ? next_keys_values : nullptr, ahead ? next_query : nullptr, threads);
        if (game.merges || !observes()) return;
        if (last) observe_past(images, request);
        else std::fill(features, features + agents * columns, 0.f);  // no attention has run
    }

    // What agents see of the attention that has just run, whose queries, keys and values are in `qkv`.
    void observe_past(long images, const ObservationRequest& request) {
        if (game.class_query) {
            for (long image = 0; image < images; image++)
                std::memcpy(next_query + image * inner, qkv + now.cu_seqlens[image] * 3 * inner, inner * sizeof(Number));
        } else {
            mean_rows(qkv, 3 * inner, inner, now.cu_seqlens, images, next_query);
        }
        const Block& b = *game.blocks;
        observe<Number>(qkv + inner, 3 * inner, b.width, qkv + 2 * inner, 3 * inner, b.width, b.heads, b.width, next_query, b.scale,
                        now.cu_seqlens, images, request.prefix, nullptr, request.position, request.dither, request.total_agents,
                        0, request.features, nullptr, 0, 0, threads);
    }

    // Decides, and removes the pruned tokens. When they are merged, returns the keys and values of all tokens before the
    // decision: the next attention still uses them, so that the kept tokens attend to the pruned ones once more.
    CachedKeysValues<Number> prune(long stage, long images, const float* thresholds, int64_t* kept) {
        const Block& b = *game.blocks;
        const float* sizes = stage ? now.size : nullptr;
        spare.cu_seqlens[0] = 0;
        for (long image = 0; image < images; image++) {
            const long row = now.cu_seqlens[image] + game.prefix, first = row - (image + 1) * game.prefix;
            const long agents = now.cu_seqlens[image + 1] - row;
            kept[image] = decide(stage, thresholds[image], row, features + first * columns, agents, keep + first);
            spare.cu_seqlens[image + 1] = spare.cu_seqlens[image] + game.prefix + kept[image];
        }
        if (game.merges) {
            absorb<Number>(next_keys_values + inner, 2 * inner, b.width, b.heads, b.width, now.x, b.dim, sizes, now.position, keep,
                           now.cu_seqlens, spare.cu_seqlens, images, game.prefix, spare.x, spare.size, spare.position, nullptr,
                           threads);
            for (long row = 0; row < spare.cu_seqlens[images]; row++) spare.bias[row] = std::log(spare.size[row]);
        } else {
            drop(now.x, b.dim, now.position, keep, now.cu_seqlens, spare.cu_seqlens, images, game.prefix, spare.x, spare.position,
                 threads);
        }
        const PackedRows<Number> before = now;
        now = spare, spare = before;  // now: the kept rows; spare: the rows before the decision
        if (!game.merges) return {};
        return {next_keys_values, next_keys_values + inner, 2 * inner, b.width, 2 * inner, b.width, spare.cu_seqlens,
                stage ? spare.bias : nullptr};
    }

    // Runs what follows the last decision; returns what is added to the attention logits of the rows that are left.
    const float* run_to_end(long images, const CachedKeysValues<Number>& cached) {
        const long count = game.stage_count, first = count ? 2 * game.stages[count - 1] : 0, rows = now.cu_seqlens[images];
        const float* bias = count && game.merges ? now.bias : nullptr;
        run_group<Number>(game.blocks, first, game.end, now.x, rows, now.cu_seqlens, images, bias, cached, {}, rotary(),
                          game.class_query, qkv, attended, now.x, nullptr, nullptr, threads);
        return bias;
    }

    // The last block and the classifier -> logits [images, classes]. Overwrites `spare` and `attended`.
    void classify(long images, const float* bias, Number* logits) {
        Number *normed = attended, *prefix_rows = spare.x;
        last_block<Number>(&game.blocks[game.depth - 1], game.last_qkv, now.x, now.cu_seqlens[images], now.cu_seqlens, images,
                           game.prefix, bias, normed, prefix_rows, threads);
        for (long image = 1; image < images; image++)  // the class token is the first prefix token
            std::memmove(prefix_rows + image * game.dim(), prefix_rows + image * game.prefix * game.dim(),
                         game.dim() * sizeof(Number));
        normed_linear<Number>(prefix_rows, images, game.dim(), &game.norm, &game.head, game.classes, logits, threads);
    }

    // Copies the rows that are left, and their sizes if they have any, to those of images `first` .. of a batch.
    void hand_over(long first, long images, const FusedResults<Number>& results) {
        for (long image = 0; image < images; image++) {
            const long from = now.cu_seqlens[image], rows = now.cu_seqlens[image + 1] - from, to = (first + image) * game.rows();
            std::memcpy(results.rows + to * game.dim(), now.x + from * game.dim(), rows * game.dim() * sizeof(Number));
            if (game.merges && game.stage_count) std::memcpy(results.sizes + to, now.size + from, rows * sizeof(float));
        }
    }

  public:
    // For groups of up to `images` images.
    Worker(const FusedGame<Number>& game, long images, long threads, Arena& arena)
        : game(game), threads(threads), inner(game.blocks->inner()), columns(game.blocks->heads + EXTRA_FEATURES),
          now(arena, images * game.rows(), game.dim(), images), spare(arena, images * game.rows(), game.dim(), images),
          qkv(arena.take<Number>(images * game.rows() * 3 * inner)),
          attended(arena.take<Number>(images * game.rows() * most(inner, game.dim()))),
          next_keys_values(arena.take<Number>(game.merges ? images * game.rows() * 2 * inner : 0)),
          next_query(arena.take<Number>(images * inner)),
          features(arena.take<float>(images * game.agents * columns)), logits(arena.take<float>(game.agents)),
          keep(arena.take<uint8_t>(images * game.agents)) {}

    // The forward pass of images first .. first + images - 1 of a batch of batch_images. input and results: of the batch.
    void forward(const Number* input, long first, long images, long batch_images, const FusedResults<Number>& results) {
        const long size = game.rows() * game.dim();
        const long input_size = game.patches.packed ? game.channels * game.height * game.width : size;
        embed_images(input + first * input_size, images);
        CachedKeysValues<Number> cached{};
        for (long stage = 0; stage < game.stage_count; stage++) {
            run_to_decision(stage, images, cached);
            if (!stage && results.tokens_before)
                std::memcpy(results.tokens_before + first * size, now.x, images * size * sizeof(Number));
            cached = prune(stage, images, game.thresholds + stage * batch_images + first,
                           results.kept + stage * batch_images + first);
        }
        const float* bias = run_to_end(images, cached);
        if (game.head.packed) classify(images, bias, results.logits + first * game.classes);
        else hand_over(first, images, results);
        for (long image = 0; image < images; image++)
            for (long row = now.cu_seqlens[image] + game.prefix; row < now.cu_seqlens[image + 1]; row++)
                results.alive[(first + image) * game.agents + now.position[row]] = 1;
    }
};

template <class Number>
struct Schedule {  // how the images of a batch are spread over threads
    long groups, group_size, workers;  // groups of images; most images of a group; groups that run at the same time

    Schedule(long rows, long images, long threads)  // rows: of an image
        : groups(groups_of<Number>(images * rows, images, threads)), group_size((images + groups - 1) / groups),
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
    const Schedule<Number> schedule(game->rows(), images, threads);
    return schedule.workers * worker_bytes(*game, schedule.group_size);
}

template <class Number>
void fused_forward(const FusedGame<Number>* game, const Number* input, long images, const FusedResults<Number>* results,
                   char* memory, long threads) {
    EXPECT(images >= 0 && threads >= 1 && game->prefix >= 0 && game->agents >= 1);
    for ([[maybe_unused]] long i = 0; i <= game->actor.count && game->actor.layers; i++) EXPECT(in_tiles(game->actor.widths[i]));
    EXPECT(!game->actor.layers || (game->actor.count >= 1 && game->actor.widths[0] == game->dim()));
    EXPECT(in_tiles(*game->blocks) && in_tiles(game->classes) && 0 <= game->end && game->end <= 2 * game->depth);
    for ([[maybe_unused]] long i = 0; i < game->stage_count; i++)
        EXPECT((i ? game->stages[i - 1] : -1) < game->stages[i] && game->stages[i] < game->depth);
    const Schedule<Number> schedule(game->rows(), images, threads);
    if (schedule.groups == 1) {  // all threads work on all images
        Arena arena(memory);
        Worker<Number>(*game, images, threads, arena).forward(input, 0, images, images, *results);
        return;
    }
    const long bytes = worker_bytes(*game, schedule.group_size);
    in_parallel(schedule.workers, schedule.groups, [&](long group, long worker) {
        Arena arena(memory + worker * bytes);
        const long first = images * group / schedule.groups, end = images * (group + 1) / schedule.groups;
        Worker<Number>(*game, schedule.group_size, 1, arena).forward(input, first, end - first, images, *results);
    });
}

}  // namespace tokengame::INSTRUCTIONS
