// Which devices there are.
#include <pybind11/pybind11.h>

#include "check.h"

namespace py = pybind11;

namespace {

// Devices that can be used. Throws where the driver is missing or older than the runtime.
int device_count() {
    int count = 0;
    py::gil_scoped_release release;
    thl::cuda::check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return count;
}

}  // namespace

void bind_device(py::module_& module) { module.def("device_count", &device_count); }
