// THL_TARGET("avx2,...") compiles what follows it in a file for that instruction set. It comes after the headers, so
// that no inline function of the standard library is compiled for a processor that others may not have, and holds to
// the end of the file, where templates are instantiated: the standard library's too, which is why none of them are used
// there (see kernels.inl).
#pragma once

#define THL_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define THL_TARGET(isa) THL_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define THL_TARGET_END THL_PRAGMA(clang attribute pop)
#else
#define THL_TARGET(isa) THL_PRAGMA(GCC target(isa))
#define THL_TARGET_END
#endif
