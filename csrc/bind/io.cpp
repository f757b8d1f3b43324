// Python names of the arena, the reader and the checksum, which thl_engine/paging/reader.py and
// thl_engine/checkpoint/checksum.py document.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <climits>

#include "io/arena.h"
#include "io/crc32c.h"
#include "io/reader.h"

namespace py = pybind11;

namespace {

// Numbers from a file may exceed int64: that is a wrong value (ValueError), not a wrong type.
std::int64_t to_int64(const py::int_& value, const char* name) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow) throw std::invalid_argument(std::string(name) + " does not fit 64 bits");
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    return number;
}

std::size_t to_size(const py::int_& value, const char* name) {
    const std::int64_t number = to_int64(value, name);
    if (number < 0) throw std::invalid_argument(std::string(name) + " is negative: " + std::to_string(number));
    return static_cast<std::size_t>(number);
}

// A contiguous view of any object with the buffer protocol, released with the GIL held.
class Bytes {
public:
    explicit Bytes(const py::handle& object) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE)) throw py::error_already_set();
    }
    ~Bytes() { PyBuffer_Release(&view_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    const void* data() const { return view_.buf; }
    std::size_t size() const { return static_cast<std::size_t>(view_.len); }

private:
    Py_buffer view_;
};

std::uint32_t crc32c(const py::object& buffer, std::uint32_t crc) {
    const Bytes bytes(buffer);
    py::gil_scoped_release release;
    return thl::crc32c(crc, bytes.data(), bytes.size());
}

py::bytearray read_now(thl::Reader& reader, std::int64_t file, const py::int_& offset, const py::int_& nbytes) {
    const std::int64_t start = to_int64(offset, "offset"), size = to_int64(nbytes, "nbytes");
    if (size < 0) throw std::invalid_argument("nbytes is negative: " + std::to_string(size));
    PyObject* made = PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
    if (!made) throw py::error_already_set();
    auto result = py::reinterpret_steal<py::bytearray>(made);
    auto* out = reinterpret_cast<std::uint8_t*>(PyByteArray_AS_STRING(made));
    py::gil_scoped_release release;
    reader.read_now(file, start, size, out);
    return result;
}

}  // namespace

void bind_io(py::module_& m) {
    py::register_local_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const thl::ReadError& error) {
            const py::object type = py::module_::import("thl_engine.errors").attr("CheckpointError");
            PyErr_SetString(type.ptr(), error.what());
        }
    });

    m.def("crc32c", &crc32c, py::arg("buffer"), py::arg("crc") = 0);

    py::class_<thl::Arena, std::shared_ptr<thl::Arena>>(m, "Arena", py::buffer_protocol())
        .def(py::init([](const py::int_& nbytes) {
                 return std::make_shared<thl::Arena>(to_size(nbytes, "nbytes"));
             }),
             py::arg("nbytes"))
        .def_property_readonly("nbytes", &thl::Arena::nbytes)
        .def_buffer([](thl::Arena& arena) {
            return py::buffer_info(arena.data(), static_cast<py::ssize_t>(arena.nbytes()), /*readonly=*/false);
        });

    py::class_<thl::Reader, std::unique_ptr<thl::Reader, thl::DeletedWhereMade>>(m, "Reader")
        .def(py::init<std::vector<std::string>, int, bool, std::int64_t>(), py::arg("paths"), py::arg("threads"),
             py::arg("direct"), py::arg("chunk_bytes"))
        .def(
            "submit",
            [](thl::Reader& reader, std::int64_t file, const py::int_& offset, const py::int_& nbytes,
               std::shared_ptr<thl::Arena> arena, const py::int_& arena_offset, std::optional<std::uint32_t> crc,
               std::string label) {
                return reader.submit(file, to_int64(offset, "offset"), to_int64(nbytes, "nbytes"), std::move(arena),
                                     to_int64(arena_offset, "arena_offset"), crc, std::move(label));
            },
            py::arg("file"), py::arg("offset"), py::arg("nbytes"), py::arg("arena").none(false),
            py::arg("arena_offset"), py::arg("crc") = py::none(), py::arg("label") = "")
        .def("wait", &thl::Reader::wait, py::arg("ticket"), py::call_guard<py::gil_scoped_release>())
        .def("done", &thl::Reader::done, py::arg("ticket"))
        .def("read_now", &read_now, py::arg("file"), py::arg("offset"), py::arg("nbytes"))
        .def_property_readonly("direct", &thl::Reader::direct)
        .def_property_readonly("refused", &thl::Reader::refused)
        .def_property_readonly("bytes_read", &thl::Reader::bytes_read)
        .def_property_readonly("inherited", &thl::Reader::inherited)
        .def("close", &thl::Reader::close, py::call_guard<py::gil_scoped_release>());
}
