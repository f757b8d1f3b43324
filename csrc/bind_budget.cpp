// Python names of the budget's arenas, for tests: what they divide are addresses, with no memory behind them.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include "bind_budget.h"

namespace py = pybind11;

void bind_budget(py::module_& module) {
    using thl::BudgetArena;
    using thl::BudgetArenas;
    module.attr("BUDGET_ALIGNMENT") = thl::kBudgetAlignment;
    py::class_<BudgetArena>(module, "BudgetArena")
        .def(py::init<std::uintptr_t, std::size_t>(), py::arg("base"), py::arg("size"))
        .def("allocate", &BudgetArena::allocate, py::arg("nbytes"), py::call_guard<py::gil_scoped_release>())
        .def("release", &BudgetArena::release, py::arg("address"), py::call_guard<py::gil_scoped_release>())
        .def("counts", [](const BudgetArena& arena) { return thl::counts_dict(arena.counts()); });
    py::class_<BudgetArenas>(module, "BudgetArenas")
        .def(py::init<>())
        .def("open", &BudgetArenas::open, py::arg("device"), py::arg("base"), py::arg("size"), py::arg("give_back"))
        .def("close", &BudgetArenas::close, py::arg("number"))
        .def("enter", &BudgetArenas::enter, py::arg("number"))
        .def_static("leave", &BudgetArenas::leave)
        .def("allocate", &BudgetArenas::allocate, py::arg("nbytes"), py::arg("device"))
        .def("release", &BudgetArenas::release, py::arg("address"))
        .def("counts", [](const BudgetArenas& arenas, std::int64_t number) {
            return thl::counts_dict(arenas.counts(number));
        }, py::arg("number"))
        .def("count", &BudgetArenas::count);
}
