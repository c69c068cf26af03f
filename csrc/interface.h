// What Python and the compiled kernels know of each other: structs (laid out as in tokengame/kernels/structs.py), and a table of
// functions for every instruction set and number format.
//
// Images are packed: the rows (tokens) of all images follow each other in one array, without padding. cu_seqlens
// [images + 1] says where: rows cu_seqlens[i] .. cu_seqlens[i + 1] - 1 belong to image i. The first `prefix` rows of an
// image are prefix tokens (class token, registers). The others are patch tokens, called agents: a decision keeps or prunes
// each of them. A kept token that absorbs (merges) pruned tokens has a size, the number of patches that it stands for.
//
// Number is the format of everything that PyTorch sees, float or bf16. Arrays are contiguous unless a function takes strides:
// x_row and x_head are the distances, in numbers, between two rows and between two heads. `bias` [rows] is added to the
// attention logits of each key; it is the log of the size of its row, and null where all sizes are 1. `width` is the width of a
// head in functions that take `heads`. All widths are multiples of 32. "packed" weights come from pack_weight and are read by
// the table that packed them. `threads` is the number of OpenMP threads.
#pragma once

#include <cstdint>

namespace tokengame {

using bf16 = uint16_t;  // the bits of a bfloat16 number

// Features of an agent that follow the attention of each head, in this order:
// 0 centred mean attention: log of the class token's attention averaged over heads, minus its mean over the image's agents
// 1 log size: log of the number of patches that the token stands for
// 2 similarity: highest cosine to another agent of the image
// 3 share alive: agents left in the image / agents at the start
// 4 leader: highest cosine to an agent with a higher centred mean attention
// 5 dither: a fixed number for the token's position in the grid
constexpr long EXTRA_FEATURES = 6;

struct Norm {  // a LayerNorm, or an RMSNorm, which does not take the mean away
    const float *weight, *bias;
    double eps;
    const float* counted;  // 1 for each number of a row, or 0 for zeros that fill it up; null where all count
    long spare, rms;  // how many zeros fill a row up; whether it is an RMSNorm
};

struct Linear {  // a linear layer
    const void* packed;  // weight
    const float *bias, *scale;  // [outputs]; scale is the LayerScale that follows, or null
};

// What an MLP does between its layers: GELU; x sigmoid(1.702 x); GELU by tanh; x sigmoid(x)
enum Activation : long { GELU, QUICK_GELU, TANH_GELU, SILU };

struct Mlp {  // norm, fc1_norm, fc1, activation, fc2_norm, fc2; the norms of layers have no weight where there is none
    Norm norm, fc1_norm, fc2_norm;
    Linear fc1, fc2;
    long hidden, activation;
    long gated;  // whether fc1 gives gates and values, 32 of each in turn: the hidden layer is activation(gate) * value
};

struct Block {  // a transformer block; proj_norm, before proj, has no weight where there is none
    Norm norm, proj_norm;
    Linear qkv, proj;
    Mlp mlp;
    long dim, heads, width;
    double scale;  // of the attention logits

    long inner() const { return heads * width; }
};

template <class Number>
struct CachedKeysValues {  // keys and values of tokens before a decision; keys is null where there are none
    const Number *keys, *values;  // [rows, heads, width]
    long key_row, key_head, value_row, value_head;  // strides
    const int64_t* cu_seqlens;
    const float* bias;
};

struct ObservationRequest {  // what `observe` needs and writes after a run of half-blocks; batch_agents is 0 to skip it
    const int64_t* position;  // [rows]
    const float* dither;  // [total_agents]
    long total_agents, prefix;  // agents of an image at the start; prefix tokens of an image
    float* features;  // [batch_agents, heads + EXTRA_FEATURES]
    int64_t* index;  // [3, batch_agents]; null, if not wanted, in run_group only
    long batch_agents, first_image;  // agents of the whole batch; index of the first image in the batch
};

struct Angles {  // by which queries and keys are turned; `at` is null where they are not
    // [blocks, positions, heads, 2, width]: cosines, then sines, of the numbers of a head; d turns with d +- width / 2
    const float* at;
    long block, position, head;  // strides; 0 of what all blocks or all heads share
};

struct Rotary {
    const int64_t* position;  // [rows], -1 for prefix tokens, which are not turned
    Angles angles;
};

struct Actor {  // RL4EViT's actor, in float32: layers with tanh between them; `layers` is null where the policy is linear
    const Linear* layers;  // [count], packed for float32; the last gives (prune, keep), whose difference is the keep logit
    const int64_t* widths;  // [count + 1] inputs of the first layer, then outputs of each
    const float* identity;  // [agents, widths[1]] what an agent's id adds to the first layer
    long count;
};

template <class Number>
struct FusedGame {  // a model, and a game whose policy is linear in the features, or reads tokens and their ids
    const Block* blocks;  // [depth]
    long depth;
    Linear patches, head;  // patch embedding, without weights if tokens are given; classifier, without if rows are wanted
    Norm norm;  // before the classifier
    const Number* start;  // [prefix + agents, dim], see `embed`
    const Number* last_qkv;  // qkv weight of the last block, see `last_block`
    long channels, height, width, patch, prefix, agents, classes;  // agents: of an image at the start
    long merges, class_query;  // whether pruned tokens are merged; whether an image's first row observes, or the mean of all
    long end;  // half-blocks to run; with a classifier all but the last block's, which `last_block` runs
    const int64_t* stages;  // [stage_count] blocks (from 0) that decide: when merging in their attention, else before it
    long stage_count;
    const float *linear, *dither;  // [stage_count, heads + EXTRA_FEATURES + 1], the last number is a bias; [agents]
    const float* thresholds;  // [stage_count, images]: tokens with a higher logit are kept, or else the one with the highest
    const float* shares;  // [stage_count] or null: logits are taken relative to that of the last token in this share of them
    Actor actor;  // decides in place of `linear`
    Angles angles;

    long rows() const { return prefix + agents; }
    long dim() const { return blocks->dim; }
};

template <class Number>
struct FusedResults {
    Number *logits, *tokens_before;  // [images, classes]; [images, rows, dim] before the first decision, or null
    int64_t* kept;  // [stage_count, images] agents kept by each decision
    uint8_t* alive;  // [images, agents] which agents are left at the end; all zeros before the call
    Number* rows;  // [images, rows, dim] without a classifier: of each image the tokens that are left, then anything
    float* sizes;  // [images, rows] their sizes
};

// The functions of one instruction set for one number format. Each returns 0, or 1 if there was no memory, or
// 2 if it was called with something else than is said here, which only a debug build finds (EXPECT in csrc/vectors.h).
template <class Number>
struct Table {
    long operand_bytes;  // of a number of a packed weight

    // weight [outputs, inputs] -> packed [outputs and inputs rounded up to multiples of 32, with zeros]
    int (*pack_weight)(const Number* weight, long outputs, long inputs, void* packed);

    // x [rows, inputs] -> out [rows, outputs]: linear(norm(x))
    int (*normed_linear)(const Number* x, long rows, long inputs, const Norm* norm, const Linear* linear, long outputs,
                         Number* out, long threads);

    // x [rows, inputs], residual [rows, outputs] -> out [rows, outputs]: residual + scale * linear(x). out may be residual.
    int (*residual_linear)(const Number* x, long rows, long inputs, const Linear* linear, long outputs, const Number* residual,
                           Number* out, long threads);

    // x [rows, dim] -> out [rows, dim]: x + mlp(x), the MLP with its norm before and its scale behind. out may be x.
    int (*residual_mlp)(const Number* x, long rows, long dim, const Mlp* mlp, Number* out, long threads);

    // pixels [images, channels, height, width] -> out [images, prefix + patches, outputs]: start [prefix + patches, outputs],
    // for patch tokens plus linear(pixels of the patch). patch: side of a patch.
    int (*embed)(const Number* pixels, long images, long channels, long height, long width, long patch, const Linear* linear,
                 long outputs, const Number* start, long prefix, Number* out, long threads);

    // q [query rows, heads, width], k and v [key rows, heads, width] -> out [query rows, heads, width]: attention of the
    // queries of each image to the keys of the same image, softmax(scale * q.k + bias) v.
    // query_cu_seqlens, key_cu_seqlens [images + 1]; bias [key rows] or null.
    int (*attention)(const Number* q, long q_row, long q_head, const Number* k, long k_row, long k_head, const Number* v,
                     long v_row, long v_head, const int64_t* query_cu_seqlens, const int64_t* key_cu_seqlens, long images,
                     long heads, long width, const float* bias, double scale, Number* out, long threads);

    // keys [rows, heads, width], query [images, heads, width] -> out [rows, heads]: log of the attention that the query of an
    // image pays to each of its rows.
    int (*class_attention)(const Number* keys, long key_row, long key_head, long heads, long width, const Number* query,
                           double scale, const int64_t* cu_seqlens, long images, const float* bias, float* out, long threads);

    // keys, values [rows, heads, width], query [images, heads, width] of the class tokens -> features [agents, heads +
    // EXTRA_FEATURES]: log(attention * rows of the image) of each head, then the EXTRA_FEATURES.
    // position [rows]: index in the grid, -1 for prefix tokens; dither [total_agents]; total_agents: agents of an image at the
    // start; with_similarity: if 0, features "similarity" and "leader" are 0. index [3, batch_agents] or null receives
    // position, image (counted from first_image) and row of each agent; batch_agents: length of its rows.
    int (*observe)(const Number* keys, long key_row, long key_head, const Number* values, long value_row, long value_head,
                   long heads, long width, const Number* query, double scale, const int64_t* cu_seqlens, long images,
                   long prefix, const float* bias, const int64_t* position, const float* dither, long total_agents,
                   long with_similarity, float* features, int64_t* index, long batch_agents, long first_image, long threads);

    // x [rows, dim], size [rows] (null: all 1), position [rows] -> x_out [kept rows, dim], size_out, position_out [kept rows]:
    // the prefix and kept tokens; each pruned token is merged into the kept token of its image with the most similar values.
    // values [rows, heads, width]; keep [agents], at least one 1 in each image; kept_cu_seqlens [images + 1] of the kept rows.
    // absorber [agents] or null receives the index of the agent that now stands for each agent (itself if it is kept).
    int (*absorb)(const Number* values, long value_row, long value_head, long heads, long width, const Number* x, long dim,
                  const float* size, const int64_t* position, const uint8_t* keep, const int64_t* cu_seqlens,
                  const int64_t* kept_cu_seqlens, long images, long prefix, Number* x_out, float* size_out,
                  int64_t* position_out, int64_t* absorber, long threads);

    // x [rows, dim] -> out [rows, dim]: half-blocks first .. last - 1; 2 i is the attention of block i, 2 i + 1 its MLP.
    // If there are cached keys and values, half-block `first` is an attention and its queries attend to them.
    // With `rotary` queries and keys are turned.
    // Optional results, null if not wanted, of the attention of half-block `last`: next_keys_values [rows, 2, heads, width],
    // next_query [images, heads, width] of the first row of each image (class_query) or the mean of all rows, and from both of
    // them what `request` wants.
    // qkv [rows, 3, heads, width] holds queries, keys and values of the last attention afterwards, unless it was a cached one.
    // attended [rows, heads * width] is working memory. out may be x.
    int (*run_half_blocks)(const Block* blocks, long first, long last, const Number* x, long rows, const int64_t* cu_seqlens,
                           long images, const float* bias, const CachedKeysValues<Number>* cached,
                           const ObservationRequest* request, const Rotary* rotary, long class_query, Number* qkv,
                           Number* attended, Number* out, Number* next_keys_values, Number* next_query, long threads);

    // x [rows, dim] -> out [images * prefix, dim]: the last block, for the prefix tokens only. qkv [3 * heads * width, dim] is
    // the weight of its first layer, not packed; normed [rows, dim] is working memory.
    int (*last_block)(const Block* block, const Number* qkv, const Number* x, long rows, const int64_t* cu_seqlens, long images,
                      long prefix, const float* bias, Number* normed, Number* out, long threads);

    // Bytes of working memory that fused_forward needs.
    long (*fused_workspace)(const FusedGame<Number>* game, long images, long threads);

    // input: pixels [images, channels, height, width], or without patch embedding tokens [images, rows, dim] -> results: the
    // whole forward pass with all pruning decisions. memory: fused_workspace bytes.
    int (*fused_forward)(const FusedGame<Number>* game, const Number* input, long images, const FusedResults<Number>* results,
                         char* memory, long threads);
};

// The tables; each in the source file of its instruction set. Null where the compiler or the processor's kind lacks it.
#define TABLES(instructions)                                                                                                   \
    namespace instructions {                                                                                                   \
    const Table<float>* table_float();                                                                                         \
    const Table<bf16>* table_bf16();                                                                                           \
    }
TABLES(generic)
TABLES(avx2)
TABLES(avx512)
TABLES(avx512_bf16)
TABLES(amx)
#undef TABLES

// Whether this process was forked from one that had used threads of the kernels. If not, notes that this one uses them.
bool is_forked();  // in processor.cpp

}  // namespace tokengame
