#include "epoch.h"

#include <algorithm>
#include <thread>

namespace llm_parallel {

Epoch::Epoch(const uint8_t* lengths, int64_t documents, Permutation order, Selection selection, int threads)
    : lengths_(lengths), documents_(documents), order_(order), selection_(selection) {
    const int64_t strides = (documents + kStride - 1) / kStride;
    before_.assign(strides + 1, 0);
    const int64_t share = (strides + threads - 1) / threads;
    std::vector<std::thread> others;
    for (int worker = 1; worker < threads && worker * share < strides; ++worker) {
        others.emplace_back([=] { count_strides(worker * share, std::min(strides, (worker + 1) * share)); });
    }
    count_strides(0, std::min(strides, share));
    for (auto& other : others) other.join();
    for (int64_t stride = 0; stride < strides; ++stride) before_[stride + 1] += before_[stride];
}

// Writes each stride's own token count to before_[stride + 1]. Every length is a cache miss, so a stride's documents
// are worked out and prefetched one stride ahead of being read.
void Epoch::count_strides(int64_t first, int64_t last) {
    uint64_t now[kStride];
    uint64_t next[kStride];
    auto fetch = [&](int64_t stride, uint64_t* into) {
        const int64_t begin = stride * kStride;
        const int64_t count = std::min(kStride, documents_ - begin);
        for (int64_t i = 0; i < count; ++i) {
            into[i] = order_(begin + i);
            __builtin_prefetch(lengths_ + into[i] * sizeof(int32_t));
        }
        return count;
    };
    if (first >= last) return;
    int64_t count = fetch(first, now);
    for (int64_t stride = first; stride < last; ++stride) {
        const int64_t next_count = stride + 1 < last ? fetch(stride + 1, next) : 0;
        int64_t sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += length_of(now[i]);
        before_[stride + 1] = sum;
        std::copy(next, next + next_count, now);
        count = next_count;
    }
}

std::vector<Piece> Epoch::pieces(int64_t start, int64_t length) const {
    // The last stride that begins at or before `start`.
    const auto after = std::upper_bound(before_.begin(), before_.end() - 1, start);
    const int64_t stride = (after - before_.begin()) - 1;
    int64_t skip = start - before_[stride];
    std::vector<Piece> found;
    for (int64_t place = stride * kStride; length > 0 && place < documents_; ++place) {
        const uint64_t document = order_(place);
        const int64_t held = length_of(document);
        if (skip >= held) {
            skip -= held;
            continue;
        }
        const int64_t taken = std::min(held - skip, length);
        found.push_back({static_cast<int64_t>(document), skip, taken});
        length -= taken;
        skip = 0;
    }
    return found;
}

}  // namespace llm_parallel
