// What every kernel file includes that is not ours: the toolkit's number formats and, for machine.h, the standard library.
// Parsing it takes longer than compiling the rest of most of them. It is compiled once for each set of flags (harness.py).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>
