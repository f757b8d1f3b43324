// Python names of the linear maps and of the settings they run under. thl_engine/ops/native.py documents them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/linear.h"
#include "bind/tensor_view.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;

namespace {

using thl::DType;
using thl::TensorView;
using thl::view;

thl::Weight weight_type(const TensorView& w) {
    switch (w.dtype) {
        case DType::i8: return thl::Weight::i8;
        case DType::f32: return thl::Weight::f32;
        case DType::bf16: return thl::Weight::bf16;
        case DType::f16: return thl::Weight::f16;
        default: thl::bad_argument(w.name, "float32, bfloat16, float16 or int8", thl::dtype_name(w.dtype));
    }
}

struct Scales {
    const float* data;
    int64_t stride;
    bool grouped;
};

// [rows], or [rows, ceil(columns / 128)].
Scales check_scales(py::handle capsule, int64_t rows, int64_t columns) {
    const TensorView scales = view(capsule, "scales").with_dtype(DType::f32);
    if (scales.ndim != 2) return {scales.with_shape({rows}).as<float>(), 1, false};
    scales.with_shape({rows, (columns + thl::kGroup - 1) / thl::kGroup});
    return {scales.as<float>(), scales.stride[0], true};
}

const float* check_bias(py::handle bias, int64_t rows) {
    return bias.is_none() ? nullptr : view(bias, "bias").with_dtype(DType::f32).with_shape({rows}).as<float>();
}

std::shared_ptr<thl::PackedActivations> pack_activations(py::handle x_capsule, py::handle weight_capsule,
                                                         py::handle bias_capsule, float eps,
                                                         std::shared_ptr<thl::PackedActivations> into) {
    const TensorView x = view(x_capsule, "x").with_dtype(DType::f32).rows();
    thl::Norm norm;
    if (!weight_capsule.is_none())
        norm = {view(weight_capsule, "weight").with_dtype(DType::f32).with_shape({x.shape[1]}).as<float>(),
                view(bias_capsule, "bias").with_dtype(DType::f32).with_shape({x.shape[1]}).as<float>(), eps};
    if (!into) into = std::make_shared<thl::PackedActivations>();
    py::gil_scoped_release release;
    thl::pack_activations(x.as<float>(), x.stride[0], x.shape[0], x.shape[1], norm, *into);
    return into;
}

std::shared_ptr<thl::PackedActivations> pack_swiglu(py::handle gate_capsule, py::handle up_capsule,
                                                    std::shared_ptr<thl::PackedActivations> into) {
    const TensorView gate = view(gate_capsule, "gate").with_dtype(DType::f32).rows();
    const int64_t batch = gate.shape[0], columns = gate.shape[1];
    const TensorView up = view(up_capsule, "up").with_dtype(DType::f32).rows().with_shape({batch, columns});
    if (!into) into = std::make_shared<thl::PackedActivations>();
    py::gil_scoped_release release;
    thl::pack_swiglu(gate.as<float>(), gate.stride[0], up.as<float>(), up.stride[0], batch, columns, *into);
    return into;
}

// Where a product of `rows` rows of weights goes: columns from `start` on of `out`, which has these alone if that is
// negative. Bias and addend have the columns of `out`.
struct Target {
    float* out;
    int64_t stride;
    const float* bias;
    thl::Epilogue epilogue;
};

Target target(py::handle out_capsule, int64_t batch, int64_t rows, int64_t start, py::handle bias_capsule, bool gelu,
              py::handle addend_capsule) {
    const TensorView out =
        view(out_capsule, "out").with_dtype(DType::f32).rows().with_shape({batch, start < 0 ? rows : -1}).writable();
    const int64_t width = out.shape[1];
    if (start < 0) start = 0;
    if (rows > width - start)
        thl::bad_argument("out", "at least " + std::to_string(start + rows) + " columns", std::to_string(width));
    const float* bias = check_bias(bias_capsule, width);
    thl::Epilogue epilogue{gelu, nullptr, 0};
    if (!addend_capsule.is_none()) {
        const TensorView addend =
            view(addend_capsule, "addend").with_dtype(DType::f32).rows().with_shape({batch, width});
        epilogue.addend = addend.as<float>() + start;
        epilogue.addend_stride = addend.stride[0];
    }
    return {out.as<float>() + start, out.stride[0], bias ? bias + start : nullptr, epilogue};
}

void linear_int8(const thl::PackedActivations& packed, py::handle w_capsule, py::handle scales_capsule,
                 py::handle bias_capsule, py::handle out_capsule, int64_t start, bool gelu,
                 py::handle addend_capsule) {
    const TensorView w = view(w_capsule, "w").with_dtype(DType::i8).with_shape({-1, packed.columns});
    const int64_t rows = w.shape[0];
    const Scales scales = check_scales(scales_capsule, rows, packed.columns);
    const Target to = target(out_capsule, packed.batch, rows, start, bias_capsule, gelu, addend_capsule);
    py::gil_scoped_release release;
    thl::linear_int8({&packed, w.as<int8_t>(), w.stride[0], scales.data, scales.stride, scales.grouped, to.bias,
                      to.out, to.stride},
                     rows, to.epilogue);
}

void linear_float(py::handle x_capsule, py::handle w_capsule, py::handle bias_capsule, py::handle out_capsule,
                  int64_t start, bool gelu, py::handle addend_capsule) {
    const TensorView x = view(x_capsule, "x").with_dtype(DType::f32).rows();
    const TensorView w = view(w_capsule, "w").with_shape({-1, x.shape[1]});
    if (w.dtype == DType::i8) thl::bad_argument("w", "float32, bfloat16 or float16", "int8");
    const thl::Weight type = weight_type(w);
    const int64_t rows = w.shape[0];
    const Target to = target(out_capsule, x.shape[0], rows, start, bias_capsule, gelu, addend_capsule);
    py::gil_scoped_release release;
    thl::linear_float(type,
                      {x.as<float>(), x.stride[0], x.shape[0], x.shape[1], w.data, w.stride[0], to.bias, to.out,
                       to.stride},
                      rows, to.epilogue);
}

void multiply_int8(const thl::PackedActivations& packed, py::handle w_capsule, py::handle scales_capsule,
                   py::handle out_capsule, int64_t start) {
    const TensorView w = view(w_capsule, "w").with_dtype(DType::i8).with_shape({-1, packed.columns});
    const int64_t rows = w.shape[0];
    const Scales scales = check_scales(scales_capsule, rows, packed.columns);
    const Target to = target(out_capsule, packed.batch, rows, start, py::none(), false, py::none());
    py::gil_scoped_release release;
    thl::multiply_int8({&packed, w.as<int8_t>(), w.stride[0], scales.data, scales.stride, scales.grouped, nullptr,
                        to.out, to.stride},
                       rows);
}

void multiply_float(py::handle x_capsule, py::handle w_capsule, py::handle out_capsule, int64_t start) {
    const TensorView x = view(x_capsule, "x").with_dtype(DType::f32).rows();
    const TensorView w = view(w_capsule, "w").with_shape({-1, x.shape[1]});
    if (w.dtype == DType::i8) thl::bad_argument("w", "float32, bfloat16 or float16", "int8");
    const thl::Weight type = weight_type(w);
    const int64_t rows = w.shape[0];
    const Target to = target(out_capsule, x.shape[0], rows, start, py::none(), false, py::none());
    py::gil_scoped_release release;
    thl::multiply_float(type,
                        {x.as<float>(), x.stride[0], x.shape[0], x.shape[1], w.data, w.stride[0], nullptr, to.out,
                         to.stride},
                        rows);
}

// int8 weights with scales, or float weights with None.
void linear_transposed(py::handle x_capsule, py::handle w_capsule, py::handle scales_capsule, py::handle out_capsule,
                       bool accumulate) {
    const TensorView x = view(x_capsule, "x").with_dtype(DType::f32).with_shape({-1, -1});
    const TensorView w = view(w_capsule, "w").with_shape({x.shape[1], -1});
    const thl::Weight type = weight_type(w);
    if ((type == thl::Weight::i8) == scales_capsule.is_none())
        thl::bad_argument("scales", type == thl::Weight::i8 ? "a tensor with int8 weights" : "None with float weights",
                          scales_capsule.is_none() ? "None" : "a tensor");
    const int64_t rows = w.shape[0], columns = w.shape[1];
    const Scales scales = scales_capsule.is_none() ? Scales{nullptr, 0, false}
                                                   : check_scales(scales_capsule, rows, columns);
    const TensorView out = view(out_capsule, "out").with_dtype(DType::f32).with_shape({x.shape[0], columns}).writable();
    py::gil_scoped_release release;
    thl::linear_transposed(type,
                           {x.as<float>(), x.stride[0], x.shape[0], rows, w.data, w.stride[0], scales.data,
                            scales.stride, scales.grouped, out.as<float>(), out.stride[0], accumulate},
                           columns);
}

double memory_bandwidth(int64_t nbytes, int repeats) {
    if (nbytes < 4096) thl::bad_argument("nbytes", "at least 4096", std::to_string(nbytes));
    if (repeats < 1) thl::bad_argument("repeats", "at least 1", std::to_string(repeats));
    py::gil_scoped_release release;
    return thl::memory_bandwidth(nbytes, repeats);
}

double read_seconds(py::handle memory_capsule) {
    const TensorView memory = view(memory_capsule, "memory").with_dtype(DType::f32).with_shape({-1});
    py::gil_scoped_release release;
    return thl::read_seconds(memory.as<float>(), memory.shape[0]);
}

}  // namespace

void bind_linear(py::module_& m) {
    m.def("threads", [] { return thl::ThreadPool::instance().threads(); });
    m.def("set_threads", [](int count) { thl::ThreadPool::instance().set_threads(count); },
          py::call_guard<py::gil_scoped_release>());
    m.def("isa", [] { return thl::kernels().name; });
    m.def("available_isas", &thl::available_isas);
    m.def("set_isa", [](const std::string& name) { thl::set_isa(name.c_str()); });
    m.def("memory_bandwidth", &memory_bandwidth);
    m.def("read_seconds", &read_seconds);

    py::class_<thl::PackedActivations, std::shared_ptr<thl::PackedActivations>>(m, "PackedActivations");
    m.def("pack_activations", &pack_activations);
    m.def("pack_swiglu", &pack_swiglu);
    m.def("linear_int8", &linear_int8);
    m.def("linear_float", &linear_float);
    m.def("multiply_int8", &multiply_int8);
    m.def("multiply_float", &multiply_float);
    m.def("linear_transposed", &linear_transposed);
}
