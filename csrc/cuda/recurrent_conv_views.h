// How recurrent_conv's kernels address the tensors of a Scan.
#pragma once

#include <cstdint>

#include "common/recurrent_conv_index.h"
#include "cuda/device/async_copy.h"
#include "cuda/device/convert.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// Number `i` of a state tensor that may have the arithmetic's type S or that of the data, T.
template <typename T, typename S>
__device__ __forceinline__ S load_state(const View& v, int64_t i, DType dtype) {
  return v.dtype == dtype ? widen(static_cast<const T*>(v.data)[i]) : static_cast<const S*>(v.data)[i];
}
template <typename T, typename S>
__device__ __forceinline__ void store_state(const View& v, int64_t i, DType dtype, S value) {
  if (v.dtype == dtype)
    static_cast<T*>(v.data)[i] = narrow<T>(value);
  else
    static_cast<S*>(v.data)[i] = value;
}

// value + diagonal * (h - rounded): of a state that is rounded for the product what the product leaves out, which the
// weight of the channel's own past multiplies. Nothing where the state is infinite or NaN: there the rounded one already
// says all. One rounding, in every kernel: a stream of single frames has the bits of a scan.
__device__ __forceinline__ float with_rest(float value, float diagonal, float h, float rounded) {
  const float rest = h - rounded;
  return fma(diagonal, fabsf(rest) < INFINITY ? rest : 0.0f, value);
}

// NormPass::gradient of channel c, from the tables that a block keeps in shared memory.
struct NormTables {
  const float *scale, *shift, *mean, *slope, *constant;
};
__device__ __forceinline__ float norm_gradient(float dz, float h, float mean, float scale, float shift, float slope,
                                               float constant, bool relu) {
  const float deviation = h - mean;
  const float passed = relu && fma(deviation, scale, shift) <= 0 ? 0.0f : dz;
  return fma(scale, passed, fma(slope, deviation, constant));
}
__device__ __forceinline__ float norm_gradient(const NormTables& tables, int c, float dz, float h, bool relu) {
  return norm_gradient(dz, h, tables.mean[c], tables.scale[c], tables.shift[c], tables.slope[c], tables.constant[c],
                       relu);
}
// Of channels c and c + 1, c even.
__device__ __forceinline__ float2 norm_gradient(const NormTables& tables, int c, float2 dz, float2 h, bool relu) {
  const auto pair = [&](const float* table) { return *reinterpret_cast<const float2*>(table + c); };
  const float2 mean = pair(tables.mean), scale = pair(tables.scale), shift = pair(tables.shift);
  const float2 slope = pair(tables.slope), constant = pair(tables.constant);
  return {norm_gradient(dz.x, h.x, mean.x, scale.x, shift.x, slope.x, constant.x, relu),
          norm_gradient(dz.y, h.y, mean.y, scale.y, shift.y, slope.y, constant.y, relu)};
}

// Fills them for channel c; all zero from C on.
__device__ __forceinline__ void fill_norm_tables(const ScanNorm& norm, int C, int c, float* scale, float* shift,
                                                 float* mean, float* slope, float* constant) {
  scale[c] = shift[c] = mean[c] = slope[c] = constant[c] = 0;
  if (c >= C) return;
  const float count = norm.moments[2 * C + c] > 1 ? norm.moments[2 * C + c] : 1.0f;
  const float inverse = 1.0f / sqrt(norm.moments[C + c] / count + norm.eps);
  mean[c] = norm.moments[c];
  scale[c] = norm.gamma ? inverse * norm.gamma[c] : inverse;
  shift[c] = norm.beta ? norm.beta[c] : 0.0f;
  slope[c] = -scale[c] * inverse * norm.sums[C + c] / count;
  constant[c] = -scale[c] * norm.sums[c] / count;
}

// Statistics of y in shared memory, one of each per channel: deviations from the first frame's mean, so that a large
// mean costs the variance nothing. A frame's are added up in fp32, the frames' in fp64.
struct Statistics {
  double *sum, *squares;
  float* center;
};
__device__ __forceinline__ Statistics statistics_at(float* memory, int channels) {
  double* sums = reinterpret_cast<double*>(memory);
  return {sums, sums + channels, memory + 4 * channels};
}

// One frame more of channel c, which the caller owns: for_values(take) calls take(value) for its `columns` values.
template <typename ForValues>
__device__ __forceinline__ void add_statistics(const Statistics& to, int c, int columns, bool first,
                                               ForValues for_values) {
  float center = first ? 0.0f : to.center[c];
  // Twice over the first frame: its mean comes first.
  for (bool centered = !first;; centered = true) {
    float sum = 0, squares = 0;
    for_values([&](float value) {
      const float deviation = value - center;
      sum += deviation;
      squares = fma(deviation, deviation, squares);
    });
    if (centered) {
      to.sum[c] = (first ? 0 : to.sum[c]) + static_cast<double>(sum);
      to.squares[c] = (first ? 0 : to.squares[c]) + static_cast<double>(squares);
      return;
    }
    to.center[c] = center = sum / static_cast<float>(columns);
  }
}

// The same of y in a slot, whose rows are columns (along_channels) or channels.
__device__ __forceinline__ void add_statistics(const Statistics& to, bool bf16, const unsigned char* slot,
                                               bool along_channels, int pitch, int c, int columns, bool first) {
  add_statistics(to, c, columns, first, [&](auto take) {
    if (along_channels) {
#pragma unroll 4
      for (int j = 0; j < columns; ++j) take(widen(*reinterpret_cast<const uint16_t*>(slot + j * pitch + 2 * c), bf16));
    } else {
#pragma unroll 1
      for (int j = 0; j < columns; j += 8) {
        const uint4 word = *reinterpret_cast<const uint4*>(slot + c * pitch + 2 * j);
        const uint32_t pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float2 both = unpack(pairs[k / 2], bf16);
          if (j + k < columns) take(k % 2 ? both.y : both.x);
        }
      }
    }
  });
}

// Of all frames: the part's mean and squared deviations, to partial[c][part].
__device__ __forceinline__ void store_statistics(const Statistics& from, double* partial, int64_t parts, int64_t part,
                                                 int c, int64_t count) {
  double* to = partial + (c * parts + part) * 2;
  const double apart = from.sum[c] / static_cast<double>(count);
  to[0] = static_cast<double>(from.center[c]) + apart;
  to[1] = from.squares[c] - from.sum[c] * apart;
}

// Copies a word of 8, 4, 2 or 1 numbers into a slot, through a register only where it is too short for an asynchronous
// copy.
template <typename T>
__device__ __forceinline__ void copy_word(int numbers, unsigned char* slot, const T* from) {
  if (numbers == 8)
    async_copy<16>(slot, from);
  else if (numbers == 4)
    async_copy<8>(slot, from);
  else if (numbers == 2)
    async_copy<4>(slot, from);
  else
    *reinterpret_cast<T*>(slot) = *from;
}

// Copies a word out of a slot.
template <typename T>
__device__ __forceinline__ void store_word(int numbers, T* to, const unsigned char* slot) {
  if (numbers == 8)
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(slot);
  else if (numbers == 4)
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(slot);
  else if (numbers == 2)
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(slot);
  else
    *to = *reinterpret_cast<const T*>(slot);
}

}  // namespace rcu_ops::cuda
