// Python names of the memory budget on a device. thl_engine/device_memory.py uses them.
#include <pybind11/pybind11.h>

#include "arena.h"
#include "bind_budget.h"

namespace py = pybind11;

void bind_arena(py::module_& module) {
    using thl::cuda::arenas;
    module.def("open_arena", &thl::cuda::open_arena, py::arg("device"), py::arg("size"),
               py::call_guard<py::gil_scoped_release>());
    module.def("close_arena", [](std::int64_t number) { arenas().close(number); }, py::arg("number"),
               py::call_guard<py::gil_scoped_release>());
    module.def("enter_arena", [](std::int64_t number) { arenas().enter(number); }, py::arg("number"));
    module.def("leave_arena", [] { thl::BudgetArenas::leave(); });
    module.def("arena_counts", [](std::int64_t number) { return thl::counts_dict(arenas().counts(number)); },
               py::arg("number"));
}
