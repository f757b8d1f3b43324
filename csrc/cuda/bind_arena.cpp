// Python names of the memory budget on a device. thl_engine/device/device_memory.py uses them.
#include <pybind11/pybind11.h>

#include "cuda/arena.h"

namespace py = pybind11;

namespace {

py::dict arena_counts(std::int64_t number) {
    const thl::BudgetArena::Counts counts = thl::cuda::arenas().counts(number);
    py::dict out;
    out["size"] = counts.size;
    out["in_use"] = counts.in_use;
    out["peak"] = counts.peak;
    out["largest_gap"] = counts.largest_gap;
    out["allocations"] = counts.allocations;
    out["refusals"] = counts.refusals;
    out["last_refused"] = counts.last_refused;
    return out;
}

}  // namespace

void bind_arena(py::module_& module) {
    using thl::cuda::arenas;
    module.def("open_arena", &thl::cuda::open_arena, py::arg("device"), py::arg("size"),
               py::call_guard<py::gil_scoped_release>());
    module.def("close_arena", [](std::int64_t number) { arenas().close(number); }, py::arg("number"),
               py::call_guard<py::gil_scoped_release>());
    module.def("enter_arena", [](std::int64_t number) { arenas().enter(number); }, py::arg("number"));
    module.def("leave_arena", [] { thl::BudgetArenas::leave(); });
    module.def("arena_counts", &arena_counts, py::arg("number"));
}
