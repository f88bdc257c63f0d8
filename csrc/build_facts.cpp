#include "build_facts.h"

namespace rcu_ops {

const BuildFacts build_facts = {
    .kind = RCU_OPS_BUILD_KIND,
    .version = RCU_OPS_VERSION,
    .commit = RCU_OPS_COMMIT,
    .torch = RCU_OPS_TORCH_VERSION,
    .cuda = RCU_OPS_CUDA_VERSION,
    .cuda_architectures = RCU_OPS_CUDA_ARCHITECTURES,
};

}  // namespace rcu_ops
