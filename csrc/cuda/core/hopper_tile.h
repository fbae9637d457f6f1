// Tiles of half-precision numbers in Hopper's shared memory, as the tensor memory accelerator writes them and the tensor cores
// read them: plain numbers without an instruction, the same on the host, on the device, and in the tests' software Hopper.
//
// A tile has rows of 64 channels, 128 bytes, one after the other; channels beyond 64 are a tile of their own behind it. Within
// each 1024 bytes, 8 rows, the 16-byte units of a row are permuted: unit u of row r lies at u ^ (r % 8), so that neither the
// rows nor the columns of a tile meet in one bank ("128-byte swizzle"; PTX ISA, "Shared Memory Matrix Layout").
#pragma once
#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define MMK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMK_HOST_DEVICE inline
#endif

namespace mmk::hopper {

// Numbers of an operand of the tensor cores, both of two bytes; accumulators are float32.
struct Bfloat16 {};
struct Float16 {};

constexpr int kTileChannels = 64;
constexpr int kTileRowBytes = 128;
constexpr int kSwizzleBytes = 1024;  // after which the permutation repeats: what tiles are aligned to

// The 64 bits that name a matrix in shared memory to wgmma: where it begins and two distances, all in units of 16 bytes, and
// the swizzle in the top bits, 1 for that of 128 bytes. `stride` is the distance from 8 rows of memory to the next 8. `leading`
// counts only where a row of memory is a k and the instruction transposes: the distance from 64 columns to the next 64. Elsewhere
// it is not looked at, and 16 bytes by convention.
constexpr std::uint32_t kNoLeading = 16;

MMK_HOST_DEVICE std::uint64_t matrix_descriptor(std::uint32_t address, std::uint32_t leading, std::uint32_t stride) {
  return static_cast<std::uint64_t>(address >> 4 & 0x3fff) | static_cast<std::uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<std::uint64_t>(stride >> 4 & 0x3fff) << 32 | std::uint64_t{1} << 62;
}

// What a tensor map is made of: heads [batch, heads, length, channels] in memory, of which a box of 64 channels of some rows is
// loaded at a time. Dimensions go from the innermost outward, as the driver counts them.
struct HeadsBox {
  const void* data;
  std::uint64_t sizes[4];         // channels, rows, heads, batch
  std::uint64_t byte_strides[3];  // of rows, heads, batch
  std::uint32_t box[4];
};

// Strides are in elements. Of a dimension of one element the stride means nothing, and is replaced by one that the driver takes.
inline HeadsBox heads_box(const void* data, std::int64_t channels, std::int64_t length, std::int64_t heads, std::int64_t batch,
                          std::int64_t row_stride, std::int64_t head_stride, std::int64_t batch_stride, int rows) {
  const auto bytes = [&](std::int64_t size, std::int64_t stride) {
    return static_cast<std::uint64_t>(size > 1 ? 2 * stride : 2 * channels);
  };
  return {data,
          {static_cast<std::uint64_t>(channels), static_cast<std::uint64_t>(length), static_cast<std::uint64_t>(heads),
           static_cast<std::uint64_t>(batch)},
          {bytes(length, row_stride), bytes(heads, head_stride), bytes(batch, batch_stride)},
          {kTileChannels, static_cast<std::uint32_t>(rows), 1, 1}};
}

}  // namespace mmk::hopper
