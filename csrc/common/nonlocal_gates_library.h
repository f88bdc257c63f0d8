// nonlocal_attention: where PyTorch's own scaled_dot_product_attention runs the forward pass, because it is faster; on a
// GPU also where its batched products do. Pure functions of shapes. The kernel that is meant is the library's flash
// attention, and for wide heads on a GPU its memory-efficient one; where the user switched that off, nothing is left to
// it.
//
// On the CPU training asks no other rule. Gradients are this library's whoever ran the forward pass: they need the inputs alone,
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

// ---- on a GPU -------------------------------------------------------------------------------------------------------

// Measured on an H200 (benchmarks/results/nvidia-h200/), microseconds under a CUDA graph with a cold cache, four
// relations per sample; eager: the library's batched product, softmax and batched product.
//
//                                      bf16                              fp32
//     B   P    D      kernels here   attention   eager     kernels here   attention   eager
//     1   49   1024       41            22         36          163            59        44
//     24  49   1024       95            31         64          266            94        79
//     1   196  512        44            28         22          275            74        37
//
// and alone, without their launches, the kernels here: 24, 196, 512: 768 in bf16, 1157 in fp32; 4, 784, 512: 4071 and
// 4288. Of the gradients, bf16: 24, 49, 1024: 143; 1, 196, 512: 127; 24, 196, 512: 619; and in fp32 939, 869, 4534.
// Five products and two passes over the maps take about 2.5 times as long as eager's forward pass.
inline constexpr int64_t narrow_head = 256;        // the widest of flash attention
inline constexpr int64_t wide_channels = 512;      // D + E from which on products have been seen to be faster
inline constexpr int64_t most_map = 64ll << 20;    // bytes of one problem's map of weights
inline constexpr int64_t most_samples = 65535;     // of the library's attention: a grid's second and third size
inline constexpr int64_t tile_gradient_keys = 64;  // up to here the matrix-unit kernels' gradients are no slower

inline bool is_16_bit(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

inline bool in_words(const Rows& v, const Relation& r, int64_t rows) {  // whether 16-byte words can be copied
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && (r.B < 2 || v.batch % 8 == 0) &&
         (r.G < 2 || v.gate % 8 == 0) && (rows < 2 || v.row % 8 == 0);
}

// nullptr: the library's attention is taken on a GPU; its flash attention for heads of up to 256 channels, which reads
// keys and values once per 64 or 128 queries and keeps its results in registers (arithmetic: not measured), and its
// memory-efficient one for wider heads (measured, above). What that gives dead queries is made again (cuda::mend).
inline const char* why_not_library_on_gpu(const Relation& r, int architecture) {
  if (r.count) return "it has a softmax alone";
  if (!is_16_bit(r.dtype)) return "it is slower in this dtype, or does not have it";
  if (architecture < 80) return "flash attention needs sm_80";
  if (r.mask) return "flash attention has no masks";
  if (r.D != r.E) return "it needs values as wide as keys";
  if (r.D % 8 || r.D == 0) return "it has heads of whole eights of channels";
  if (r.N == 0 || r.M == 0 || r.B == 0) return "there is nothing to multiply";
  if (r.D > narrow_head && (!in_words(r.query, r, r.N) || !in_words(r.key, r, r.M) || !in_words(r.value, r, r.M)))
    return "rows are not aligned to 16 bytes";
  if (r.B > most_samples) return "there are too many samples for one launch";
  return nullptr;
}

// What products by the library take of a relation: scores of fp16 may be more than it holds.
inline const char* why_not_products_of(const Relation& r) {
  if (r.dtype != DType::f32 && r.dtype != DType::bf16) return "products are for fp32 and bf16";
  if (r.B * r.G == 0 || r.N == 0 || r.M == 0 || r.D == 0 || r.E == 0) return "there is nothing to multiply";
  if (r.D + r.E < wide_channels) return "products were not measured for such narrow heads";
  if (r.N * r.M * element_size(r.dtype) > most_map) return "the weights of one problem take too much memory";
  return nullptr;
}

// nullptr: gradients are left to products by the library.
inline const char* why_not_gradient_products_on_gpu(const Relation& r) {
  if (const char* why = why_not_products_of(r)) return why;
  if (r.dtype != DType::f32 && r.N <= tile_gradient_keys && r.M <= tile_gradient_keys)
    return "the matrix-unit kernels are no slower";
  return nullptr;
}

// Who runs a forward pass: the kernels here, the library's attention, or the library's products with the weights
// between them; of a step the relations alone, and then the cell update.
enum class Way { kernels, attention, products };

inline Way forward_way_on_gpu(const Relation& r, bool step, int architecture) {
  if (!why_not_library_on_gpu(r, architecture) && !(step && r.D <= narrow_head)) return Way::attention;
  // In 16 bits up to 256 keys are the matrix-unit kernels'.
  if (!why_not_products_of(r) && (r.dtype == DType::f32 || r.M > 256)) return Way::products;
  return Way::kernels;
}

}  // namespace rcu_ops
