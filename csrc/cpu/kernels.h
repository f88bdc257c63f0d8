// Everything that files of an instruction set include, before their target pragma: a function of a header that was
// compiled for that instruction set could be linked for all others. tests/packaging holds that they include no other.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cycle_consistency_kernels.h"
#include "fast_gru_kernels.h"
#include "nonlocal_gates_kernels.h"
#include "recurrent_conv_batch_norm_kernels.h"
#include "recurrent_conv_kernels.h"
