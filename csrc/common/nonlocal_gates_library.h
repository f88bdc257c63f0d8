// nonlocal_attention: where PyTorch's own scaled_dot_product_attention runs the forward pass, because it is faster.
// Pure functions of shapes. The kernel that is meant is the library's flash attention; where the user switched that
// off, nothing is left to it.
//
// Training asks no other rule. Gradients are this library's whoever ran the forward pass: they need the inputs alone,
// so that nothing is kept, and per sample and head take 5 (or 7) products of N x M x D whichever forward pass ran. The
// library's own backward pass has 5 as well, and would need its result and a number per query kept from step to step.
#pragma once

#include "nonlocal_gates.h"

namespace rcu_ops {

// Measured on an Emerald Rapids processor (AVX-512, 2 threads, 1 to 64 samples, torch 2.13), time of the library's
// attention over that of the kernels here, heads of D = Dv:
//
//             keys    D = 64   128    256    512   1024
//     fp32      49      1.3    1.0    1.3    1.2    1.2
//              196      1.1    1.0    1.0    0.9    1.2
//              784      0.9           0.9           1.0
//             1568      0.75          0.9    0.9    0.95
//     bf16   49 to 1568  1.3 to 1.7 everywhere; with a mask fp32 0.95 to 1.3, bf16 1.1 to 1.6
//
// fp64 and fp16 were not measured and stay here.
inline constexpr int64_t library_keys = 768, library_keys_wide = 1536;  // heads up to 256 channels, and wider ones
inline constexpr int64_t library_queries = 128;  // with fewer, every key is read for few products, here and there

// nullptr: the library's attention is taken on the CPU.
inline const char* why_not_library_on_cpu(const Relation& r) {
  if (r.count) return "it has a softmax alone";
  if (r.dtype != DType::f32) return "it is slower in this dtype";
  if (r.mask) return "it is slower with a mask";
  if (r.D != r.E) return "it needs values as wide as keys";
  if (r.N < library_queries || r.M < (r.D <= 256 ? library_keys : library_keys_wide))
    return "it is slower for so few positions";
  return nullptr;
}

// The same on a GPU: the ground of flash attention, which reads keys and values once per 64 or 128 queries and keeps its
// results in registers, which it can for heads of up to 256 channels. The matrix-unit kernels here read keys once per 16
// or 32 queries, the plain ones multiply on the vector unit at a twentieth of the rate. Arithmetic: not measured.
//
// Wider heads are the memory-efficient attention's. Up to 256 keys the matrix-unit kernels here read every operand once;
// beyond, 16-bit data is on the vector unit here, where that one is probably faster. It is not taken unmeasured, nor
// before it is known to give dead queries zeros; the suite has the shape (784 keys, heads of 512) beside it.
inline const char* why_not_library_on_gpu(const Relation& r, int architecture) {
  if (r.count) return "it has a softmax alone";
  if (r.dtype != DType::bf16 && r.dtype != DType::f16) return "flash attention has 16-bit data alone";
  if (architecture < 80) return "flash attention needs sm_80";
  if (r.mask) return "flash attention has no masks";
  if (r.D != r.E) return "it needs values as wide as keys";
  if (r.D > 256)
    return "flash attention has heads of up to 256 channels, and the memory-efficient one was not measured";
  if (r.D % 8 || r.D == 0) return "flash attention has heads of 8 to 256 channels, in eights";
  if (r.N == 0 || r.M == 0 || r.B == 0) return "there is nothing to multiply";
  return nullptr;
}

}  // namespace rcu_ops
