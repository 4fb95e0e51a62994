// The Python module fastdmd._runtime: what the native libraries are and how they run, and their random numbers for
// numpy. It knows nothing of torch, and shares the kernels with the ops.
#ifdef __linux__
#include <malloc.h>
#endif
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/facts.h"
#include "cpu/instruction_set.h"
#include "formulas.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace fastdmd {
namespace {

std::vector<std::string> split(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> parts;
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

py::dict facts() {
  const BuildFacts& facts = build_facts();
  const std::string commit = facts.commit;
  return py::dict("compiler"_a = facts.compiler,
                  "flags"_a = facts.flags,
                  "instruction_sets"_a = instruction_sets(),
                  "torch_abi"_a = facts.torch_abi,
                  "cuda_architectures"_a = split(FASTDMD_CUDA_ARCHITECTURES),
                  "commit"_a = commit.empty() ? std::nullopt : std::optional<std::string>(commit));
}

// For a message: on one line, whatever the object is; an int of thousands of digits has no text.
std::string shown(const py::object& object) {
  const auto text = py::reinterpret_steal<py::object>(PyObject_ASCII(object.ptr()));
  if (text) return py::cast<std::string>(text);
  PyErr_Clear();
  return "one without a text";
}

std::string hold_back_to(const py::object& name) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_Check(name.ptr()) ? PyUnicode_AsUTF8AndSize(name.ptr(), &size) : nullptr;
  if (!text || !hold_back(std::string(text, size_t(size)))) {
    PyErr_Clear();  // of text that is not Unicode
    std::string names;
    for (const std::string& set : instruction_sets()) names += (names.empty() ? "" : ", ") + set;
    throw py::value_error("fastdmd.hold_back: expected an instruction set out of " + names + ", got " + shown(name));
  }
  return instruction_set();
}

bool set_malloc(int mmap_threshold, int trim_threshold, int top_pad) {
#ifdef __GLIBC__
  return mallopt(M_MMAP_THRESHOLD, mmap_threshold) && mallopt(M_TRIM_THRESHOLD, trim_threshold) &&
         mallopt(M_TOP_PAD, top_pad);
#else
  return false;
#endif
}

std::string type_name(const py::handle& object) { return py::str(py::type::of(object).attr("__name__")); }

// An int in [0, 2^bits).
int64_t natural(const char* name, const py::object& object, int bits) {
  const std::string expected = std::string("fastdmd.normals: expected ") + name;
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(expected + " to be an int, got " + type_name(object) + " " + shown(object));
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow || value < 0 || value >> bits)
    throw py::value_error(expected + " in [0, 2^" + std::to_string(bits) + "), got " + shown(index));
  return value;
}

using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

Words words(const char* name, const char* shape, const py::object& object) {
  const std::string expected = std::string("fastdmd.philox: expected ") + name;
  if (!py::isinstance<py::array>(object))
    throw py::type_error(expected + " to be a numpy array, got " + type_name(object));
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (!array.dtype().equal(py::dtype::of<uint32_t>()))
    throw py::type_error(expected + " of dtype uint32, got " + std::string(py::str(array.dtype())));
  const bool shaped = std::string(shape) == "(2,)" ? array.ndim() == 1 && array.shape(0) == 2
                                                   : array.ndim() == 2 && array.shape(1) == 4;
  if (!shaped)
    throw py::value_error(expected + " of shape " + shape + ", got " + std::string(py::str(array.attr("shape"))));
  return Words(array);
}

// By the scalar formulas, word by word: an independent reading of what the kernels compute in vectors.
py::array_t<uint32_t> philox_words(const py::object& counter, const py::object& key) {
  const Words counters = words("counter", "(N, 4)", counter), keys = words("key", "(2,)", key);
  const py::ssize_t num_rows = counters.shape(0);
  py::array_t<uint32_t> result({num_rows, py::ssize_t(4)});
  const uint32_t *from = counters.data(), *with = keys.data();
  uint32_t* to = result.mutable_data();
  py::gil_scoped_release release;
  for (py::ssize_t row = 0; row < num_rows; ++row) {
    uint32_t x[4];
    std::memcpy(x, from + 4 * row, sizeof(x));
    philox(x[0], x[1], x[2], x[3], with[0], with[1]);
    std::memcpy(to + 4 * row, x, sizeof(x));
  }
  return result;
}

py::array_t<float> normals(const py::object& seed,
                           const py::object& size,
                           const py::object& stream,
                           const py::object& iteration,
                           const py::object& sample,
                           const py::object& first) {
  const RngKey key{
      .seed = uint64_t(natural("seed", seed, 63)),
      .stream = uint32_t(natural("stream", stream, 32)),
      .iteration = uint32_t(natural("iteration", iteration, 32)),
      .first_sample = uint32_t(natural("sample", sample, 32)),
  };
  const int64_t num = natural("size", size, 33), begin = natural("first", first, 33);
  py::array_t<float> result(num);
  float* out = result.mutable_data();
  py::gil_scoped_release release;
  kernels().normals(out, key, begin, begin + num);
  return result;
}

}  // namespace
}  // namespace fastdmd

PYBIND11_MODULE(_runtime, m) {
  using namespace fastdmd;
  py::options options;
  options.disable_function_signatures();
  m.doc() = "What the native libraries are and how they run, and the ops' random numbers for numpy. Needs no torch.";
  m.def("build_facts", &facts, R"(build_facts() -> dict

What the libraries were built with and from: `compiler`; `flags` of the kernels; `instruction_sets` that they have code
for, best first; `torch_abi`, the oldest torch that the ops work with; `cuda_architectures` of the CUDA library, in
CMake's names, empty if none was built; `commit`, None if unknown.)");
  m.def("instruction_set", &instruction_set, R"(instruction_set() -> str

The instruction set that the ops run with now.)");
  m.def("hold_back", &hold_back_to, "name"_a, R"(hold_back(name) -> str

Lets the ops of this process run with the best instruction set of this machine up to `name`, one of
`build_facts()["instruction_sets"]`; the first of them lifts every limit. Returns the one chosen. At the start,
ATEN_CPU_CAPABILITY=avx2 or default holds it back, as it does torch. Not to be called while an op runs.
Raises ValueError for other names.)");
  m.def("set_malloc",
        &set_malloc,
        py::kw_only(),
        "mmap_threshold"_a,
        "trim_threshold"_a,
        "top_pad"_a,
        R"(set_malloc(*, mmap_threshold, trim_threshold, top_pad) -> bool

Sets glibc's mallopt(3), in bytes; False, having done nothing, where there is another C library.)");
  m.def("philox", &philox_words, "counter"_a, "key"_a, R"(philox(counter, key) -> uint32 [N, 4]

Philox4x32-10 (Salmon et al. 2011), the words of `ops.philox`, of counters uint32 [N, 4] with one key, uint32 [2].
Raises TypeError or ValueError, naming what was expected and what came.)");
  m.def("normals",
        &normals,
        "seed"_a,
        "size"_a,
        py::kw_only(),
        "stream"_a = 0,
        "iteration"_a = 0,
        "sample"_a = 0,
        "first"_a = 0,
        R"(normals(seed, size, *, stream=0, iteration=0, sample=0, first=0) -> float32 [size]

The noise, bit for bit, of elements [first, first + size), in the order (C, H, W), of an image that `ops.add_noise`
draws on a CPU with `ops.rng_key(seed, stream=stream, iteration=iteration, first_sample=sample)`. Element i is normal
i mod 4 of the Philox counter (i div 4, sample, iteration, stream), a word each, and key = seed. Of two random words
a, b the normals are sqrt(-2 ln u) (cos(pi t), sin(pi t)), u = (a div 2 + 1/2) / 2^31, t = b as a signed number / 2^31
(Box and Muller 1958). Raises TypeError or ValueError, naming what was expected and what came.)");
}
