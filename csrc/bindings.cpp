// The Python face of csrc: llm_parallel._C. llm_parallel/data/ref.py says the same in numpy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>

#include "epoch.h"
#include "mixture.h"
#include "permutation.h"
#include "rest.h"

namespace py = pybind11;
using namespace llm_parallel;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

Part part_named(const std::string& name) {
    if (name == "all") return Part::kAll;
    if (name == "train") return Part::kTrain;
    if (name == "eval") return Part::kHeldOut;
    throw std::invalid_argument("part is all, train or eval, not " + name);
}

// Owns a reference to the array whose memory the epoch reads.
class PyEpoch {
  public:
    PyEpoch(Array<uint8_t> lengths, uint64_t key, bool shuffled, const std::string& part, uint64_t hold_key,
            uint64_t hold_threshold, int threads)
        : lengths_(std::move(lengths)) {
        const uint8_t* data = lengths_.data();
        const int64_t documents = lengths_.size() / sizeof(int32_t);
        const Permutation order(documents, key, shuffled);
        const Selection selection{part_named(part), hold_key, hold_threshold};
        py::gil_scoped_release released;
        epoch_ = std::make_unique<Epoch>(data, documents, order, selection, threads < 1 ? 1 : threads);
    }

    int64_t tokens() const { return epoch_->tokens(); }
    int64_t bytes() const { return epoch_->bytes(); }

    py::tuple pieces(int64_t start, int64_t length) const {
        if (start < 0 || length < 0 || start + length > tokens()) {
            throw std::out_of_range("tokens outside the epoch");
        }
        const std::vector<Piece> found = epoch_->pieces(start, length);
        Array<int64_t> documents(found.size()), starts(found.size()), lengths(found.size());
        for (size_t i = 0; i < found.size(); ++i) {
            documents.mutable_data()[i] = found[i].document;
            starts.mutable_data()[i] = found[i].start;
            lengths.mutable_data()[i] = found[i].length;
        }
        return py::make_tuple(documents, starts, lengths);
    }

  private:
    Array<uint8_t> lengths_;
    std::unique_ptr<Epoch> epoch_;
};

uint64_t permute(uint64_t position, uint64_t size, uint64_t key) {
    if (position >= size) throw std::out_of_range("position outside the permutation");
    return Permutation(size, key, true)(position);
}

std::unique_ptr<Rest> open_rest(int64_t size, uint64_t key, int64_t taken) {
    if (taken < 0 || taken > size) throw std::out_of_range("more taken than there are");
    py::gil_scoped_release released;
    return std::make_unique<Rest>(Permutation(size, key, true), taken);
}

int64_t element_of(const Rest& rest, int64_t place) {
    if (place < 0 || place >= rest.count()) throw std::out_of_range("place outside the rest");
    return rest.element(place);
}

py::tuple continue_mixture_arrays(const std::vector<int64_t>& weights, int64_t start, std::vector<int64_t> taken,
                                  int64_t count) {
    Array<int32_t> sources(count);
    Array<int64_t> numbers(count);
    int32_t* sources_data = sources.mutable_data();
    int64_t* numbers_data = numbers.mutable_data();
    {
        py::gil_scoped_release released;
        continue_mixture(weights, start, taken, count, sources_data, numbers_data);
    }
    return py::make_tuple(sources, numbers, taken);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.def("mix64", &mix64, py::arg("x"));
    module.def("permute", &permute, py::arg("position"), py::arg("size"), py::arg("key"));
    module.def("continue_mixture", &continue_mixture_arrays, py::arg("weights"), py::arg("start"), py::arg("taken"),
               py::arg("count"));
    py::class_<Rest>(module, "Rest")
        .def(py::init(&open_rest), py::arg("size"), py::arg("key"), py::arg("taken"))
        .def_property_readonly("count", &Rest::count)
        .def("element", &element_of, py::arg("place"));
    py::class_<PyEpoch>(module, "Epoch")
        .def(py::init<Array<uint8_t>, uint64_t, bool, const std::string&, uint64_t, uint64_t, int>(),
             py::arg("lengths").noconvert(), py::arg("key"), py::arg("shuffled"), py::arg("part"), py::arg("hold_key"),
             py::arg("hold_threshold"), py::arg("threads"))
        .def_property_readonly("tokens", &PyEpoch::tokens)
        .def_property_readonly("bytes", &PyEpoch::bytes)
        .def("pieces", &PyEpoch::pieces, py::arg("start"), py::arg("length"));
}
