// The order of one epoch's documents and where any stretch of their concatenation lies.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "permutation.h"

namespace llm_parallel {

// Which documents take part. A document is held out if mix64(key + number) < threshold.
enum class Part { kAll, kTrain, kHeldOut };

struct Selection {
    Part part = Part::kAll;
    uint64_t key = 0;
    uint64_t threshold = 0;

    bool contains(uint64_t document) const {
        if (part == Part::kAll) return true;
        return (mix64(key + document) < threshold) == (part == Part::kHeldOut);
    }
};

// Part of a document: tokens [start, start + length) of document number `document`.
struct Piece {
    int64_t document;
    int64_t start;
    int64_t length;
};

// Documents in permuted order, those outside the selection counted as empty. Instead of a list of documents (8 bytes
// each) or of samples (8 to 16 bytes each), it keeps the running token count before every kStride-th place of the order
// (a quarter of a byte per document); a lookup bisects these and walks at most kStride documents.
class Epoch {
  public:
    static constexpr int64_t kStride = 32;

    // `lengths` holds each document's tokens as int32. It is not copied and must outlive this object; in an .idx file it
    // begins at byte 34, so it need not be aligned.
    Epoch(const uint8_t* lengths, int64_t documents, Permutation order, Selection selection, int threads);

    int64_t tokens() const { return before_.back(); }
    int64_t bytes() const { return static_cast<int64_t>(before_.size() * sizeof(int64_t)); }

    // The non-empty pieces that make up tokens [start, start + length) of the epoch; the caller stays inside tokens().
    std::vector<Piece> pieces(int64_t start, int64_t length) const;

  private:
    int64_t length_of(uint64_t document) const {
        if (!selection_.contains(document)) return 0;
        int32_t length;
        std::memcpy(&length, lengths_ + document * sizeof(length), sizeof(length));
        return length;
    }
    void count_strides(int64_t first, int64_t last);

    const uint8_t* lengths_;
    int64_t documents_;
    Permutation order_;
    Selection selection_;
    std::vector<int64_t> before_;
};

}  // namespace llm_parallel
