#include "rest.h"

#include <algorithm>

namespace llm_parallel {

Rest::Rest(const Permutation& order, int64_t taken) {
    const int64_t size = static_cast<int64_t>(order.size());
    const int64_t strides = (size + kStride - 1) / kStride;
    left_.assign(strides * (kStride / kBits), 0);
    std::fill(left_.begin(), left_.begin() + size / kBits, ~uint64_t{0});
    if (size % kBits) left_[size / kBits] = (uint64_t{1} << (size % kBits)) - 1;
    for (int64_t place = 0; place < taken; ++place) {
        const uint64_t element = order(place);
        left_[element / kBits] &= ~(uint64_t{1} << (element % kBits));
    }
    before_.assign(strides + 1, 0);
    for (int64_t stride = 0; stride < strides; ++stride) {
        int64_t count = before_[stride];
        for (int64_t word = 0; word < kStride / kBits; ++word) {
            count += __builtin_popcountll(left_[stride * (kStride / kBits) + word]);
        }
        before_[stride + 1] = count;
    }
}

int64_t Rest::element(int64_t place) const {
    // The last stride that has at most `place` elements before it, and so holds the element.
    const auto after = std::upper_bound(before_.begin(), before_.end() - 1, place);
    const int64_t stride = (after - before_.begin()) - 1;
    int64_t skip = place - before_[stride];
    int64_t word = stride * (kStride / kBits);
    for (int64_t held; skip >= (held = __builtin_popcountll(left_[word])); ++word) skip -= held;
    uint64_t bits = left_[word];
    for (; skip > 0; --skip) bits &= bits - 1;
    return word * kBits + __builtin_ctzll(bits);
}

}  // namespace llm_parallel
