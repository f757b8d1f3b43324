// A tensor that crossed the Python boundary as a DLPack capsule: pointer, type, shape, strides.
//
// The capsule is borrowed, not consumed: the caller keeps it alive for the call, and may keep it for many.
// Every check throws std::invalid_argument (ValueError in Python) that names the argument, what was expected
// and what was found. DLPack: https://dmlc.github.io/dlpack/latest/c_api.html (structs of ABI version 0.x,
// which torch.utils.dlpack.to_dlpack produces).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace thl {

namespace dlpack {

struct Device {
    int32_t type;  // 1 = CPU, 2 = CUDA, 3 = pinned host memory of CUDA
    int32_t id;
};

struct DataType {
    uint8_t code;  // 0 = int, 1 = unsigned, 2 = float, 4 = bfloat
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements; null means contiguous
    uint64_t byte_offset;
};

}  // namespace dlpack

enum class Memory { host, device };

enum class DType { f32, bf16, f16, i8, u8, i64, other };

inline const char* dtype_name(DType type) {
    switch (type) {
        case DType::f32: return "float32";
        case DType::bf16: return "bfloat16";
        case DType::f16: return "float16";
        case DType::i8: return "int8";
        case DType::u8: return "uint8";
        case DType::i64: return "int64";
        default: return "another type";
    }
}

[[noreturn]] inline void bad_argument(const char* name, const std::string& expected, const std::string& found) {
    throw std::invalid_argument(std::string(name) + ": expected " + expected + ", found " + found);
}

inline std::string shape_text(const int64_t* shape, int ndim) {
    std::string text = "[";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

struct TensorView {
    static constexpr int kMaxDims = 4;
    const char* name = "";
    void* data = nullptr;
    DType dtype = DType::other;
    int device = 0;  // of CUDA, where that is where the memory lies
    int ndim = 0;
    int64_t shape[kMaxDims] = {};
    int64_t stride[kMaxDims] = {};  // in elements

    template <typename T>
    T* as() const { return static_cast<T*>(data); }

    // Sizes are checked one by one; -1 accepts any.
    const TensorView& with_shape(std::initializer_list<int64_t> expected) const {
        bool same = static_cast<int>(expected.size()) == ndim;
        int i = 0;
        if (same)
            for (int64_t size : expected) same &= size < 0 || size == shape[i], ++i;
        if (!same) {
            std::string text = "[";
            for (const int64_t* size = expected.begin(); size != expected.end(); ++size)
                text += (size == expected.begin() ? "" : ", ") + (*size < 0 ? "any" : std::to_string(*size));
            bad_argument(name, "shape " + text + "]", shape_text(shape, ndim));
        }
        return *this;
    }

    const TensorView& with_dtype(DType expected) const {
        if (dtype != expected) bad_argument(name, dtype_name(expected), dtype_name(dtype));
        return *this;
    }

    const TensorView& contiguous() const {
        int64_t expected = 1;
        for (int i = ndim - 1; i >= 0 && expected > 0; --i) {
            if (shape[i] > 1 && stride[i] != expected)
                bad_argument(name, "a contiguous tensor", "strides " + shape_text(stride, ndim));
            expected *= shape[i];
        }
        return *this;
    }

    // The same memory as [rows, last dimension]: the leading dimensions, which must lie evenly, become one.
    TensorView rows() const {
        if (ndim < 1) bad_argument(name, "at least 1 dimension", "none");
        TensorView flat = *this;
        flat.ndim = 2;
        flat.shape[0] = 1;
        flat.shape[1] = flat.stride[0] = shape[ndim - 1];
        flat.stride[1] = 1;
        for (int i = ndim - 2; i >= 0; --i) {
            if (shape[i] != 1) {
                if (flat.shape[0] == 1) flat.stride[0] = stride[i];
                else if (stride[i] != flat.shape[0] * flat.stride[0])
                    bad_argument(name, "rows at even distances", "strides " + shape_text(stride, ndim));
            }
            flat.shape[0] *= shape[i];
        }
        return flat;
    }

    // No two elements may share memory, or threads would race: each stride spans everything inside it.
    const TensorView& writable() const {
        int64_t span = 1;
        for (int i = ndim - 1; i >= 0; --i) {
            if (shape[i] > 1 && stride[i] < span)
                bad_argument(name, "a tensor whose elements do not overlap", "strides " + shape_text(stride, ndim));
            if (shape[i] > 1) span = stride[i] * (shape[i] - 1) + span;
        }
        return *this;
    }
};

// Reads a capsule. The last dimension must be contiguous; outer strides are free.
inline TensorView view(pybind11::handle object, const char* name, Memory memory = Memory::host) {
    if (!PyCapsule_IsValid(object.ptr(), "dltensor"))
        bad_argument(name, "a DLPack capsule (torch.utils.dlpack.to_dlpack)", Py_TYPE(object.ptr())->tp_name);
    const auto* tensor = static_cast<const dlpack::Tensor*>(PyCapsule_GetPointer(object.ptr(), "dltensor"));
    const int32_t place = tensor->device.type;
    if (memory == Memory::host ? place != 1 && place != 3 : place != 2)
        bad_argument(name, memory == Memory::host ? "a tensor in host memory" : "a tensor on a CUDA device",
                     "DLPack device type " + std::to_string(place));
    if (tensor->ndim < 0 || tensor->ndim > TensorView::kMaxDims)
        bad_argument(name, "at most 4 dimensions", std::to_string(tensor->ndim));

    TensorView result;
    result.name = name;
    result.device = tensor->device.id;
    result.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
    const dlpack::DataType type = tensor->dtype;
    if (type.lanes == 1) {
        if (type.code == 2 && type.bits == 32) result.dtype = DType::f32;
        if (type.code == 2 && type.bits == 16) result.dtype = DType::f16;
        if (type.code == 4 && type.bits == 16) result.dtype = DType::bf16;
        if (type.code == 0 && type.bits == 8) result.dtype = DType::i8;
        if (type.code == 1 && type.bits == 8) result.dtype = DType::u8;
        if (type.code == 0 && type.bits == 64) result.dtype = DType::i64;
    }
    result.ndim = tensor->ndim;
    int64_t contiguous = 1;
    for (int i = tensor->ndim - 1; i >= 0; --i) {
        result.shape[i] = tensor->shape[i];
        result.stride[i] = tensor->strides ? tensor->strides[i] : contiguous;
        contiguous *= tensor->shape[i];
    }
    const int last = result.ndim - 1;
    if (last >= 0 && result.shape[last] > 1 && result.stride[last] != 1)
        bad_argument(name, "a contiguous last dimension", "strides " + shape_text(result.stride, result.ndim));
    return result;
}

inline TensorView floats(pybind11::handle object, const char* name, std::initializer_list<int64_t> shape) {
    return view(object, name).with_dtype(DType::f32).with_shape(shape);
}

}  // namespace thl
