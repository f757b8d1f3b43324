// Python names of the operations of HIM's encoder. thl_engine/ops/native.py documents them.
#include <pybind11/pybind11.h>

#include "cpu/encoder.h"
#include "cpu/transformer.h"
#include "bind/tensor_view.h"

namespace py = pybind11;

namespace {

using thl::DType;
using thl::floats;
using thl::TensorView;
using thl::view;

// float32 [batch, d] of a tensor of any rank; -1 accepts any number.
TensorView flat(py::handle capsule, const char* name, int64_t batch = -1, int64_t d = -1) {
    return view(capsule, name).with_dtype(DType::f32).rows().with_shape({batch, d});
}

thl::Rows rows(const TensorView& tensor) { return {tensor.as<float>(), tensor.stride[0]}; }

thl::Slots slots(const TensorView& tensor) { return {tensor.as<float>(), tensor.stride[0], tensor.stride[1]}; }

void add_layer_norm(py::handle x_capsule, py::handle add_capsule, py::handle weight_capsule, py::handle bias_capsule,
                    float eps, py::handle sum_capsule, py::handle out_capsule) {
    const TensorView x = flat(x_capsule, "x");
    const int64_t batch = x.shape[0], d = x.shape[1];
    const TensorView add = flat(add_capsule, "addend", batch, d);
    const float* weight = floats(weight_capsule, "weight", {d}).as<float>();
    const float* bias = floats(bias_capsule, "bias", {d}).as<float>();
    const TensorView sum = flat(sum_capsule, "sum", batch, d).writable();
    const TensorView out = flat(out_capsule, "out", batch, d).writable();
    py::gil_scoped_release release;
    thl::add_layer_norm(rows(x), rows(add), batch, d, weight, bias, eps, rows(sum), rows(out));
}

void add_blend(py::handle x_capsule, py::handle fast_capsule, py::handle slow_capsule, py::handle gate_capsule,
               py::handle out_capsule) {
    const TensorView x = flat(x_capsule, "x");
    const int64_t batch = x.shape[0], d = x.shape[1];
    const TensorView fast = flat(fast_capsule, "fast", batch, d), slow = flat(slow_capsule, "slow", batch, d);
    const float* gate = floats(gate_capsule, "gate", {d}).as<float>();
    const TensorView out = flat(out_capsule, "out", batch, d).writable();
    py::gil_scoped_release release;
    thl::add_blend(rows(x), rows(fast), rows(slow), gate, batch, d, rows(out));
}

void add_scaled(py::handle x_capsule, py::handle add_capsule, float scale, py::handle out_capsule) {
    const TensorView x = flat(x_capsule, "x");
    const int64_t batch = x.shape[0], d = x.shape[1];
    const TensorView add = flat(add_capsule, "addend", batch, d), out = flat(out_capsule, "out", batch, d).writable();
    py::gil_scoped_release release;
    thl::add_scaled(rows(x), rows(add), scale, batch, d, rows(out));
}

void erase_then_add(py::handle memory_capsule, py::handle erase_capsule, py::handle add_capsule, float eps,
                    py::handle out_capsule) {
    const TensorView erase = floats(erase_capsule, "erase", {-1, -1});
    const int64_t batch = erase.shape[0], d = erase.shape[1];
    const TensorView add = floats(add_capsule, "add", {batch, d});
    TensorView memory = floats(memory_capsule, "memory", {-1, -1, d});
    if (memory.shape[0] == 1) memory.stride[0] = 0;  // one memory for all sequences
    else memory.with_shape({batch, -1, d});
    const TensorView out = floats(out_capsule, "out", {batch, memory.shape[1], d}).writable();
    py::gil_scoped_release release;
    thl::erase_then_add(slots(memory), rows(erase), rows(add), batch, memory.shape[1], d, eps, slots(out));
}

void prefix_read(py::handle query_capsule, py::handle rows_capsule, float scale, py::handle out_capsule) {
    const TensorView query = floats(query_capsule, "query", {-1, -1, -1});
    const int64_t batch = query.shape[0], positions = query.shape[1], width = query.shape[2];
    TensorView memory = floats(rows_capsule, "rows", {-1, -1, -1});
    const int64_t slots = memory.shape[1];
    if (memory.shape[0] == 1) memory.stride[0] = 0;
    else memory.with_shape({batch, -1, -1});
    if (memory.shape[2] < width || slots < 1)
        thl::bad_argument("rows", "at least one row of " + std::to_string(width) + " features",
                          thl::shape_text(memory.shape, 3));
    const TensorView out = floats(out_capsule, "out", {batch, positions, width}).writable();
    const auto grid = [](const TensorView& x) { return thl::Grid{x.as<float>(), {x.stride[0], 0, x.stride[1]}}; };
    py::gil_scoped_release release;
    thl::attention({batch, 1, 1, positions, slots, width, grid(query), grid(memory), grid(memory), grid(out), nullptr,
                    {}, scale, nullptr, nullptr});
}

}  // namespace

void bind_encoder(py::module_& m) {
    m.def("add_layer_norm", &add_layer_norm);
    m.def("add_blend", &add_blend);
    m.def("add_scaled", &add_scaled);
    m.def("erase_then_add", &erase_then_add);
    m.def("prefix_read", &prefix_read);
}
