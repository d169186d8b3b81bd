// The Python face of csrc/decode: llm_parallel._decode. Tensors come as addresses; generate/native.py checks their
// shapes and dtypes and keeps them alive.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "chunk.h"

namespace py = pybind11;
using namespace llm_parallel::decode;

namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::vector<float> copied(const py::object& given) {
    if (given.is_none()) return {};
    const Floats floats = given.cast<Floats>();
    return {floats.data(), floats.data() + floats.size()};
}

Kind kind_named(const std::string& name) {
    if (name == "fp32") return Kind::kFloat;
    if (name == "bf16") return Kind::kBfloat;
    if (name == "int8") return Kind::kInt8;
    if (name == "int4") return Kind::kInt4;
    throw std::invalid_argument("kind is fp32, bf16, int8 or int4, not " + name);
}

Matrix matrix(const std::string& kind, uintptr_t data, uintptr_t scales, int64_t rows, int64_t columns) {
    return {kind_named(kind), at<const void>(data), at<const float>(scales), rows, columns};
}

HeadNorm head_norm(const py::object& weight, int64_t head_dim, bool all) {
    if (weight.is_none()) return HeadNorm::kNone;
    const int64_t size = weight.cast<Floats>().size();
    if (!all && size != head_dim) throw std::invalid_argument("a norm of each head has as many weights as a head");
    return all ? HeadNorm::kAll : HeadNorm::kEach;
}

Layer layer(const py::dict& given) {
    const auto cache = given["cache"].cast<std::tuple<uintptr_t, uintptr_t, bool, int64_t, int64_t, int64_t>>();
    const auto [keys, values, bfloat, groups, head_dim, page_tokens] = cache;
    Layer made;
    made.cache = {at<void>(keys), at<void>(values), bfloat, groups, head_dim, page_tokens};
    made.scores = {given["scale"].cast<float>(), given["softcap"].cast<float>()};
    made.left = given["left"].cast<int64_t>();
    if (!given.contains("qkv")) return made;
    made.qkv = given["qkv"].cast<Matrix>(), made.output = given["output"].cast<Matrix>();
    made.up = given["up"].cast<Matrix>(), made.down = given["down"].cast<Matrix>();
    made.qkv_bias = copied(given["qkv_bias"]), made.output_bias = copied(given["output_bias"]);
    made.up_bias = copied(given["up_bias"]), made.down_bias = copied(given["down_bias"]);
    made.attention_norm = copied(given["attention_norm"]), made.mlp_norm = copied(given["mlp_norm"]);
    made.query_norm = copied(given["query_norm"]), made.key_norm = copied(given["key_norm"]);
    const bool all = given["norms_all_heads"].cast<bool>();
    made.query_kind = head_norm(given["query_norm"], head_dim, all);
    made.key_kind = head_norm(given["key_norm"], head_dim, all);
    made.eps = given["eps"].cast<float>(), made.rotates = given["rotates"].cast<bool>();
    made.norms_outputs = given["norms_outputs"].cast<bool>();
    return made;
}

std::vector<float> widened(uintptr_t address, int64_t count, bool bfloat) {
    std::vector<float> wide(count);
    if (bfloat) kernels().from_bfloat(at<const uint16_t>(address), count, wide.data());
    else std::copy_n(at<const float>(address), count, wide.data());
    return wide;
}

// x [rows, columns] and y [rows, outputs] are bf16 if bfloat, else fp32.
void product(const Matrix& m, uintptr_t x, int64_t rows, uintptr_t y, bool bfloat, int threads) {
    py::gil_scoped_release released;
    if (!bfloat) return multiply(m, at<const float>(x), rows, at<float>(y), threads);
    std::vector<float> wide = widened(x, rows * m.columns, true), out(rows * m.rows);
    multiply(m, wide.data(), rows, out.data(), threads);
    kernels().to_bfloat(out.data(), rows * m.rows, at<uint16_t>(y));
}

using Addresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

Pass pass_of(int64_t rows, const Addresses& given, int threads) {
    const auto [slots, cos, sin, pages, starts, lengths] = given;
    return {rows, at<const int64_t>(slots), at<const float>(cos), at<const float>(sin), at<const int32_t>(pages),
            at<const int64_t>(starts), at<const int64_t>(lengths), threads};
}

void attend(const Shape& shape, const Layer& layer, uintptr_t q, int64_t rows, const Addresses& given, uintptr_t out,
            bool bfloat, int threads) {
    py::gil_scoped_release released;
    const Pass pass = pass_of(rows, given, threads);
    if (!bfloat) return attend_rows(shape, layer, pass, at<const float>(q), at<float>(out));
    const int64_t count = rows * shape.groups * shape.members * shape.head_dim;
    std::vector<float> wide = widened(q, count, true), found(count);
    attend_rows(shape, layer, pass, wide.data(), found.data());
    kernels().to_bfloat(found.data(), count, at<uint16_t>(out));
}

// y [rows, outputs] fp32 of the normed rows of x; bfloat is about x alone.
void logits(const Matrix& m, const Floats& norm, float eps, uintptr_t x, int64_t rows, bool bfloat, uintptr_t y,
            int threads) {
    py::gil_scoped_release released;
    std::vector<float> wide = widened(x, rows * m.columns, bfloat);
    for (int64_t n = 0; n < rows; ++n) {
        kernels().norm(wide.data() + n * m.columns, norm.data(), eps, m.columns, wide.data() + n * m.columns);
    }
    multiply(m, wide.data(), rows, at<float>(y), threads);
}

py::tuple best(uintptr_t x, int64_t rows, int64_t columns, int64_t stride) {
    std::vector<float> largest(rows), log_sums(rows);
    std::vector<int64_t> places(rows);
    {
        py::gil_scoped_release released;
        for (int64_t n = 0; n < rows; ++n) {
            kernels().best(at<const float>(x) + n * stride, columns, &largest[n], &places[n], &log_sums[n]);
        }
    }
    return py::make_tuple(largest, places, log_sums);
}

}  // namespace

PYBIND11_MODULE(_decode, m) {
    py::class_<Matrix>(m, "Matrix").def(py::init(&matrix));
    py::class_<Layer>(m, "Layer").def(py::init(&layer));
    py::class_<Shape>(m, "Shape").def(py::init([](int64_t hidden, int64_t wide, int64_t groups, int64_t members,
                                                  int64_t head_dim) {
        return Shape{hidden, wide, groups, members, head_dim};
    }));
    py::class_<Chunk>(m, "Chunk")
        .def(py::init([](const Shape& shape, const std::vector<Layer>& layers) {
            auto made = std::make_unique<Chunk>(shape);
            for (const Layer& one : layers) made->add(one);
            return made;
        }))
        .def("forward", [](Chunk& chunk, uintptr_t x, int64_t rows, const Addresses& given, int threads) {
            py::gil_scoped_release released;
            chunk.forward(pass_of(rows, given, threads), at<float>(x));
        });
    m.def("product", &product);
    m.def("attend", &attend);
    m.def("logits", &logits);
    m.def("best", &best);
    m.def("level", [] { return kernels().name; });
    m.def("levels", [] {
        std::vector<std::string> found;
        for (const char* name : {"avx512", "avx2", "portable"}) {
            if (kernels_named(name)) found.push_back(name);
        }
        return found;
    });
    m.def("use", [](const std::string& name) {
        if (!use_kernels(name.c_str())) throw std::invalid_argument(name + " is nothing that this processor runs");
    });
}
