#include "mixture.h"

#include <numeric>

namespace llm_parallel {

__extension__ typedef __int128 int128;

void continue_mixture(const std::vector<int64_t>& weights, int64_t start, std::vector<int64_t>& taken, int64_t count,
                      int32_t* sources, int64_t* numbers) {
    const int num_sources = static_cast<int>(weights.size());
    const int64_t total = std::accumulate(weights.begin(), weights.end(), int64_t{0});
    // owed[i] = n weights[i] - taken[i] total, always between -total and total.
    std::vector<int64_t> owed(num_sources);
    for (int i = 0; i < num_sources; ++i) {
        owed[i] = static_cast<int64_t>(int128{start} * weights[i] - int128{taken[i]} * total);
    }
    for (int64_t step = 0; step < count; ++step) {
        int chosen = -1;
        for (int i = 0; i < num_sources; ++i) {
            owed[i] += weights[i];
            if (owed[i] <= 0) continue;
            // The next deadline is (total - owed) / weight steps away; compared by cross-multiplication.
            if (chosen < 0 || int128{total - owed[i]} * weights[chosen] < int128{total - owed[chosen]} * weights[i]) {
                chosen = i;
            }
        }
        sources[step] = chosen;
        numbers[step] = taken[chosen]++;
        owed[chosen] -= total;
    }
}

}  // namespace llm_parallel
