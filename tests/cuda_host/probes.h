// The probes by name; their arguments are storages in the order that the kernels' comments give.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "common/text.h"

namespace rcu_ops::cuda {

using Probe = Text (*)(const std::vector<void*>& storages);
using Probes = std::map<std::string, Probe>;

const Probes& probes_sm90();

std::string run_probe(const std::string& name, const std::vector<void*>& storages);

}  // namespace rcu_ops::cuda
