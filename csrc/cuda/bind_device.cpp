// Which devices there are.
#include <pybind11/pybind11.h>

#include "cuda/check.h"

namespace py = pybind11;
using thl::cuda::check;

namespace {

// Devices that can be used. Throws where the driver is missing or older than the runtime.
int device_count() {
    int count = 0, driver = 0;
    py::gil_scoped_release release;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    if (driver == 0) throw std::runtime_error("CUDA: there is no driver");
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return count;
}

}  // namespace

void bind_device(py::module_& module) { module.def("device_count", &device_count); }
