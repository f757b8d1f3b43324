// Python names of the copy engine. thl_engine/paging/transfer.py documents them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "io/copy_engine.h"
#include "io/gds.h"

namespace py = pybind11;
using thl::CopyDevice;
using thl::CopyEngine;

namespace {

std::uint8_t* address(const py::object& tensor) {
    return reinterpret_cast<std::uint8_t*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
}

std::int64_t size(const py::object& tensor) { return tensor.attr("nbytes").cast<std::int64_t>(); }

// A device that another extension module has made.
std::shared_ptr<CopyDevice> unwrap(const py::capsule& capsule) {
    if (!PyCapsule_IsValid(capsule.ptr(), thl::kCopyDeviceCapsule)) {
        throw std::invalid_argument("this is no device of the same build; reinstall the package");
    }
    return *static_cast<std::shared_ptr<CopyDevice>*>(PyCapsule_GetPointer(capsule.ptr(), thl::kCopyDeviceCapsule));
}

std::unique_ptr<CopyEngine, thl::DeletedWhereMade> make_engine(thl::Reader& reader, std::shared_ptr<CopyDevice> device,
                                        const py::object& memory, const std::vector<std::int64_t>& places,
                                        std::int64_t slot_bytes, int slots, CopyDevice::Stream compute,
                                        const std::optional<std::string>& cufile,
                                        const std::vector<std::string>& files, std::int64_t kept_bytes) {
    std::uint8_t* const begin = address(memory);
    const std::int64_t nbytes = size(memory);
    py::gil_scoped_release release;
    std::unique_ptr<thl::DirectStorage> direct;
    if (cufile) {
        direct = std::make_unique<thl::DirectStorage>(*cufile, files, begin, static_cast<std::size_t>(nbytes));
    }
    return std::unique_ptr<CopyEngine, thl::DeletedWhereMade>(
        new CopyEngine(reader, std::move(device), begin, nbytes, places, slot_bytes, slots, compute, std::move(direct),
                       kept_bytes));
}

}  // namespace

void bind_copy(py::module_& m) {
    py::register_local_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const thl::DeviceError& error) {
            const py::object type = py::module_::import("thl_engine.errors").attr("DeviceError");
            PyErr_SetString(type.ptr(), error.what());
        } catch (const thl::DirectStorageError& error) {
            PyErr_SetString(PyExc_OSError, error.what());
        }
    });

    py::class_<CopyDevice, std::shared_ptr<CopyDevice>>(m, "CopyDevice").def(py::init(&unwrap), py::arg("capsule"));

    py::class_<CopyEngine, std::unique_ptr<CopyEngine, thl::DeletedWhereMade>>(m, "CopyEngine")
        .def(py::init(&make_engine), py::arg("reader"), py::arg("device"), py::arg("memory"), py::arg("places"),
             py::arg("slot_bytes"), py::arg("slots"), py::arg("compute"), py::arg("cufile") = py::none(),
             py::arg("files") = std::vector<std::string>(), py::arg("kept_bytes") = 0, py::keep_alive<1, 2>(),
             py::keep_alive<1, 4>())
        .def(
            "start",
            [](CopyEngine& engine, std::int64_t file, std::int64_t offset, std::int64_t nbytes,
               std::optional<std::uint32_t> crc, std::string label, std::int64_t place, std::int64_t home) {
                engine.start({file, offset, nbytes, crc, std::move(label), home}, place);
            },
            py::arg("file"), py::arg("offset"), py::arg("nbytes"), py::arg("crc").none(true), py::arg("label"),
            py::arg("place"), py::arg("home") = -1, py::call_guard<py::gil_scoped_release>())
        .def("finish", &CopyEngine::finish, py::arg("place"), py::arg("compute"),
             py::call_guard<py::gil_scoped_release>())
        .def("released", &CopyEngine::released, py::arg("place"), py::arg("compute"),
             py::call_guard<py::gil_scoped_release>())
        .def("close", &CopyEngine::close, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("bytes_copied", &CopyEngine::bytes_copied)
        .def_property_readonly("bytes_direct", &CopyEngine::bytes_direct);

    m.def(
        "copy_seconds",
        [](CopyDevice& device, const py::object& target, int slots, int copies) {
            std::uint8_t* const begin = address(target);
            const std::int64_t nbytes = size(target);
            py::gil_scoped_release release;
            return CopyEngine::copy_seconds(device, begin, nbytes, slots, copies);
        },
        py::arg("device"), py::arg("target"), py::arg("slots"), py::arg("copies"));
}
