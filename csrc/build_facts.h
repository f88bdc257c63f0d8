// What this build is. Strings from the build (build_backend/rcu_ops_build.py) in a file of their own: only that one is
// compiled anew for every commit. No time and no path among them: equal sources and tools give equal files.
#pragma once

namespace rcu_ops {

struct BuildFacts {
  const char *kind, *version, *commit, *torch;
  const char *cuda, *cuda_architectures;  // empty without CUDA kernels
};

extern const BuildFacts build_facts;

}  // namespace rcu_ops
