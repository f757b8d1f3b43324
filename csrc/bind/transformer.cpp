// Python names of the operations of INL, HIM and HRM. thl_engine/ops/native.py documents them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/transformer.h"
#include "bind/tensor_view.h"

namespace py = pybind11;

namespace {

using thl::DType;
using thl::floats;
using thl::TensorView;
using thl::view;

TensorView rows(py::handle capsule, const char* name) { return view(capsule, name).with_dtype(DType::f32).rows(); }

// A vector of n floats, or null for None.
const float* optional(py::handle capsule, const char* name, int64_t n) {
    return capsule.is_none() ? nullptr : floats(capsule, name, {n}).as<float>();
}

thl::Grid grid(const TensorView& x) { return {x.as<float>(), {x.stride[0], x.stride[1], x.stride[2]}}; }

void rms_norm(py::handle x_capsule, py::handle add_capsule, py::handle weight_capsule, float eps,
              py::handle out_capsule) {
    const TensorView x = rows(x_capsule, "x");
    const int64_t batch = x.shape[0], d = x.shape[1];
    const TensorView add =
        add_capsule.is_none() ? TensorView{} : rows(add_capsule, "addend").with_shape({batch, d});
    const float* weight = optional(weight_capsule, "weight", d);
    const TensorView out = rows(out_capsule, "out").with_shape({batch, d}).writable();
    py::gil_scoped_release release;
    thl::rms_norm(x.as<float>(), x.stride[0], add.as<float>(), add.stride[0], batch, d, weight, eps, out.as<float>(),
                  out.stride[0]);
}

void rotate(py::handle x_capsule, py::handle cos_capsule, py::handle sin_capsule, py::handle out_capsule) {
    const TensorView x = floats(x_capsule, "x", {-1, -1, -1, -1});
    const int64_t rows = x.shape[2], d = x.shape[3];
    if (d % 2) thl::bad_argument("x", "an even last dimension", std::to_string(d));
    const TensorView cos = floats(cos_capsule, "cos", {rows, d}), sin = floats(sin_capsule, "sin", {rows, d});
    const TensorView out = floats(out_capsule, "out", {x.shape[0], x.shape[1], rows, d}).writable();
    py::gil_scoped_release release;
    thl::rotate(grid(x), {x.shape[0], x.shape[1], rows, d}, cos.as<float>(), cos.stride[0], sin.as<float>(),
                sin.stride[0], grid(out));
}

void swiglu(py::handle gate_capsule, py::handle up_capsule, py::handle out_capsule) {
    const TensorView gate = rows(gate_capsule, "gate");
    const int64_t batch = gate.shape[0], d = gate.shape[1];
    const TensorView up = rows(up_capsule, "up").with_shape({batch, d});
    const TensorView out = rows(out_capsule, "out").with_shape({batch, d}).writable();
    py::gil_scoped_release release;
    thl::swiglu(gate.as<float>(), gate.stride[0], up.as<float>(), up.stride[0], batch, d, out.as<float>(),
                out.stride[0]);
}

void gelu(py::handle x_capsule, py::handle out_capsule) {
    const TensorView x = rows(x_capsule, "x");
    const int64_t batch = x.shape[0], d = x.shape[1];
    const TensorView out = rows(out_capsule, "out").with_shape({batch, d}).writable();
    py::gil_scoped_release release;
    thl::gelu(x.as<float>(), x.stride[0], batch, d, out.as<float>(), out.stride[0]);
}

void geglu(py::handle gate_capsule, py::handle up_capsule, std::optional<float> quantile, py::handle out_capsule) {
    const TensorView gate = rows(gate_capsule, "gate");
    const int64_t batch = gate.shape[0], d = gate.shape[1];
    const TensorView up = rows(up_capsule, "up").with_shape({batch, d});
    const TensorView out = rows(out_capsule, "out").with_shape({batch, d}).writable();
    py::gil_scoped_release release;
    thl::geglu(gate.as<float>(), gate.stride[0], up.as<float>(), up.stride[0], batch, d,
               quantile ? &*quantile : nullptr, out.as<float>(), out.stride[0]);
}

void attention(py::handle query_capsule, py::handle key_capsule, py::handle value_capsule, float scale,
               py::handle blocked_capsule, py::handle out_capsule) {
    const TensorView query = floats(query_capsule, "query", {-1, -1, -1, -1});
    const int64_t batch = query.shape[0], heads = query.shape[1], rows = query.shape[2], d = query.shape[3];
    const TensorView key = floats(key_capsule, "key", {batch, -1, -1, d});
    const int64_t key_heads = key.shape[1], keys = key.shape[2];
    const TensorView value = floats(value_capsule, "value", {batch, key_heads, keys, d});
    if (key_heads < 1 || heads % key_heads)
        thl::bad_argument("key", "a number of heads that divides " + std::to_string(heads), std::to_string(key_heads));
    if (keys < 1) thl::bad_argument("key", "at least one position", "none");
    TensorView blocked;
    if (!blocked_capsule.is_none())
        blocked = view(blocked_capsule, "blocked").with_dtype(DType::u8).with_shape({batch, heads, rows, keys});
    const TensorView out = floats(out_capsule, "out", {batch, heads, rows, d});
    py::gil_scoped_release release;
    thl::attention({batch, heads, key_heads, rows, keys, d, grid(query), grid(key), grid(value), grid(out),
                    blocked.as<uint8_t>(), {blocked.stride[0], blocked.stride[1], blocked.stride[2]}, scale, nullptr,
                    nullptr});
}

void rotary_attention(py::handle joined_capsule, int64_t heads, py::handle cos_capsule, py::handle sin_capsule,
                      float scale, py::handle out_capsule) {
    const TensorView joined = floats(joined_capsule, "joined", {-1, -1, -1});
    const int64_t batch = joined.shape[0], rows = joined.shape[1], width = joined.shape[2] / 3;
    if (heads < 1 || joined.shape[2] % (6 * heads))
        thl::bad_argument("joined", "queries, keys and values of " + std::to_string(heads) + " heads of even width",
                          std::to_string(joined.shape[2]) + " features");
    const int64_t d = width / heads;
    const float* cos = floats(cos_capsule, "cos", {rows, d}).contiguous().as<float>();
    const float* sin = floats(sin_capsule, "sin", {rows, d}).contiguous().as<float>();
    const TensorView out = floats(out_capsule, "out", {batch, rows, width}).writable();
    const auto heads_of = [d](const TensorView& x, int64_t from) {
        return thl::Grid{x.as<float>() + from, {x.stride[0], d, x.stride[1]}};
    };
    py::gil_scoped_release release;
    thl::attention({batch, heads, heads, rows, rows, d, heads_of(joined, 0), heads_of(joined, width),
                    heads_of(joined, 2 * width), heads_of(out, 0), nullptr, {}, scale, cos, sin});
}

// Rows from `start` on of a kept matrix of `rows` rows: float32 with None for scales, or int8 with a scale for each row.
void keep(thl::KeptMatrix& kept, int64_t rows, int64_t start, py::handle w_capsule, py::handle scales_capsule) {
    const DType type = scales_capsule.is_none() ? DType::f32 : DType::i8;
    const TensorView w = view(w_capsule, "w").with_dtype(type).with_shape({-1, -1});
    const int64_t count = w.shape[0];
    const float* scales = optional(scales_capsule, "scales", count);
    if (start < 0 || count > rows - start)
        thl::bad_argument("w", "rows within " + std::to_string(rows),
                          std::to_string(start) + " to " + std::to_string(start + count));
    if (start > 0 && (kept.rows != rows || kept.columns != w.shape[1] || kept.int8 != (type == DType::i8)))
        thl::bad_argument("w", "more rows of the same matrix", "those of another");
    py::gil_scoped_release release;
    kept.take(rows, w.shape[1], start, count, w.data, w.stride[0], scales);
}

int64_t integrate(py::handle x_capsule, py::handle norm_weight_capsule, py::handle norm_bias_capsule, float norm_eps,
                  py::handle context_capsule, const thl::KeptMatrix& first,
                  py::handle first_bias_capsule, const thl::KeptMatrix& second, py::handle second_bias_capsule,
                  py::handle mu_capsule, int64_t group, int64_t steps, int64_t first_check, float threshold,
                  bool together, py::handle values_capsule, py::handle iterations_capsule) {
    const TensorView x = view(x_capsule, "x").with_dtype(DType::f32).rows();
    const int64_t rows = x.shape[0], d = x.shape[1], hidden = first.rows;
    const float* norm_weight = optional(norm_weight_capsule, "norm weight", d);
    const float* norm_bias = norm_weight ? floats(norm_bias_capsule, "norm bias", {d}).as<float>() : nullptr;
    const TensorView context = view(context_capsule, "context").with_dtype(DType::f32).rows().with_shape({rows, d});
    if (first.transposed || first.columns != 3 * d)
        thl::bad_argument("first", std::to_string(3 * d) + " columns", std::to_string(first.columns));
    if (!second.transposed || second.rows != 3 * d || second.columns != hidden)
        thl::bad_argument("second", "transposed, " + std::to_string(3 * d) + " rows of " + std::to_string(hidden),
                          std::to_string(second.rows) + " rows of " + std::to_string(second.columns));
    if (group < 1) thl::bad_argument("group", "at least 1", std::to_string(group));
    const float* first_bias = floats(first_bias_capsule, "first bias", {hidden}).as<float>();
    const float* second_bias = floats(second_bias_capsule, "second bias", {3 * d}).as<float>();
    const float* mu = floats(mu_capsule, "mu", {d > 0 ? (d - 1) / group + 1 : 0}).as<float>();
    const TensorView values = floats(values_capsule, "values", {rows, 2 * d}).contiguous();
    const TensorView iterations =
        view(iterations_capsule, "iterations").with_dtype(DType::i64).with_shape({rows}).contiguous();
    py::gil_scoped_release release;
    std::vector<float> centres(d);
    for (int64_t i = 0; i < d; ++i) centres[i] = mu[i / group];
    return thl::integrate({rows, steps, first_check, threshold, together, x.as<float>(), x.stride[0],
                           norm_weight, norm_bias, norm_eps, context.as<float>(), context.stride[0], values.as<float>(),
                           iterations.as<int64_t>()},
                          {first.data.data(), first.scale(), 3 * d, second.data.data(), second.scale(), first_bias,
                           second_bias, centres.data(), hidden, d});
}

}  // namespace

void bind_transformer(py::module_& m) {
    m.def("rms_norm", &rms_norm);
    m.def("rotate", &rotate);
    m.def("swiglu", &swiglu);
    m.def("gelu", &gelu);
    m.def("geglu", &geglu);
    m.def("attention", &attention);
    m.def("rotary_attention", &rotary_attention);
    py::class_<thl::KeptMatrix>(m, "KeptMatrix").def(py::init<bool>());
    m.def("keep", &keep);
    m.def("integrate", &integrate);
}
