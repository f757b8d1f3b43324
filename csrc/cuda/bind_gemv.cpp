// Python name of the int8 product. thl_engine/device/cuda.py documents it.
#include <pybind11/pybind11.h>

#include <bit>
#include <limits>

#include "cuda/check.h"
#include "cuda/gemv_int8.h"
#include "bind/tensor_view.h"

namespace py = pybind11;

namespace {

using namespace thl::cuda;
using thl::bad_argument;
using thl::DType;
using thl::TensorView;

constexpr int kMostRows = 8;  // of activations

// Views of tensors that must all lie on the device of the first.
class Views {
public:
    TensorView operator()(py::handle object, const char* name) {
        const TensorView tensor = thl::view(object, name, thl::Memory::device);
        if (device_ < 0) device_ = tensor.device;
        if (tensor.device != device_)
            bad_argument(name, "device " + std::to_string(device_), "device " + std::to_string(tensor.device));
        return tensor;
    }
    int device() const { return device_; }

private:
    int device_ = -1;
};

Float float_type(const TensorView& tensor) {
    switch (tensor.dtype) {
        case DType::f32: return Float::f32;
        case DType::f16: return Float::f16;
        case DType::bf16: return Float::bf16;
        default: bad_argument(tensor.name, "float32, float16 or bfloat16", thl::dtype_name(tensor.dtype));
    }
}

int group_shift(int group) {
    if (group == 0) return -1;
    if (group < 16 || !std::has_single_bit(static_cast<unsigned>(group)))
        bad_argument("group", "a power of two from 16 on", std::to_string(group));
    return std::countr_zero(static_cast<unsigned>(group));
}

// rows [R, C], scales [R] or, by group, [R, ceil(C / group)].
Int8Rows int8_rows(const TensorView& rows, const TensorView& scales, int64_t count, int64_t columns, int group) {
    rows.with_dtype(DType::i8).with_shape({count, columns});
    scales.with_dtype(DType::f32);
    if (group == 0) scales.with_shape({count}).contiguous();
    else scales.with_shape({count, (columns + group - 1) / group});
    return {rows.as<int8_t>(), rows.stride[0], scales.as<float>(), scales.stride[0]};
}

Gate gate(const std::string& name) {
    if (name == "silu") return Gate::silu;
    if (name == "gelu_tanh") return Gate::gelu_tanh;
    bad_argument("activation", "silu or gelu_tanh", name);
}

void check_choice(const char* name, int value, std::initializer_list<int> choices) {
    std::string text;
    for (int choice : choices) {
        if (choice == value) return;
        text += (text.empty() ? "" : ", ") + std::to_string(choice);
    }
    bad_argument(name, "one of " + text, std::to_string(value));
}

void gemv(py::handle x_capsule, py::handle w_capsule, py::handle scales, py::handle out_capsule, py::handle bias,
          py::handle residual, py::handle up, py::handle up_scales, const std::string& activation, int group, int rows,
          int split, uintptr_t stream) {
    Views view;
    const TensorView x = view(x_capsule, "x").with_shape({-1, -1});
    const TensorView w = view(w_capsule, "w").with_shape({-1, x.shape[1]});
    const int64_t batch = x.shape[0], columns = x.shape[1], count = w.shape[0];
    if (batch > kMostRows) bad_argument("x", "at most 8 rows", std::to_string(batch));
    if (columns > std::numeric_limits<int>::max() / 2) bad_argument("x", "fewer columns", std::to_string(columns));

    GemvInt8 product;
    product.group_shift = group_shift(group);
    product.x = {x.data, float_type(x), x.stride[0]};
    product.w = int8_rows(w, view(scales, "scales"), count, columns, group);
    if (!up.is_none()) {
        product.up = int8_rows(view(up, "up"), view(up_scales, "up_scales"), count, columns, group);
        product.gate = gate(activation);
    }
    if (!bias.is_none())
        product.bias = view(bias, "bias").with_dtype(DType::f32).with_shape({count}).as<float>();
    if (!residual.is_none()) {
        const TensorView addend = view(residual, "residual").with_shape({batch, count});
        product.residual = {addend.data, float_type(addend), addend.stride[0]};
    }
    const TensorView out = view(out_capsule, "out").with_shape({batch, count}).writable();
    product.out = {out.data, float_type(out), out.stride[0]};
    product.batch = static_cast<int>(batch);
    product.rows = count;
    product.columns = static_cast<int>(columns);
    check_choice("rows", rows, {2, 4});
    check_choice("split", split, {1, 2, 4, 8});
    if (batch == 0 || count == 0) return;

    py::gil_scoped_release release;
    const OnDevice device(view.device());
    gemv_int8(product, {rows, split}, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_gemv(py::module_& module) { module.def("gemv_int8", &gemv); }
