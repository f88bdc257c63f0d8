// Cycle consistency of sequences of at most 32 frames on CUDA devices: the launches, and blocks alone.
#include "cuda/cycle_consistency_short_block.h"

namespace rcu_ops::cuda {
namespace {

// See align_short_block.
template <typename T>
__global__ void __launch_bounds__(short_threads, 2)
    align_short_kernel(const Alignment p, const ShortLaunch launch, bool last, float* partial) {
  align_short_block<T, false>(p, launch, last, partial);
}

// The widest copy that every row of both sequences is aligned for; 0: none.
int copied_word(const Alignment& p) {
  const int64_t size = element_size(p.dtype);
  for (const int word : {16, 4}) {
    bool fits = true;
    for (const Sequence* v : {&p.a, &p.b})
      fits = fits && v->c == 1 && reinterpret_cast<uintptr_t>(v->data) % word == 0 && v->n * size % word == 0 &&
             v->t * size % word == 0;
    if (fits) return word;
  }
  return 0;
}

template <typename T>
Error align_as(const Alignment& p, const ShortLaunch& how, float* partial, Stream stream) {
  const char* name = "cycle_consistency align_short";
  Error error = launch(name, align_short_kernel<T>, how.blocks, dim3(short_threads), how.shared_bytes, stream, p, how,
                       false, partial);
  if (error.empty() && how.plan.splits > 1)
    error = launch(name, align_short_kernel<T>, dim3(static_cast<unsigned>(p.N)), dim3(short_threads), how.shared_bytes,
                   stream, p, how, true, partial);
  return error;
}

}  // namespace

Text align_short(const Alignment& p, const Gpu& gpu, void* scratch, Stream stream) {
  const ShortCycle plan(p.N, p.T, p.S, p.C, gpu);
  if (p.N * plan.splits > most_blocks) return "cycle_consistency: too many samples for one launch";
  const int64_t sums = 4 * plan.groups * plan.numbers, header = 4 * shared_header(plan.frames);
  const int64_t stage = plan.frames * (stage_channels * element_size(p.dtype) + 16);
  const int stages = header + ShortCycle::most_stages * stage <= gpu.shared_bytes ? ShortCycle::most_stages : 2;
  const double sharp = 1 / p.temperature;
  const ShortLaunch how{
      .plan = plan,
      .word = copied_word(p),
      .stages = stages,
      .sharpness = static_cast<float>(sharp < 3.4e38 ? sharp : 3.4e38),
      .shared_bytes = static_cast<size_t>(header + (stages * stage > sums ? stages * stage : sums)),
      .blocks = dim3(static_cast<unsigned>(p.N * plan.splits)),
  };
  if (plan.cluster) return align_short_clusters(p, how, stream);
  float* partial = static_cast<float*>(scratch);
  switch (p.dtype) {
    case DType::f32: return align_as<float>(p, how, partial, stream);
    case DType::bf16: return align_as<__nv_bfloat16>(p, how, partial, stream);
    default: return align_as<__half>(p, how, partial, stream);
  }
}

}  // namespace rcu_ops::cuda
