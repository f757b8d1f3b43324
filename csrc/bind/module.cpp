// Module table of thl_engine._native.
#include <pybind11/pybind11.h>

void bind_copy(pybind11::module_& module);
void bind_encoder(pybind11::module_& module);
void bind_io(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_state(pybind11::module_& module);
void bind_transformer(pybind11::module_& module);

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native CPU kernels and file reader of thl_engine.";
    bind_copy(module);
    bind_encoder(module);
    bind_io(module);
    bind_linear(module);
    bind_state(module);
    bind_transformer(module);
}
