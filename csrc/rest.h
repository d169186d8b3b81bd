// What a shuffle has not given yet.
#pragma once

#include <cstdint>
#include <vector>

#include "permutation.h"

namespace llm_parallel {

// [0, size) without the first `taken` elements of a shuffle, in ascending order: one bit for each element, and the
// number of elements left before every kStride-th one.
class Rest {
  public:
    static constexpr int64_t kStride = 512;

    Rest(const Permutation& order, int64_t taken);

    int64_t count() const { return before_.back(); }

    // Element number `place` of those that are left; `place` must be below count().
    int64_t element(int64_t place) const;

  private:
    static constexpr int64_t kBits = 64;

    std::vector<uint64_t> left_;
    std::vector<int64_t> before_;
};

}  // namespace llm_parallel
