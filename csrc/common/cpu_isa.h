// Which instruction set the CPU kernels use: the fastest one that processor and operating system offer, or the one
// named by RCU_OPS_CPU_ISA (portable, avx2, avx512, avx512_bf16, amx) for testing.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace rcu_ops::cpu {

enum class Isa : int { portable, avx2, avx512, avx512_bf16, amx };

inline const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  return names[static_cast<int>(isa)];
}

#if defined(__x86_64__)
inline Isa detect_isa() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::portable;
  const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave || !fma || !f16c) return Isa::portable;
  unsigned xcr0, xcr0_high;
  __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  if ((xcr0 & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & (1u << 5))) return Isa::portable;
  // F, DQ, CD, BW, VL: every processor with AVX-512 since Skylake.
  const unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 28) | (1u << 30) | (1u << 31);
  if ((b & avx512) != avx512 || (xcr0 & 0xe6) != 0xe6) return Isa::avx2;
  const bool amx = (d & (1u << 22)) && (d & (1u << 24)) && (xcr0 & 0x60000) == 0x60000;
  unsigned a1, b1, c1, d1;
  const bool avx512_bf16 = a >= 1 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && (a1 & (1u << 5));
#if defined(__linux__)
  // Linux hands out the 8 KiB tile state of a process only on request (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
  if (amx && avx512_bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0) return Isa::amx;
#endif
  return avx512_bf16 ? Isa::avx512_bf16 : Isa::avx512;
}
#else
inline Isa detect_isa() { return Isa::portable; }
#endif

inline Isa best_isa() {
  static const Isa best = detect_isa();
  return best;
}

// What is taken unless another one is named. Pairs of bf16 on the vector unit (VDPBF16PS) do twice the work of an fp32
// multiply-add in one instruction: AMD's cores start one a cycle, Intel's one every other cycle on the one of their two
// units that has it, half the rate of fp32 arithmetic (91 against 188 GFLOP/s on a core of Emerald Rapids). There,
// without the matrix unit, bf16 is widened to fp32 instead.
inline Isa preferred_isa() {
#if defined(__x86_64__)
  static const bool slow_pairs = [] {
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx && c == signature_INTEL_ecx &&
           d == signature_INTEL_edx;
  }();
  if (best_isa() == Isa::avx512_bf16 && slow_pairs) return Isa::avx512;
#endif
  return best_isa();
}

// Read on every call, so that a test can compare instruction sets in one process. A name that this machine cannot run
// is an error, not a silent step down.
inline Isa current_isa() {
  const Isa best = best_isa();
  const char* forced = std::getenv("RCU_OPS_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return preferred_isa();
  std::string available;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (std::strcmp(forced, isa_name(isa)) == 0) return isa;
    available += (i ? ", " : "") + std::string(isa_name(isa));
  }
  throw std::runtime_error("RCU_OPS_CPU_ISA: expected one of " + available + ", got '" + forced + "'");
}

}  // namespace rcu_ops::cpu
