// A case as main.cpp reads it, for the run_<op>.cpp files, which turn cases into launches.
//
// A case is CASE.txt, lines of a key and its values, and CASE.bin, the storages one after the other. Every storage
// becomes device memory of exactly its size (allocate in machine.h). Values: a tensor is STORAGE BYTE_OFFSET DTYPE
// STRIDE... (DTYPE -1: not one of rcu_ops::DType), anything else is a word or a number.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/types.h"
#include "cuda/scratch.h"
#include "machine.h"

namespace cuda_host {

class Case {
 public:
  explicit Case(const std::string& path);
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;
  ~Case();

  void write(const std::string& path) const;

  bool has(const std::string& key) const { return values_.count(key) != 0; }
  const std::string& word(const std::string& key, size_t i = 0) const { return values_.at(key).at(i); }
  int64_t integer(const std::string& key, size_t i = 0) const { return std::stoll(word(key, i)); }
  double number(const std::string& key) const { return std::stod(word(key)); }
  // A tensor's data, nullptr where it is absent; its dtype and strides.
  void* tensor(const std::string& key) const;
  rcu_ops::DType dtype(const std::string& key) const { return static_cast<rcu_ops::DType>(integer(key, 2)); }
  int64_t stride(const std::string& key, size_t dimension) const { return integer(key, 3 + dimension); }

  std::vector<void*> storages;

 private:
  std::map<std::string, std::vector<std::string>> values_;
  std::vector<size_t> sizes_;
};

// Runs one kind of case: returns the launch's error, or an empty string and perhaps how it ran.
using Runner = std::function<std::string(const Case&, std::string& plan)>;

// A namespace-scope object of a run_<op>.cpp file: cases with `op NAME` are its own.
struct Registration {
  Registration(const std::string& op, Runner runner);
};

// The caller's scratch memory: exactly what was asked for, and nothing that could be mistaken for numbers.
template <typename Run>
std::string with_scratch(const rcu_ops::cuda::Scratch& wanted, Run run) {
  if (!wanted.error.empty()) return wanted.error.c_str();
  void* scratch = nullptr;
  if (wanted.bytes > 0) scratch = allocate(static_cast<size_t>(wanted.bytes));
  std::string error = run(scratch).c_str();
  if (scratch) deallocate(scratch);
  return error;
}

}  // namespace cuda_host
