// What the processor can do. Compiled for any x86-64.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "network.h"

namespace tokengame {

// Bit `at` of register `which` (0: eax, 1: ebx, 2: ecx, 3: edx) of a CPUID leaf.
static bool bit(unsigned leaf, unsigned subleaf, int which, int at) {
    unsigned r[4] = {};
    return __get_cpuid_count(leaf, subleaf, r, r + 1, r + 2, r + 3) && (r[which] >> at & 1);
}

// Whether the operating system saves these registers (bits of XCR0).
static bool saved(unsigned long long registers) {
    unsigned low, high;
    if (!bit(1, 0, 2, 27)) return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & registers) == registers;
}

}  // namespace tokengame

using namespace tokengame;

extern "C" {

int set_level(int wanted) {
    const bool avx512 = bit(7, 0, 1, 16) && bit(7, 0, 1, 17) && bit(7, 0, 1, 30) && bit(7, 0, 1, 31) && bit(7, 1, 0, 5);
    if (!avx512 || !saved(0xe6) || wanted < 1) return 0;
    const long request = 0x1023, tile_data = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): permission to use tiles
    has_amx = wanted > 1 && bit(7, 0, 3, 22) && bit(7, 0, 3, 24) && saved(0x600e6) &&
              !syscall(SYS_arch_prctl, request, tile_data);
    return 1 + has_amx;
}

unsigned source_checksum() { return SOURCES; }

unsigned long long weight_version(const bf16* const* tensors, const long* rows, const long* columns, long number) {
    unsigned long long sum = 0;
#pragma omp parallel for schedule(dynamic, 8) reduction(+ : sum)
    for (long i = 0; i < number; i++) {
        // Of each row a run of neighbours, a cache line mostly; the runs of all rows hold every column.
        const long height = rows[i], width = columns[i], run = height ? (width + height - 1) / height : 0;
        if (!run) continue;
        const long runs = (width + run - 1) / run, step = 7919 % runs, ahead = 20;
        unsigned long long factor = 0x9e3779b97f4a7c15ull * (2 * i + 1);
        const bf16* row = tensors[i];
        for (long r = 0, at = 0, next = ahead * step % runs; r < height; r++, row += width) {
            if (r + ahead < height) __builtin_prefetch(row + ahead * width + next * run);
            const bf16* values = row + at * run;
            for (long k = std::min(run, width - at * run); k > 0; k--) sum += *values++ * (factor += 0xbf58476d1ce4e5b8ull);
            if ((at += step) >= runs) at -= runs;
            if ((next += step) >= runs) next -= runs;
        }
    }
    return sum;
}
}
