// Chooses the build of the arithmetic that this processor runs.
#include "kernels.h"

#include <cstring>
#include <initializer_list>

namespace llm_parallel::decode {

namespace portable {
extern const Kernels table;
}
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

const Kernels* kernels_named(const char* name) {
#if defined(__x86_64__) && defined(__GNUC__)
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
    if (wide && std::strcmp(name, "avx512") == 0) return &avx512::table;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && std::strcmp(name, "avx2") == 0) {
        return &avx2::table;
    }
#endif
    return std::strcmp(name, "portable") == 0 ? &portable::table : nullptr;
}

static const Kernels* chosen = [] {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
#endif
    for (const char* name : {"avx512", "avx2"}) {
        if (const Kernels* found = kernels_named(name)) return found;
    }
    return &portable::table;
}();

const Kernels& kernels() { return *chosen; }

bool use_kernels(const char* name) {
    const Kernels* found = kernels_named(name);
    if (found) chosen = found;
    return found != nullptr;
}

}  // namespace llm_parallel::decode
