#include "chunk.h"

#include <algorithm>

namespace llm_parallel::decode {

namespace {

bool is_packed(const Matrix& m) { return m.kind == Kind::kInt8 || m.kind == Kind::kInt4; }

// Rows of activations with room for their quants.
struct Activations {
    std::vector<float> values, steps;
    std::vector<int8_t> quants;
    std::vector<int32_t> sums;
    int64_t width;

    Activations(int64_t rows, int64_t width, bool packed) : width(width) {
        values.resize(rows * width);
        if (!packed) return;
        quants.resize(rows * width);
        steps.resize(rows * (width / kGroup));
        sums.resize(rows * (width / kGroup));
    }

    float* row(int64_t n) { return values.data() + n * width; }

    void prepare(const Matrix& m, const float* x, int64_t n) {
        if (!is_packed(m)) return;
        const int64_t groups = width / kGroup;
        kernels().quantize(x, width, quants.data() + n * width, steps.data() + n * groups, sums.data() + n * groups);
    }

    void prepare(const Matrix& m, int64_t n) { prepare(m, row(n), n); }

    Rows rows(int64_t count, const float* x = nullptr) const {
        return {x ? x : values.data(), quants.data(), steps.data(), sums.data(), count};
    }
};

// This worker's outputs of a product, with the bias.
void part_of_product(const Matrix& m, const std::vector<float>& bias, const Rows& x, float* y, const Team& team,
                     int worker) {
    const auto [begin, end] = team.share(m.rows, kBlock, worker);
    if (begin == end) return;
    kernels().product(m, x, begin, end, y, m.rows);
    if (bias.empty()) return;
    for (int64_t t = 0; t < x.count; ++t) kernels().add(bias.data() + begin, end - begin, y + t * m.rows + begin);
}

void put(const float* x, int64_t count, const Cache& cache, void* base, int64_t slot, int64_t group) {
    const int64_t at = (slot * cache.groups + group) * cache.head_dim;
    if (cache.bfloat) kernels().to_bfloat(x, count, static_cast<uint16_t*>(base) + at);
    else std::copy(x, x + count, static_cast<float*>(base) + at);
}

// The norm of some heads of a row [count, head_dim], which lie stride apart.
void norm_heads(HeadNorm kind, const std::vector<float>& weight, float eps, const Shape& shape, int64_t groups,
                int64_t count, float* first) {
    if (kind == HeadNorm::kNone) return;
    const int64_t dim = shape.head_dim, stride = (shape.members + 2) * dim;
    if (kind == HeadNorm::kEach) {
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t h = 0; h < count; ++h) {
                float* head = first + g * stride + h * dim;
                kernels().norm(head, weight.data(), eps, dim, head);
            }
        return;
    }
    std::vector<float> together(groups * count * dim);
    for (int64_t g = 0; g < groups; ++g)
        std::copy_n(first + g * stride, count * dim, together.data() + g * count * dim);
    kernels().norm(together.data(), weight.data(), eps, groups * count * dim, together.data());
    for (int64_t g = 0; g < groups; ++g)
        std::copy_n(together.data() + g * count * dim, count * dim, first + g * stride);
}

// Norms and rotates queries and keys of a row [groups, members + 2, head_dim], stores keys and values, and leaves the
// queries in q [groups, members, head_dim].
void place_row(const Shape& shape, const Layer& layer, const Pass& pass, int64_t row, float* qkv, float* q) {
    const int64_t dim = shape.head_dim, members = shape.members, stride = (members + 2) * dim;
    norm_heads(layer.query_kind, layer.query_norm, layer.eps, shape, shape.groups, members, qkv);
    norm_heads(layer.key_kind, layer.key_norm, layer.eps, shape, shape.groups, 1, qkv + members * dim);
    const float *cos = pass.cos + row * dim, *sin = pass.sin + row * dim;
    for (int64_t g = 0; g < shape.groups; ++g) {
        float* group = qkv + g * stride;
        if (layer.rotates) {
            for (int64_t h = 0; h <= members; ++h) kernels().rotate(group + h * dim, cos, sin, dim, group + h * dim);
        }
        std::copy_n(group, members * dim, q + g * members * dim);
        put(group + members * dim, dim, layer.cache, layer.cache.keys, pass.slots[row], g);
        put(group + (members + 1) * dim, dim, layer.cache, layer.cache.values, pass.slots[row], g);
    }
}

// This worker's part of attention. With fewer rows and groups than workers, the heads of a group are divided too.
void part_of_attention(const Shape& shape, const Layer& layer, const Pass& pass, const float* q, float* out,
                       const Team& team, int worker) {
    const int64_t pairs = pass.rows * shape.groups;
    const int64_t parts = pairs < team.size() ? shape.members : 1, heads = shape.members / parts;
    const auto [begin, end] = team.share(pairs * parts, 1, worker);
    std::vector<float> scratch;
    for (int64_t n = begin; n < end; ++n) {
        const int64_t row = n / parts / shape.groups, group = n / parts % shape.groups;
        const int64_t length = pass.lengths[row], at = n * heads * shape.head_dim;
        const int64_t first = layer.left >= 0 ? std::max<int64_t>(length - layer.left - 1, 0) : 0;
        scratch.resize(std::max<size_t>(scratch.size(), heads * (length - first + 64)));
        kernels().attend(q + at, heads, layer.cache, group, {pass.pages + pass.starts[row], first, length},
                         layer.scores, scratch.data(), out + at);
    }
}

}  // namespace

int worthwhile(int threads, double multiplications) {
    return static_cast<int>(std::clamp<double>(multiplications / (1 << 20), 1.0, std::max(threads, 1)));
}

void multiply(const Matrix& matrix, const float* x, int64_t rows, float* y, int threads) {
    Team team(worthwhile(threads, static_cast<double>(rows) * matrix.rows * matrix.columns));
    Activations given(is_packed(matrix) ? rows : 0, matrix.columns, is_packed(matrix));
    team.run([&](int worker) {
        if (is_packed(matrix)) {
            const auto [begin, end] = team.share(rows, 1, worker);
            for (int64_t n = begin; n < end; ++n) given.prepare(matrix, x + n * matrix.columns, n);
            team.meet();
        }
        part_of_product(matrix, {}, given.rows(rows, x), y, team, worker);
    });
}

void attend_rows(const Shape& shape, const Layer& layer, const Pass& pass, const float* q, float* out) {
    double keys = 0;
    for (int64_t n = 0; n < pass.rows; ++n) keys += static_cast<double>(pass.lengths[n]);
    Team team(worthwhile(pass.threads, 2 * keys * shape.groups * shape.members * shape.head_dim));
    team.run([&](int worker) { part_of_attention(shape, layer, pass, q, out, team, worker); });
}

void Chunk::forward(const Pass& pass, float* x) {
    const std::lock_guard<std::mutex> alone(busy_);
    const int64_t rows = pass.rows, hidden = shape_.hidden;
    double work = 0;
    bool packed = false;
    for (const Layer& layer : layers_) {
        for (const Matrix* m : {&layer.qkv, &layer.output, &layer.up, &layer.down}) {
            work += static_cast<double>(rows) * m->rows * m->columns;
            packed = packed || is_packed(*m);
        }
    }
    Team team(worthwhile(pass.threads, work));
    const int64_t queries = shape_.groups * shape_.members * shape_.head_dim;
    const int64_t all = queries + 2 * shape_.groups * shape_.head_dim;
    Activations normed(rows, hidden, packed), attended(rows, queries, packed), fed(rows, shape_.wide, packed);
    std::vector<float> qkv(rows * all), q(rows * queries), both(rows * 2 * shape_.wide), y(rows * hidden);
    const Kernels& k = kernels();
    team.run([&](int worker) {
        const auto [begin, end] = team.share(rows, 1, worker);
        for (const Layer& layer : layers_) {
            const auto normed_into = [&](const std::vector<float>& weight, const Matrix& next) {
                for (int64_t n = begin; n < end; ++n) {
                    if (layer.norms_outputs) std::copy_n(x + n * hidden, hidden, normed.row(n));
                    else k.norm(x + n * hidden, weight.data(), layer.eps, hidden, normed.row(n));
                    normed.prepare(next, n);
                }
            };
            const auto added = [&](const std::vector<float>& weight) {
                for (int64_t n = begin; n < end; ++n) {
                    float* row = y.data() + n * hidden;
                    if (layer.norms_outputs) k.norm(row, weight.data(), layer.eps, hidden, row);
                    k.add(row, hidden, x + n * hidden);
                }
            };
            normed_into(layer.attention_norm, layer.qkv);
            team.meet();
            part_of_product(layer.qkv, layer.qkv_bias, normed.rows(rows), qkv.data(), team, worker);
            team.meet();
            for (int64_t n = begin; n < end; ++n) {
                place_row(shape_, layer, pass, n, qkv.data() + n * all, q.data() + n * queries);
            }
            team.meet();
            part_of_attention(shape_, layer, pass, q.data(), attended.values.data(), team, worker);
            team.meet();
            if (is_packed(layer.output)) {
                for (int64_t n = begin; n < end; ++n) attended.prepare(layer.output, n);
                team.meet();
            }
            part_of_product(layer.output, layer.output_bias, attended.rows(rows), y.data(), team, worker);
            team.meet();
            added(layer.attention_norm);
            normed_into(layer.mlp_norm, layer.up);
            team.meet();
            part_of_product(layer.up, layer.up_bias, normed.rows(rows), both.data(), team, worker);
            team.meet();
            for (int64_t n = begin; n < end; ++n) {
                const float* gate = both.data() + n * 2 * shape_.wide;
                k.gated(gate, gate + shape_.wide, shape_.wide, fed.row(n));
                fed.prepare(layer.down, n);
            }
            team.meet();
            part_of_product(layer.down, layer.down_bias, fed.rows(rows), y.data(), team, worker);
            team.meet();
            added(layer.mlp_norm);
        }
    });
}

}  // namespace llm_parallel::decode
