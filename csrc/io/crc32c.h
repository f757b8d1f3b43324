// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78; RFC 3720 appendix B.4). crc32c("123456789") = 0xE3069283.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thl {

// Checksum of `nbytes` at `data`, continuing from `crc` (0 to begin): crc32c(crc32c(0, a), b) = checksum of a then b.
// Uses the SSE4.2 instruction where the processor has it, tables otherwise; equal results.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t nbytes);

// The table version, for processors without SSE4.2.
std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t nbytes);

// Checksum of a then b, from the checksum of each and the length of b.
std::uint32_t crc32c_combine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t nbytes_b);

}  // namespace thl
