// What the processor can do. Compiled for any x86-64.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace tokengame {
extern bool has_amx;
}

static bool bit(unsigned leaf, unsigned subleaf, int which, int at) {
    unsigned r[4] = {};
    return __get_cpuid_count(leaf, subleaf, r, r + 1, r + 2, r + 3) && (r[which] >> at & 1);
}

static bool saved(unsigned long long features) {  // whether the system saves these registers
    unsigned low, high;
    if (!bit(1, 0, 2, 27)) return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & features) == features;
}

// 0: these kernels do not run here; 1: AVX-512 with bfloat16; 2: AMX. Asks the system for the use of tiles.
extern "C" int set_up(int wanted) {
    const bool avx512 = bit(7, 0, 1, 16) && bit(7, 0, 1, 17) && bit(7, 0, 1, 30) && bit(7, 0, 1, 31) && bit(7, 1, 0, 5);
    if (!avx512 || !saved(0xe6) || wanted < 1) return 0;
    const long request = 0x1023, tile_data = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    tokengame::has_amx = wanted > 1 && bit(7, 0, 3, 22) && bit(7, 0, 3, 24) && saved(0x600e6) &&
                         !syscall(SYS_arch_prctl, request, tile_data);
    return 1 + tokengame::has_amx;
}

// A checksum of the sources that this was compiled from.
extern "C" unsigned sources() { return SOURCES; }

// A number that changes when somebody writes to whole tensors: made of some of their bits.
extern "C" unsigned long long peek(const unsigned short* const* tensors, const long* sizes, long number) {
    unsigned long long sum = 0;
    for (long i = 0; i < number; i++)
        for (long k = 0; k < 8 && sizes[i] > 0; k++) sum = (sum + tensors[i][(sizes[i] - 1) * k / 7]) * 0x9e3779b97f4a7c15ull;
    return sum;
}
