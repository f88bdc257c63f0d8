// The probes by name; their arguments are storages in the order that the kernels' comments give.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace rcu_ops::cuda {

std::string run_probe(const std::string& name, const std::vector<void*>& storages);

}  // namespace rcu_ops::cuda
