// Consecutive layers of a model on the few tokens of a decoding pass, from residual stream to residual stream.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace llm_parallel::decode {

enum class HeadNorm { kNone, kEach, kAll };  // of each head alone, or of all heads of a token together

struct Layer {
    Matrix qkv, output, up, down;
    std::vector<float> qkv_bias, output_bias, up_bias, down_bias;  // empty where there is none
    std::vector<float> attention_norm, mlp_norm, query_norm, key_norm;
    HeadNorm query_kind = HeadNorm::kNone, key_kind = HeadNorm::kNone;
    float eps = 0.0f;           // of all norms
    bool rotates = true;
    bool norms_outputs = false; // attention_norm and mlp_norm are of what is added to the stream, not of the stream
    int64_t left = -1;          // keys before its own that a query sees, -1 for all
    Scores scores;
    Cache cache;
};

struct Shape {
    int64_t hidden, wide, groups, members, head_dim;  // wide: columns of the MLP's second matrix
};

// slots: where keys and values of each row go; cos, sin: [rows, head_dim]; pages: of all sequences; starts: where in
// pages those of a row's sequence begin; lengths: keys that a row sees, its own included, before windows.
struct Pass {
    int64_t rows;
    const int64_t* slots;
    const float *cos, *sin;
    const int32_t* pages;
    const int64_t *starts, *lengths;
    int threads;
};

class Chunk {
  public:
    explicit Chunk(Shape shape) : shape_(shape) {}
    void add(Layer layer) { layers_.push_back(std::move(layer)); }
    // x [rows, hidden], the stream, which is changed in place.
    void forward(const Pass& pass, float* x);

  private:
    const Shape shape_;
    std::vector<Layer> layers_;
    std::mutex busy_;
};

// One query of each head for each row, over a layer's cache: q, out [rows, groups, members, head_dim].
void attend_rows(const Shape& shape, const Layer& layer, const Pass& pass, const float* q, float* out);

// y [rows, matrix.rows] = x [rows, matrix.columns] times the transposed matrix.
void multiply(const Matrix& matrix, const float* x, int64_t rows, float* y, int threads);

// Threads that are worth starting for so many multiplications, of those allowed.
int worthwhile(int threads, double multiplications);

}  // namespace llm_parallel::decode
