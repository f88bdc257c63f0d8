// Distances by products, |a - b|^2 = |a|^2 + |b|^2 - 2 a.b: how wrong they may be, and which of them have to be found
// again by differences. For the kernels of every device; numbers alone, so that vectors of the CPU's can use them, too.
//
// Bound.    A product's error is at most `products` times |a|^2 + |b|^2 of the centred frames, plus `least`: nothing
//           against a distance of that size, everything between frames of one scene when another scene is far away,
//           whatever the centre.
// Stands.   A distance d of bound e stays as it is where
//             e is within twice the bound of the differences themselves (`allowed` times d), or
//             a weight exp(-d / temperature) is wrong by less than `flat` for it, relative to itself, or
//             d - e is beyond `reach`: the errors of all such weights together are less than a quarter of `flat`
//             times the largest weight (for landings: times the square of any distance in time, too).
//           The others are computed again, from the frames as they were given.
#pragma once

#include <cstdint>

#include "gpu.h"

namespace rcu_ops {

// Units are 2^-53 or 2^-24, the relative error of one operation of S.
template <class S>
struct Rounding {
  S products, differences, least;

  // `product_steps`, `difference_steps`: operations whose errors add up on the way to a product or a sum of squares.
  RCU_OPS_DEVICE constexpr Rounding(int64_t C, int64_t product_steps, int64_t difference_steps)
      // Beside the chain of the product: two norms, their sum, the result (4), and the rounding of centred frames,
      // twice 2; 8 more for a soft neighbour, rounded three times on its way.
      : products(static_cast<S>(1.01 * unit() * static_cast<double>(product_steps + 16))),
        differences(static_cast<S>(1.01 * unit() * static_cast<double>(difference_steps + 3))),
        // Of numbers below the normal ones.
        least(static_cast<S>(static_cast<double>(C) * (sizeof(S) == 8 ? 0x1p-1018 : 0x1p-122))) {}

  static RCU_OPS_DEVICE constexpr double unit() { return sizeof(S) == 8 ? 0x1p-53 : 0x1p-24; }
};

// For one query. needs differences: (d - e <= reach) and not (e <= allowed d or e sharpness <= flat).
template <class S>
struct Settling {
  S reach, allowed, flat;

  // end: the smallest upper end, min(d + e). largest: the largest e. sharpness: 1 / temperature. moments: whether what
  // is asked for are moments of places, which multiply a weight's error by up to keys^2.
  RCU_OPS_DEVICE constexpr Settling(const Rounding<S>& rounding, S end, S largest, S sharpness, int64_t keys,
                                    bool moments)
      : reach(end), allowed(2 * rounding.differences), flat(static_cast<S>(16 * Rounding<S>::unit())) {
    const S many = static_cast<S>(keys), limit = sizeof(S) == 8 ? S(750) : S(90);  // exp gives 0 beyond
    S error = largest * sharpness / flat * 4 * many, steps = 0;
    if (moments) error *= many * many;
    for (; error > 1 && steps < limit; error *= S(0.125)) steps += S(2.0795);  // log 8
    reach += (steps < limit ? steps : limit) / sharpness;
  }
};

}  // namespace rcu_ops
