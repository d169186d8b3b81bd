// A keyed bijection of [0, size): a shuffle that needs no memory and can be asked for any single element.
#pragma once

#include <cstdint>

namespace llm_parallel {

// Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators": the finaliser of SplitMix64.
inline uint64_t mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// Rounds of "multiply by an odd number, add, xor the upper half into the lower" are each a bijection of b-bit numbers;
// an image that falls outside [0, size) is mapped again until it falls inside (cycle walking, at most two rounds on
// average, since 2^b < 2 size for all but tiny sizes).
class Permutation {
  public:
    static constexpr int kRounds = 5;
    // Below 8 bits the rounds have too few distinct values to mix.
    static constexpr int kMinBits = 8;

    Permutation(uint64_t size, uint64_t key, bool shuffled) : size_(size), shuffled_(shuffled && size > 1) {
        int bits = kMinBits;
        while (bits < 62 && (uint64_t{1} << bits) < size) ++bits;
        mask_ = (uint64_t{1} << bits) - 1;
        shift_ = (bits + 1) / 2;
        const uint64_t base = mix64(key);  // so that neighbouring keys share no round
        for (int round = 0; round < kRounds; ++round) {
            multiplier_[round] = mix64(base + 2 * round) | 1;
            addend_[round] = mix64(base + 2 * round + 1);
        }
    }

    uint64_t size() const { return size_; }

    // The element at `position`, which must be below size().
    uint64_t operator()(uint64_t position) const {
        if (!shuffled_) return position;
        uint64_t x = once(position);
        while (x >= size_) x = once(x);
        return x;
    }

  private:
    uint64_t once(uint64_t x) const {
        for (int round = 0; round < kRounds; ++round) {
            x = (x * multiplier_[round] + addend_[round]) & mask_;
            x ^= x >> shift_;
        }
        return x;
    }

    uint64_t size_;
    uint64_t mask_;
    uint64_t multiplier_[kRounds];
    uint64_t addend_[kRounds];
    int shift_;
    bool shuffled_;
};

}  // namespace llm_parallel
