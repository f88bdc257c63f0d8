// Runs cases from files: cuda_host CASE... A case is CASE.txt, lines of a key and its values, and CASE.bin, the storages one
// after the other. Every storage becomes a heap block of exactly its size. Afterwards CASE.out holds the storages, and the
// standard output has one line per case: "ok" and the plan of a scan, or "error: " and what the launch returned.
//
// Keys: storages BYTES...; seed, resident, multiprocessors, shared_bytes, architecture N; op scan | weight_grad | probe;
// for a probe: name NAME; for a scan: plain 1 or 0. For both ops the fields of Scan and WeightGrad (csrc/common/recurrent_conv.h): a view is
// STORAGE OFFSET DTYPE then the strides n c t h w, a pointer STORAGE OFFSET, everything else a number.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/recurrent_conv.h"
#include "machine.h"
#include "probes.h"

namespace {

using rcu_ops::DType;

class Case {
 public:
  explicit Case(const std::string& path) {
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
      storages.push_back(std::malloc(std::stoull(size)));
      sizes_.push_back(std::stoull(size));
      data.read(static_cast<char*>(storages.back()), static_cast<std::streamsize>(sizes_.back()));
      if (!data) throw std::runtime_error(path + ".bin is too short");
    }
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;
  ~Case() {
    for (void* storage : storages) std::free(storage);
  }

  void write(const std::string& path) const {
    std::ofstream data(path + ".out", std::ios::binary);
    for (size_t i = 0; i < storages.size(); ++i)
      data.write(static_cast<const char*>(storages[i]), static_cast<std::streamsize>(sizes_[i]));
  }

  bool has(const std::string& key) const { return values_.count(key) != 0; }
  const std::string& word(const std::string& key, size_t i = 0) const { return values_.at(key).at(i); }
  int64_t integer(const std::string& key, size_t i = 0) const { return std::stoll(word(key, i)); }
  double number(const std::string& key) const { return std::stod(word(key)); }
  void* pointer(const std::string& key, int64_t element) const {
    if (!has(key)) return nullptr;
    return static_cast<char*>(storages.at(static_cast<size_t>(integer(key, 0)))) + integer(key, 1) * element;
  }
  rcu_ops::View view(const std::string& key) const {
    rcu_ops::View v;
    if (!has(key)) return v;
    v.dtype = static_cast<DType>(integer(key, 2));
    v.data = pointer(key, v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2);
    v.n = integer(key, 3);
    v.c = integer(key, 4);
    v.t = integer(key, 5);
    v.h = integer(key, 6);
    v.w = integer(key, 7);
    return v;
  }
  template <typename Problem>
  void shape(Problem& p) const {
    p.N = integer("N");
    p.C = integer("C");
    p.T = integer("T");
    p.H = integer("H");
    p.W = integer("W");
    p.dtype = static_cast<DType>(integer("dtype"));
    p.reverse = integer("reverse") != 0;
  }

  std::vector<void*> storages;

 private:
  std::map<std::string, std::vector<std::string>> values_;
  std::vector<size_t> sizes_;
};

// The caller's scratch memory: exactly what was asked for, and nothing that could be mistaken for numbers.
template <typename Run>
std::string with_scratch(const rcu_ops::cuda::Scratch& wanted, Run run) {
  if (!wanted.error.empty()) return wanted.error;
  void* scratch = nullptr;
  if (wanted.bytes > 0 && posix_memalign(&scratch, 16, static_cast<size_t>(wanted.bytes)) != 0) return "out of memory";
  if (scratch) std::memset(scratch, 0xff, static_cast<size_t>(wanted.bytes));
  std::string error = run(scratch);
  std::free(scratch);
  return error;
}

std::string run_scan(const Case& c, std::string& plan) {
  rcu_ops::Scan p;
  c.shape(p);
  p.x = c.view("x");
  p.y = c.view("y");
  p.residual = c.view("residual");
  p.first = c.view("first");
  p.last = c.view("last");
  const int64_t element = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2, state = p.dtype == DType::f64 ? 8 : 4;
  p.weight = c.pointer("weight", element);
  p.weight_out = c.integer("weight_out");
  p.weight_in = c.integer("weight_in");
  p.scale = c.pointer("scale", state);
  p.shift = c.pointer("shift", state);
  p.relu = c.integer("relu") != 0;
  p.init = static_cast<rcu_ops::Init>(c.integer("init"));
  p.last_kind = static_cast<rcu_ops::Last>(c.integer("last_kind"));
  p.alpha = c.number("alpha");
  p.alpha_first = c.number("alpha_first");
  p.alpha_final = c.number("alpha_final");
  const auto kernel = c.integer("plain") ? rcu_ops::cuda::Kernel::plain : rcu_ops::cuda::Kernel::best;
  plan = rcu_ops::cuda::describe_scan(p, kernel);
  return with_scratch(rcu_ops::cuda::scan_scratch(p, kernel), [&](void* scratch) {
    return rcu_ops::cuda::scan(p, scratch, nullptr, kernel);
  });
}

std::string run_weight_grad(const Case& c) {
  rcu_ops::WeightGrad p;
  c.shape(p);
  p.dx = c.view("dx");
  p.h = c.view("h");
  p.first = c.view("first");
  p.dweight = c.pointer("dweight", p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2);
  return with_scratch(rcu_ops::cuda::weight_grad_scratch(p),
                      [&](void* scratch) { return rcu_ops::cuda::weight_grad(p, scratch, nullptr); });
}

std::string run(const std::string& path, std::string& plan) {
  const Case c(path);
  cuda_host::Options options;
  if (c.has("seed")) options.seed = static_cast<uint64_t>(c.integer("seed"));
  if (c.has("resident")) options.resident = static_cast<int>(c.integer("resident"));
  if (c.has("multiprocessors")) options.multiprocessors = static_cast<int>(c.integer("multiprocessors"));
  if (c.has("shared_bytes")) options.shared_bytes = c.integer("shared_bytes");
  if (c.has("architecture")) options.architecture = static_cast<int>(c.integer("architecture"));
  cuda_host::options = options;
  const std::string op = c.word("op");
  std::string error = op == "scan"          ? run_scan(c, plan)
                      : op == "weight_grad" ? run_weight_grad(c)
                      : op == "probe"       ? rcu_ops::cuda::run_probe(c.word("name"), c.storages)
                                            : "no such op";
  c.write(path);
  return error;
}

}  // namespace

int main(int count, char** paths) {
  for (int i = 1; i < count; ++i) {
    std::string plan;
    const std::string error = run(paths[i], plan);
    std::cout << (error.empty() ? "ok " + plan : "error: " + error) << std::endl;
  }
}
