// Runs cases from files: cuda_host CASE... (see case.h). Afterwards CASE.out holds the storages, and the standard
// output has one line per case: "ok" and how it ran, or "error: " and what the launch returned.
//
// Keys of every case: storages BYTES...; seed, resident, multiprocessors, clusters, shared_bytes, architecture N; op
// NAME, one of those that the run_<op>.cpp files register, or probe with name NAME.

#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>

#include "case.h"
#include "machine.h"
#include "probes.h"

namespace cuda_host {

Case::Case(const std::string& path) {
  std::ifstream text(path + ".txt");
  if (!text) throw std::runtime_error("cannot read " + path + ".txt");
  for (std::string line; std::getline(text, line);) {
    std::istringstream words(line);
    std::string key, word;
    words >> key;
    while (words >> word) values_[key].push_back(word);
  }
  std::ifstream data(path + ".bin", std::ios::binary);
  for (const std::string& size : values_["storages"]) {
    storages.push_back(allocate(std::stoull(size)));
    sizes_.push_back(std::stoull(size));
    data.read(static_cast<char*>(storages.back()), static_cast<std::streamsize>(sizes_.back()));
    if (!data) throw std::runtime_error(path + ".bin is too short");
  }
}

Case::~Case() {
  for (void* storage : storages) deallocate(storage);
}

void Case::write(const std::string& path) const {
  std::ofstream data(path + ".out", std::ios::binary);
  for (size_t i = 0; i < storages.size(); ++i)
    data.write(static_cast<const char*>(storages[i]), static_cast<std::streamsize>(sizes_[i]));
}

void* Case::tensor(const std::string& key) const {
  if (!has(key)) return nullptr;
  return static_cast<char*>(storages.at(static_cast<size_t>(integer(key, 0)))) + integer(key, 1);
}

namespace {

std::map<std::string, Runner>& runners() {
  static std::map<std::string, Runner> all;
  return all;
}

const Registration probe("probe", [](const Case& c, std::string&) {
  return rcu_ops::cuda::run_probe(c.word("name"), c.storages);
});

std::string run_case(const std::string& path, std::string& plan) {
  const Case c(path);
  Options wanted;
  if (c.has("seed")) wanted.seed = static_cast<uint64_t>(c.integer("seed"));
  if (c.has("resident")) wanted.resident = static_cast<int>(c.integer("resident"));
  if (c.has("multiprocessors")) wanted.multiprocessors = static_cast<int>(c.integer("multiprocessors"));
  if (c.has("clusters")) wanted.clusters = static_cast<int>(c.integer("clusters"));
  if (c.has("shared_bytes")) wanted.shared_bytes = c.integer("shared_bytes");
  if (c.has("architecture")) wanted.architecture = static_cast<int>(c.integer("architecture"));
  options = wanted;
  const auto runner = runners().find(c.word("op"));
  const std::string error = runner == runners().end() ? "no such op" : runner->second(c, plan);
  c.write(path);
  return error;
}

}  // namespace

Registration::Registration(const std::string& op, Runner runner) { runners()[op] = std::move(runner); }

}  // namespace cuda_host

int main(int count, char** paths) {
  for (int i = 1; i < count; ++i) {
    std::string plan;
    const std::string error = cuda_host::run_case(paths[i], plan);
    std::cout << (error.empty() ? "ok " + plan : "error: " + error) << std::endl;
  }
}
