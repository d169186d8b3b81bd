// The order in which a mixture's sources take turns.
#pragma once

#include <cstdint>
#include <vector>

namespace llm_parallel {

// Continues a mixture by `count` samples. `weights` are positive integers; `taken[i]` is how many of the first `start`
// samples came from source i, and is brought up to date. Writes each sample's source and its number within that source.
//
// The m-th sample of a source of share w may come at step floor((m-1)/w) + 1 at the earliest and at step ceil(m/w) at
// the latest; of the sources whose next sample may come, the one with the earliest deadline m/w is taken (the first of
// equals). Earliest-deadline-first keeps every deadline that can be kept, and giving each source its share of every
// step keeps all of them, so after n steps each source has been taken more than n w - 1 and less than n w + 1 times.
void continue_mixture(const std::vector<int64_t>& weights, int64_t start, std::vector<int64_t>& taken, int64_t count,
                      int32_t* sources, int64_t* numbers);

}  // namespace llm_parallel
