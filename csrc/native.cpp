// Python module rcu_ops._native: what was built, and the planners and index maths of the kernels for tests and for
// `explain`.
//
// One bind_<op> function per op, each defined in native_<op>.cpp; all of these files are compiled as one. Neither torch
// nor CUDA is needed to compile or to import it, and the package works without it.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_facts.h"

namespace py = pybind11;

void bind_cycle_consistency(py::module_& m);
void bind_fast_gru(py::module_& m);
void bind_nonlocal_gates(py::module_& m);
void bind_recurrent_conv(py::module_& m);

namespace {

std::string compiler_version() {
  std::ostringstream text;
#if defined(__clang__)
  text << "clang " << __clang_major__ << '.' << __clang_minor__ << '.' << __clang_patchlevel__;
#elif defined(__GNUC__)
  text << "gcc " << __GNUC__ << '.' << __GNUC_MINOR__ << '.' << __GNUC_PATCHLEVEL__;
#else
  text << "unknown";
#endif
  return text.str();
}

// "a,b" -> ["a", "b"]; "" -> []
py::list split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.append(part);
  return parts;
}

py::dict build_info() {
  const rcu_ops::BuildFacts& facts = rcu_ops::build_facts;
  const std::string cuda = facts.cuda;
  py::dict info;
  info["kind"] = facts.kind;
  info["version"] = facts.version;
  info["commit"] = facts.commit;
  info["compiler"] = compiler_version();
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  info["architectures"] = cuda.empty() ? py::object(py::none()) : py::object(split(facts.cuda_architectures));
  info["torch"] = facts.torch;
  info["python"] = PY_VERSION;
  return info;
}

void bind_build_info(py::module_& m) {
  m.def("build_info", &build_info,
        "What this build is: kind ('cpu' or 'cuda'), version, git commit, compiler, CUDA toolkit and architectures "
        "(None without CUDA kernels), and the torch and Python versions it was built against.");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build info, planners and index maths of rcu_ops.";
  bind_build_info(m);
  bind_cycle_consistency(m);
  bind_fast_gru(m);
  bind_nonlocal_gates(m);
  bind_recurrent_conv(m);
}
