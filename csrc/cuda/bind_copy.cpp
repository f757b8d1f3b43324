// The copy engine's device, for the engine in thl_engine._native.
#include <pybind11/pybind11.h>

#include "cuda/copy_device.h"

namespace py = pybind11;

namespace {

using Shared = std::shared_ptr<thl::CopyDevice>;

py::capsule copy_device(int index) {
    auto device = std::make_unique<Shared>();
    {
        py::gil_scoped_release release;
        *device = thl::cuda::copy_device(index);
    }
    py::capsule capsule(device.get(), thl::kCopyDeviceCapsule, [](PyObject* object) {
        delete static_cast<Shared*>(PyCapsule_GetPointer(object, thl::kCopyDeviceCapsule));
    });
    device.release();
    return capsule;
}

}  // namespace

void bind_copy(py::module_& module) {
    py::register_local_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const thl::DeviceError& error) {
            const py::object type = py::module_::import("thl_engine.errors").attr("DeviceError");
            PyErr_SetString(type.ptr(), error.what());
        }
    });
    module.def("copy_device", &copy_device, py::arg("index"));
}
