// Soft neighbours of two fp32 sequences, and their gradients, by the portable CPU kernels, from a copy of their sources
// in which faults are planted: number `planted` is in force, 0 is none.
#include "cpu/cycle_consistency_kernels.h"

using namespace rcu_ops;

static Alignment sample(Align kind, int64_t T, int64_t S, int64_t C, double temperature, const float* a,
                        const float* b) {
  Alignment p;
  p.kind = kind, p.N = 1, p.T = T, p.S = S, p.C = C, p.temperature = temperature;
  p.a = {a, T * C, C, 1}, p.b = {b, S * C, C, 1};
  return p;
}

static void run(const Alignment& p) {
  Parallel alone;
  alone.run = [](void*, int64_t count, void (*task)(void*, int64_t), void* context) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
  };
  cpu::portable::align(p, alone);
}

extern "C" {
int planted = 0;

void align(int64_t T, int64_t S, int64_t C, double temperature, const float* a, const float* b, float* soft,
           int64_t* index) {
  Alignment p = sample(Align::soft, T, S, C, temperature, a, b);
  p.soft = soft, p.index_ab = index;
  run(p);
}

void gradients(int64_t T, int64_t S, int64_t C, double temperature, const float* a, const float* b, const float* grad,
               float* da, float* db) {
  Alignment p = sample(Align::soft_backward, T, S, C, temperature, a, b);
  p.grad = {grad, T * C, C, 1}, p.da = da, p.db = db;
  run(p);
}
}
