// Module table of thl_engine._cuda.
#include <pybind11/pybind11.h>

void bind_arena(pybind11::module_& module);
void bind_copy(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_gemv(pybind11::module_& module);

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of thl_engine.";
    bind_arena(module);
    bind_copy(module);
    bind_device(module);
    bind_gemv(module);
}
