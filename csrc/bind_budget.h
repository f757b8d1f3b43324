// An arena's counts as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

#include "budget_arena.h"

namespace thl {

inline pybind11::dict counts_dict(const BudgetArena::Counts& counts) {
    pybind11::dict out;
    out["size"] = counts.size;
    out["in_use"] = counts.in_use;
    out["peak"] = counts.peak;
    out["largest_gap"] = counts.largest_gap;
    out["allocations"] = counts.allocations;
    out["refusals"] = counts.refusals;
    out["last_refused"] = counts.last_refused;
    return out;
}

}  // namespace thl
