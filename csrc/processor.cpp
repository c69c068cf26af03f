// Which instructions the processor has, and the tables for them. Compiled for any processor.
#include "interface.h"

#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

namespace tokengame {

enum Level { GENERIC, AVX2, AVX512, AVX512_BF16, AMX };  // as in tokengame/kernels/library.py

#if defined(__x86_64__)
// Whether the processor has AMX with bfloat16 and the operating system lets this process use tiles.
static bool has_amx() {
#if defined(__linux__)
    unsigned a, b, c, d = 0;
    const unsigned bf16_bit = 1u << 22, tile_bit = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16_bit | tile_bit)) != (bf16_bit | tile_bit)) return false;
    const long request = 0x1023, tile_data = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return !syscall(SYS_arch_prctl, request, tile_data);
#else
    return false;
#endif
}

static Level best_level() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return GENERIC;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!avx512) return AVX2;
    if (!__builtin_cpu_supports("avx512bf16")) return AVX512;
    return has_amx() ? AMX : AVX512_BF16;
}
#else
static Level best_level() { return GENERIC; }
#endif

template <class Number>
static const Table<Number>* first_of(const Table<Number>* best, const Table<Number>* next) {
    return best ? best : next;
}

// The best table up to a level; a compiler that lacks an instruction set has made no table for it.
static const Table<float>* float_table(int level) {
    const Table<float>* found = generic::table_float();
    if (level >= AVX2) found = first_of(avx2::table_float(), found);
    if (level >= AVX512) found = first_of(avx512::table_float(), found);
    return found;
}
static const Table<bf16>* bf16_table(int level) {
    const Table<bf16>* found = generic::table_bf16();
    if (level >= AVX2) found = first_of(avx2::table_bf16(), found);
    if (level >= AVX512) found = first_of(avx512::table_bf16(), found);
    if (level >= AVX512_BF16) found = first_of(avx512_bf16::table_bf16(), found);
    if (level >= AMX) found = first_of(amx::table_bf16(), found);
    return found;
}

bool is_forked() {
    static pid_t process = 0;  // that has used threads
    const pid_t now = getpid();
    pid_t before;
#pragma omp atomic read  // callers may come from several threads
    before = process;
    if (before && before != now) return true;
#pragma omp atomic write
    process = now;
    return false;
}

}  // namespace tokengame

using namespace tokengame;

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The highest level that this processor has.
EXPORTED int highest_level() { return best_level(); }

// The fastest level. Processors of Intel multiply bfloat16 in vectors no faster than float32, which AVX-512 uses for both.
EXPORTED int fastest_level() {
    const Level best = best_level();
#if defined(__x86_64__)
    if (best == AVX512_BF16 && __builtin_cpu_is("intel")) return AVX512;
#endif
    return best;
}

// The table of a level that the processor has, for numbers of so many bytes: 4 float32, 2 bfloat16.
EXPORTED const void* kernels(int level, int bytes) {
    return bytes == 4 ? (const void*)float_table(level) : (const void*)bf16_table(level);
}

// The checksum of the source files that this library was compiled from.
EXPORTED unsigned source_checksum() { return SOURCES; }

// Whether every function of the tables checks its arguments: see EXPECT in csrc/vectors.h.
EXPORTED int checks_bounds() {
#if defined(TOKENGAME_DEBUG)
    return 1;
#else
    return 0;
#endif
}

// Bytes of each struct that Python lays out too, by its place in tokengame/kernels/structs.py; 0 beyond the last.
EXPORTED long struct_bytes(int which) {
    const long bytes[] = {sizeof(Norm),  sizeof(Linear), sizeof(Mlp),   sizeof(Block), sizeof(CachedKeysValues<float>),
                          sizeof(ObservationRequest),   sizeof(Angles), sizeof(Rotary), sizeof(Actor), sizeof(FusedGame<float>),
                          sizeof(FusedResults<float>),  sizeof(Table<float>)};
    return which < long(sizeof bytes / sizeof *bytes) ? bytes[which] : 0;
}

struct Sampled {  // rows of tensors [number] of [rows, columns] numbers of 16 bits
    const uint16_t* const* tensors;
    const long *rows, *columns, number, part, parts;

    // Calls visit(values, how many): of each sampled row a run of neighbours, a cache line mostly. Of tensors with many
    // rows, those of one of `parts` parts are sampled; the runs of all rows hold every column.
    template <class Visit>
    void each(Visit visit) const {
        for (long i = 0; i < number; i++) {
            const long height = rows[i], width = columns[i], run = height ? (width + height - 1) / height : 0;
            if (!run) continue;
            const bool many = height >= parts;
            const long runs = (width + run - 1) / run;
            for (long r = many ? part : 0; r < height; r += many ? parts : 1) {
                const long at = r * 7919 % runs * run, left = width - at;
                visit(tensors[i] + r * width + at, run < left ? run : left);
            }
        }
    }
};

// tensors [number] of [rows, columns] numbers of 16 bits -> a number that changes when tensors are written to: a hash of the
// values that are sampled of them.
EXPORTED unsigned long long weight_version(const uint16_t* const* tensors, const long* rows, const long* columns, long number,
                                           long part, long parts) {
    const Sampled sampled{tensors, rows, columns, number, part, parts};
    sampled.each([](const uint16_t* values, long count) {
        for (long k = 0; k < count; k += 32) __builtin_prefetch(values + k);
    });
    unsigned long long sum = 0, factor = 0;
    sampled.each([&](const uint16_t* values, long count) {
        for (long k = 0; k < count; k++) sum += values[k] * (factor += 0xbf58476d1ce4e5b9ull);
    });
    return sum;
}
