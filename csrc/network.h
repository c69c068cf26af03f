// The structs that Python passes to the compiled kernels (laid out as in tokengame/kernels/structs.py), and the functions.
//
// Images are packed: the rows (tokens) of all images follow each other in one array, without padding. cu_seqlens
// [images + 1] says where: rows cu_seqlens[i] .. cu_seqlens[i + 1] - 1 belong to image i. The first `prefix` rows of an
// image are prefix tokens (class token, registers). The others are patch tokens, called agents: a decision keeps or prunes
// each of them. A kept token that absorbs (merges) pruned tokens has a size, the number of patches that it stands for.
//
// Arrays are contiguous unless a function takes strides: x_row and x_head are the distances, in numbers, between two rows
// and between two heads. `bias` [rows] is added to the attention logits of each key; it is the log of the size of its row,
// and null where all sizes are 1. `width` is the width of a head in functions that take `heads`. All widths are multiples
// of 32. "packed" weights come from pack_weight. `threads` is the number of OpenMP threads.
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

extern bool has_amx;  // whether products use AMX tiles, otherwise AVX-512 with bfloat16; set by set_level

struct Norm {  // a LayerNorm
    const float *weight, *bias;
    double eps;
};

struct Linear {  // a linear layer
    const bf16* packed;  // weight
    const float *bias, *scale;  // [outputs]; scale is the LayerScale that follows, or null
};

struct Block {  // a transformer block
    Norm norm1, norm2;
    Linear qkv, proj, fc1, fc2;
    long dim, heads, width, hidden;
    double scale;  // of the attention logits

    long inner() const { return heads * width; }
};

struct CachedKeysValues {  // keys and values of tokens before a decision; keys is null where there are none
    const bf16 *keys, *values;  // [rows, heads, width]
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

struct FusedGame {  // a model, and a game with merging whose policy is linear in the features
    const Block* blocks;  // [depth]
    long depth;
    Linear patches, head;  // patch embedding; classifier
    Norm norm;  // before the classifier
    const bf16 *start, *last_qkv;  // [prefix + agents, dim], see `embed`; qkv weight of the last block, see `last_block`
    long channels, height, width, patch, prefix, classes;
    const int64_t* stages;  // [stage_count] blocks (from 0) that decide in their attention, between keys, values and queries
    long stage_count;
    const float *linear, *dither;  // [stage_count, heads + EXTRA_FEATURES + 1], the last number is a bias; [agents]
    const float* thresholds;  // [stage_count, images]: tokens with a higher logit are kept, or else the one with the highest

    long agents() const { return height / patch * (width / patch); }
    long rows() const { return prefix + agents(); }
    long dim() const { return blocks->dim; }
    long end() const { return 2 * depth - 2; }  // half-blocks before the last block, which `last_block` runs
};

struct FusedResults {
    bf16 *logits, *tokens_before;  // [images, classes]; [images, rows, dim] before the first decision, or null
    int64_t* kept;  // [stage_count, images] agents kept by each decision
    uint8_t* alive;  // [images, agents] which agents are left at the end; all zeros before the call
};

// As run_half_blocks, for a group of consecutive images, which all threads take together. cu_seqlens points at the group's
// first image, and so do cached.cu_seqlens and next_query; `rows` counts the group's rows. All arrays with a row for each
// token are those of the whole batch, and so are the row numbers in cu_seqlens.
void run_group(const Block* blocks, long first, long last, const bf16* x, long rows, const int64_t* cu_seqlens, long images,
               const float* bias, const CachedKeysValues& cached, const ObservationRequest& request, bf16* qkv, bf16* attended,
               bf16* out, bf16* next_keys_values, bf16* next_query, long threads);

// Number of groups to split the images into. A thread takes one group at a time through several half-blocks. 1 means that
// all threads work on all images together.
long groups_of(long rows, long images, long threads);

}  // namespace tokengame

using tokengame::bf16, tokengame::Block, tokengame::CachedKeysValues, tokengame::ObservationRequest;
using tokengame::FusedGame, tokengame::FusedResults;

extern "C" {

// processor.cpp

// Selects the instructions to use, at most `wanted`, and returns the selected level. 0: the kernels do not run on this
// processor; 1: AVX-512 with bfloat16; 2: AMX. Gets permission from the operating system to use AMX tiles.
int set_level(int wanted);

// The checksum of the source files that this library was compiled from.
unsigned source_checksum();

// tensors [number] of [rows, columns] -> a number that changes when tensors are written to: a hash of values spread over each
// tensor, at least one of every row and column.
unsigned long long weight_version(const bf16* const* tensors, const long* rows, const long* columns, long number);

// rows.cpp

// weight [outputs, inputs] -> packed [outputs rounded up to a multiple of 32, with zeros, * inputs]
void pack_weight(const bf16* weight, long outputs, long inputs, bf16* packed);

// x [rows, inputs] -> out [rows, outputs]: linear(norm(x))
void normed_linear(const bf16* x, long rows, long inputs, const float* norm_weight, const float* norm_bias, float eps,
                   const bf16* packed, const float* bias, long outputs, bf16* out, long threads);

// x [rows, inputs], residual [rows, outputs] -> out [rows, outputs]: residual + scale * linear(x). scale [outputs] or null;
// out may be residual.
void residual_linear(const bf16* x, long rows, long inputs, const bf16* packed, const float* bias, const float* scale,
                     long outputs, const bf16* residual, bf16* out, long threads);

// x [rows, dim] -> out [rows, dim]: x + scale * linear2(gelu(linear1(norm(x)))). scale [dim] or null; out may be x.
void residual_mlp(const bf16* x, long rows, long dim, const float* norm_weight, const float* norm_bias, float eps,
                  const bf16* packed1, const float* bias1, long hidden, const bf16* packed2, const float* bias2,
                  const float* scale, bf16* out, long threads);

// pixels [images, channels, height, width] -> out [images, prefix + patches, outputs]: start [prefix + patches, outputs],
// for patch tokens plus linear(pixels of the patch). patch: side of a patch, 8, 16 or 32.
void embed(const bf16* pixels, long images, long channels, long height, long width, long patch, const bf16* packed,
           const float* bias, long outputs, const bf16* start, long prefix, bf16* out, long threads);

// x [rows, dim] -> out [rows, dim]: norm(x)
void norm_rows(const bf16* x, long rows, long dim, const float* norm_weight, const float* norm_bias, float eps, bf16* out,
               long threads);

// x [rows, heads, inner], weights [heads, inner, outer] -> out [rows, heads, outer]: the product of each head with its own
// matrix. Runs on the calling thread.
void each_head(const bf16* x, long rows, long heads, long inner, const bf16* weights, long outer, bf16* out);

// x [rows, heads, inner] -> out [rows, heads, outer]: head h through outputs h * outer .. (h + 1) * outer - 1 of a packed
// linear layer [inner -> heads * outer] with its bias. Runs on the calling thread.
void each_head_linear(const bf16* x, long rows, long heads, long inner, const bf16* packed, const float* bias, long outer,
                      bf16* out);

// attention.cpp

// q [query rows, heads, width], k and v [key rows, heads, width] -> out [query rows, heads, width]: attention of the queries
// of each image to the keys of the same image, softmax(scale * q.k + bias) v.
// query_cu_seqlens, key_cu_seqlens [images + 1]; bias [key rows] or null.
void attention(const bf16* q, long q_row, long q_head, const bf16* k, long k_row, long k_head, const bf16* v, long v_row,
               long v_head, const int64_t* query_cu_seqlens, const int64_t* key_cu_seqlens, long images, long heads, long width,
               const float* bias, float scale, bf16* out, long threads);

// decision.cpp

// keys [rows, heads, width], query [images, heads, width] -> out [rows, heads]: log of the attention that the query of an
// image pays to each of its rows.
void class_attention(const bf16* keys, long key_row, long key_head, long heads, long width, const bf16* query, float scale,
                     const int64_t* cu_seqlens, long images, const float* bias, float* out, long threads);

// keys, values [rows, heads, width], query [images, heads, width] of the class tokens -> features [agents, heads +
// EXTRA_FEATURES]: log(attention * rows of the image) of each head, then the EXTRA_FEATURES.
// position [rows]: index in the grid, -1 for prefix tokens; dither [total_agents]; total_agents: agents of an image at the
// start; with_similarity: if 0, features "similarity" and "leader" are 0. index [3, batch_agents] or null receives
// position, image (counted from first_image) and row of each agent; batch_agents: length of its rows.
void observe(const bf16* keys, long key_row, long key_head, const bf16* values, long value_row, long value_head, long heads,
             long width, const bf16* query, float scale, const int64_t* cu_seqlens, long images, long prefix, const float* bias,
             const int64_t* position, const float* dither, long total_agents, long with_similarity, float* features,
             int64_t* index, long batch_agents, long first_image, long threads);

// x [rows, dim], size [rows] (null: all 1), position [rows] -> x_out [kept rows, dim], size_out, position_out [kept rows]:
// the prefix and kept tokens; each pruned token is merged into the kept token of its image with the most similar values.
// values [rows, heads, width]; keep [agents], at least one 1 in each image; kept_cu_seqlens [images + 1] of the kept rows.
// absorber [agents] or null receives the index of the agent that now stands for each agent (itself if it is kept).
void absorb(const bf16* values, long value_row, long value_head, long heads, long width, const bf16* x, long dim,
            const float* size, const int64_t* position, const uint8_t* keep, const int64_t* cu_seqlens,
            const int64_t* kept_cu_seqlens, long images, long prefix, bf16* x_out, float* size_out, int64_t* position_out,
            int64_t* absorber, long threads);

// blocks.cpp

// x [rows, dim] -> out [rows, dim]: half-blocks first .. last - 1; 2 i is the attention of block i, 2 i + 1 its MLP.
// If there are cached keys and values, half-block `first` is an attention and its queries attend to them.
// Optional results, null if not wanted, of the attention of half-block `last`: next_keys_values [rows, 2, heads, width],
// next_query [images, heads, width] of the first row of each image, and from both of them what `request` wants.
// qkv [rows, 3, heads, width] holds queries, keys and values of the last attention afterwards, unless it was a cached one.
// attended [rows, heads * width] is working memory. out may be x.
void run_half_blocks(const Block* blocks, long first, long last, const bf16* x, long rows, const int64_t* cu_seqlens,
                     long images, const float* bias, const CachedKeysValues* cached, const ObservationRequest* request,
                     bf16* qkv, bf16* attended, bf16* out, bf16* next_keys_values, bf16* next_query, long threads);

// x [rows, dim] -> out [images * prefix, dim]: the last block, for the prefix tokens only. qkv [3 * heads * width, dim] is
// the weight of its first layer, not packed; normed [rows, dim] is working memory.
void last_block(const Block* block, const bf16* qkv, const bf16* x, long rows, const int64_t* cu_seqlens, long images,
                long prefix, const float* bias, bf16* normed, bf16* out, long threads);

// game.cpp

// Bytes of working memory that fused_forward needs.
long fused_workspace(const FusedGame* game, long images, long threads);

// pixels [images, channels, height, width] -> results: the whole forward pass with all pruning decisions.
// memory: fused_workspace bytes.
void fused_forward(const FusedGame* game, const bf16* pixels, long images, const FusedResults* results, char* memory,
                   long threads);
}
