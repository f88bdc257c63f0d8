// Python module rcu_ops._native: what was built, and the planners and index maths of the kernels for tests and for
// `explain`.
//
// One bind_<op> function per op, each defined in native_<op>.cpp; all of these files are compiled as one. Neither torch
// nor CUDA is needed to compile or to import it, and the package works without it.

#include <algorithm>
#include <string>

#include "build_facts.h"
#include "python.h"

void bind_cycle_consistency(py::module_& m);
void bind_fast_gru(py::module_& m);
void bind_nonlocal_gates(py::module_& m);
void bind_recurrent_conv(py::module_& m);

namespace {

std::string compiler_version() {
  [[maybe_unused]] const auto dotted = [](int major, int minor, int patch) {
    return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
  };
#if defined(__clang__)
  return "clang " + dotted(__clang_major__, __clang_minor__, __clang_patchlevel__);
#elif defined(__GNUC__)
  return "gcc " + dotted(__GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#else
  return "unknown";
#endif
}

// "a,b" -> ["a", "b"]; "" -> []
py::list split(const std::string& text) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
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
  info["cuda"] = cuda.empty() ? py::none() : py::to_python(cuda);
  info["architectures"] = cuda.empty() ? py::none() : split(facts.cuda_architectures);
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

PyMODINIT_FUNC PyInit__native() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "rcu_ops._native",
                                   "Build info, planners and index maths of rcu_ops.", -1};
  try {
    py::object module(PyModule_Create(&definition));
    py::module_ m(module.get());
    bind_build_info(m);
    bind_cycle_consistency(m);
    bind_fast_gru(m);
    bind_nonlocal_gates(m);
    bind_recurrent_conv(m);
    return module.release();
  } catch (const py::raised&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
  }
  return nullptr;
}
