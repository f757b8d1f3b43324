// Python names of the state operations. thl_engine/ops/native.py documents them.
#include <pybind11/pybind11.h>

#include "cpu/state.h"
#include "bind/tensor_view.h"

namespace py = pybind11;

namespace {

using thl::DType;
using thl::floats;
using thl::TensorView;
using thl::view;

TensorView integers(py::handle capsule, const char* name, std::initializer_list<int64_t> shape) {
    return view(capsule, name).with_dtype(DType::i64).with_shape(shape).contiguous();
}

thl::Rows rows(const TensorView& tensor) { return {tensor.as<float>(), tensor.stride[0]}; }

thl::Slots slots(const TensorView& tensor) { return {tensor.as<float>(), tensor.stride[0], tensor.stride[1]}; }

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
        thl::bad_argument(name, std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
}

// Each entry names one of `count` slots.
void check_indices(const TensorView& indices, int64_t count) {
    const int64_t size = indices.shape[0] * indices.shape[1] * indices.shape[2];
    for (int64_t i = 0; i < size; ++i) check_range(indices.name, indices.as<int64_t>()[i], 0, count - 1);
}

void gru_reset(py::handle reset_capsule, py::handle state_capsule, py::handle out_capsule) {
    const TensorView reset = floats(reset_capsule, "reset", {-1, -1});
    const int64_t batch = reset.shape[0], d = reset.shape[1];
    const TensorView state = floats(state_capsule, "state", {batch, d});
    const TensorView out = floats(out_capsule, "out", {batch, d}).writable();
    py::gil_scoped_release release;
    thl::gru_reset(rows(reset), rows(state), batch, d, rows(out));
}

void gru_update(py::handle update_capsule, py::handle candidate_capsule, py::handle state_capsule) {
    const TensorView update = floats(update_capsule, "update", {-1, -1});
    const int64_t batch = update.shape[0], d = update.shape[1];
    const TensorView candidate = floats(candidate_capsule, "candidate", {batch, d});
    const TensorView state = floats(state_capsule, "state", {batch, d}).writable();
    py::gil_scoped_release release;
    thl::gru_update(rows(update), rows(candidate), batch, d, rows(state));
}

void layer_norm(py::handle x_capsule, py::handle weight_capsule, py::handle bias_capsule, float eps,
                py::handle out_capsule) {
    const TensorView x = view(x_capsule, "x").with_dtype(DType::f32).rows();
    const int64_t batch = x.shape[0], d = x.shape[1];
    const TensorView weight = floats(weight_capsule, "weight", {d});
    const TensorView bias = floats(bias_capsule, "bias", {d});
    const TensorView out = view(out_capsule, "out").with_dtype(DType::f32).rows().with_shape({batch, d}).writable();
    py::gil_scoped_release release;
    thl::layer_norm(rows(x), batch, d, weight.as<float>(), bias.as<float>(), eps, rows(out));
}

void window_mix(py::handle query_capsule, py::handle buffer_capsule, int64_t valid, float scale,
                py::handle out_capsule) {
    const TensorView query = floats(query_capsule, "query", {-1, -1});
    const int64_t batch = query.shape[0], d = query.shape[1];
    const TensorView buffer = floats(buffer_capsule, "buffer", {batch, -1, d});
    check_range("valid", valid, 0, buffer.shape[1]);
    const TensorView out = floats(out_capsule, "out", {batch, d}).writable();
    py::gil_scoped_release release;
    thl::window_mix(rows(query), slots(buffer), batch, valid, d, scale, rows(out));
}

void slot_scores(py::handle query_capsule, py::handle memory_capsule, py::handle read_ema_capsule, float scale,
                 float penalty, py::handle out_capsule) {
    const TensorView query = floats(query_capsule, "query", {-1, -1, -1});
    const int64_t batch = query.shape[0], heads = query.shape[1], d = query.shape[2];
    const TensorView memory = floats(memory_capsule, "memory", {batch, -1, d});
    const int64_t count = memory.shape[1];
    const TensorView read_ema = floats(read_ema_capsule, "read_ema", {batch, count}).contiguous();
    const TensorView out = floats(out_capsule, "out", {batch, heads, count}).contiguous();
    py::gil_scoped_release release;
    thl::slot_scores(slots(query), slots(memory), read_ema.as<float>(), batch, heads, count, d, scale, penalty,
                     out.as<float>());
}

void slot_topk(py::handle scores_capsule, int64_t capacity, py::handle indices_capsule, py::handle alpha_capsule) {
    const TensorView scores = floats(scores_capsule, "scores", {-1, -1, -1}).contiguous();
    const int64_t batch = scores.shape[0], heads = scores.shape[1], count = scores.shape[2];
    const TensorView indices = integers(indices_capsule, "indices", {batch, heads, -1});
    const int64_t k = indices.shape[2];
    check_range("k", k, 1, count);
    const TensorView alpha = floats(alpha_capsule, "alpha", {batch, heads, k}).contiguous();
    py::gil_scoped_release release;
    thl::slot_topk(scores.as<float>(), batch, heads, count, k, capacity, indices.as<int64_t>(), alpha.as<float>());
}

void slot_mix(py::handle alpha_capsule, py::handle indices_capsule, py::handle memory_capsule,
              py::handle out_capsule) {
    const TensorView indices = integers(indices_capsule, "indices", {-1, -1, -1});
    const int64_t batch = indices.shape[0], heads = indices.shape[1], k = indices.shape[2];
    const TensorView alpha = floats(alpha_capsule, "alpha", {batch, heads, k}).contiguous();
    const TensorView memory = floats(memory_capsule, "memory", {batch, -1, -1});
    const int64_t d = memory.shape[2];
    const TensorView out = floats(out_capsule, "out", {batch, heads, d}).writable();
    check_range("k", k, 1, memory.shape[1]);
    check_indices(indices, memory.shape[1]);
    py::gil_scoped_release release;
    thl::slot_mix(alpha.as<float>(), indices.as<int64_t>(), slots(memory), batch, heads, k, d, slots(out));
}

void read_metadata(py::handle alpha_capsule, py::handle indices_capsule, py::handle read_ema_capsule,
                   py::handle last_read_capsule, double decay, int64_t t) {
    const TensorView indices = integers(indices_capsule, "indices", {-1, -1, -1});
    const int64_t batch = indices.shape[0], entries = indices.shape[1] * indices.shape[2];
    const TensorView alpha =
        floats(alpha_capsule, "alpha", {batch, indices.shape[1], indices.shape[2]}).contiguous();
    const TensorView read_ema = floats(read_ema_capsule, "read_ema", {batch, -1}).contiguous();
    const int64_t count = read_ema.shape[1];
    const TensorView last_read = integers(last_read_capsule, "last_read", {batch, count});
    check_indices(indices, count);
    py::gil_scoped_release release;
    thl::read_metadata(alpha.as<float>(), indices.as<int64_t>(), batch, entries, count, decay, t,
                       read_ema.as<float>(), last_read.as<int64_t>());
}

void slot_norms(py::handle memory_capsule, py::handle out_capsule) {
    const TensorView memory = floats(memory_capsule, "memory", {-1, -1, -1});
    const int64_t batch = memory.shape[0], count = memory.shape[1];
    const TensorView out = floats(out_capsule, "out", {batch, count}).contiguous();
    py::gil_scoped_release release;
    thl::slot_norms(slots(memory), batch, count, memory.shape[2], out.as<float>());
}

void novelty_write(py::handle candidate_capsule, py::handle memory_capsule, py::handle norms_capsule,
                   py::handle read_ema_capsule, py::handle write_ema_capsule, py::handle last_write_capsule, int64_t t,
                   py::handle vector_capsule, py::handle gate_capsule, py::handle novelty_capsule,
                   py::handle branch_capsule, py::handle indices_capsule, double clip_max, double theta, double beta,
                   double decay, double ema_decay, double stale_weight, double underuse_weight) {
    const TensorView candidate = floats(candidate_capsule, "candidate", {-1, -1});
    const int64_t batch = candidate.shape[0], d = candidate.shape[1];
    const TensorView memory = floats(memory_capsule, "memory", {batch, -1, d}).writable();
    const int64_t count = memory.shape[1];
    const TensorView norms = floats(norms_capsule, "norms", {batch, count}).contiguous();
    const TensorView read_ema = floats(read_ema_capsule, "read_ema", {batch, count}).contiguous();
    const TensorView write_ema = floats(write_ema_capsule, "write_ema", {batch, count}).contiguous();
    const TensorView last_write = integers(last_write_capsule, "last_write", {batch, count});
    const TensorView vector = floats(vector_capsule, "vector", {batch, d}).writable();
    const TensorView gate = floats(gate_capsule, "gate", {batch});
    const TensorView novelty = floats(novelty_capsule, "novelty", {batch});
    const TensorView branch = integers(branch_capsule, "branch", {batch});
    const TensorView indices = integers(indices_capsule, "indices", {batch, -1});
    check_range("write slots", indices.shape[1], 1, count);
    py::gil_scoped_release release;
    thl::novelty_write({batch, count, d, indices.shape[1], t, rows(candidate), slots(memory), norms.as<float>(),
                        read_ema.as<float>(), write_ema.as<float>(), last_write.as<int64_t>(), rows(vector),
                        gate.as<float>(), novelty.as<float>(), branch.as<int64_t>(), indices.as<int64_t>()},
                       {clip_max, theta, beta, decay, ema_decay, stale_weight, underuse_weight});
}

}  // namespace

void bind_state(py::module_& m) {
    m.def("gru_reset", &gru_reset);
    m.def("gru_update", &gru_update);
    m.def("layer_norm", &layer_norm);
    m.def("window_mix", &window_mix);
    m.def("slot_scores", &slot_scores);
    m.def("slot_topk", &slot_topk);
    m.def("slot_mix", &slot_mix);
    m.def("read_metadata", &read_metadata);
    m.def("slot_norms", &slot_norms);
    m.def("novelty_write", &novelty_write);
}
