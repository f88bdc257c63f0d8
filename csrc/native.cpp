// Python module rcu_ops._native: what was built, and the planners and index maths of the kernels for tests and for
// `explain`.
//
// One bind_<op> function per op, each defined in native_<op>.cpp; all of these files are compiled as one. Neither torch
// nor CUDA is needed to compile or to import it, and the package works without it.

#include "native.h"

#include <cstring>

#include "build_facts.h"

namespace py = pybind11;

void bind_cycle_consistency(py::module_& m);
void bind_fast_gru(py::module_& m);
void bind_nonlocal_gates(py::module_& m);
void bind_recurrent_conv(py::module_& m);

namespace rcu_ops {

void integers_from(py::handle value, int64_t* integers, size_t count) {
  if (!PySequence_Check(value.ptr()) || py::len(value) != count) throw py::cast_error();
  for (size_t i = 0; i < count; ++i) integers[i] = py::cast<int64_t>(py::object(value[py::int_(i)]));
}

void Facts::Place::operator=(const py::object& value) const { facts_[name_] = value; }
void Facts::Place::operator=(bool value) const { *this = to_python(value); }
void Facts::Place::operator=(int value) const { *this = to_python(value); }
void Facts::Place::operator=(int64_t value) const { *this = py::object(py::int_(value)); }
void Facts::Place::operator=(double value) const { *this = py::object(py::float_(value)); }
void Facts::Place::operator=(const char* value) const {
  *this = value ? py::object(py::str(value)) : py::object(py::none());
}
void Facts::Place::operator=(const std::string& value) const { *this = to_python(value); }
void Facts::Place::operator=(const std::vector<int64_t>& value) const {
  *this = py::object(py::bytes(reinterpret_cast<const char*>(value.data()), value.size() * sizeof(int64_t)));
}

py::object to_python(bool value) { return py::bool_(value); }
py::object to_python(int value) { return py::int_(value); }
py::object to_python(const std::string& value) { return py::str(value); }
py::object to_python(const std::optional<std::string>& value) { return value ? to_python(*value) : py::none(); }
py::object to_python(const Names& value) {
  py::list names;
  for (const std::string& name : value) names.append(py::str(name));
  return names;
}
py::object to_python(const Facts& value) { return value.dict(); }

void Signature::refuse(const std::string& why) const {
  throw py::type_error(name + "(): incompatible function arguments: " + why + ". Supported is\n    " + text);
}

namespace {

// What Python passed, in the order of the parameters.
std::vector<py::handle> bind_arguments(const Signature& signature, const py::args& args, const py::kwargs& kwargs) {
  if (args.size() > signature.positional)
    signature.refuse(std::to_string(args.size()) + " arguments without a name were given");
  std::vector<py::handle> bound;
  size_t named = 0;
  for (size_t i = 0; i < signature.parameters.size(); ++i) {
    const Parameter& parameter = signature.parameters[i];
    PyObject* by_name = PyDict_GetItemString(kwargs.ptr(), parameter.name);
    if (by_name) ++named;
    if (by_name && i < args.size()) signature.refuse(std::string(parameter.name) + " was given twice");
    bound.push_back(i < args.size() ? args[i].ptr() : by_name ? by_name : parameter.otherwise.ptr());
    if (!bound.back()) signature.refuse(std::string(parameter.name) + " is missing");
  }
  if (named != kwargs.size())
    for (const auto& given : kwargs) {
      const std::string name = py::str(given.first);
      bool known = false;
      for (const Parameter& parameter : signature.parameters) known |= name == parameter.name;
      if (!known) signature.refuse("there is no " + name);
    }
  return bound;
}

}  // namespace

void define(py::module_& m, const char* name, Anything function, Run run, std::initializer_list<Parameter> parameters,
            const TypeName* types, size_t count, const char* result, const char* doc) {
  Signature signature;
  signature.name = name;
  signature.text = signature.name + "(";
  bool by_place = true;
  for (const Parameter& parameter : parameters) {
    if (&parameter != parameters.begin()) signature.text += ", ";
    signature.text += parameter.name;
    if (std::strcmp(parameter.name, keyword_only) == 0) {
      by_place = false;
      continue;
    }
    const size_t i = signature.parameters.size();
    if (i == count) break;
    signature.text += std::string(": ") + types[i].text + (types[i].or_none ? " | None" : "");
    if (parameter.otherwise) signature.text += " = " + std::string(py::repr(parameter.otherwise));
    signature.parameters.push_back(parameter);
    signature.positional += by_place;
  }
  if (signature.parameters.size() != count) throw std::logic_error(signature.name + " has parameters without a name");
  signature.text += std::string(") -> ") + result;
  py::options options;
  options.disable_function_signatures();
  const std::string text = signature.text + "\n\n" + doc + "\n";
  const auto call = [function, run, signature](const py::args& args, const py::kwargs& kwargs) {
    return run(function, signature, bind_arguments(signature, args, kwargs).data());
  };
  m.add_object(name, py::cpp_function(call, py::name(name), py::scope(m), py::doc(text.c_str())));
}

}  // namespace rcu_ops

namespace {

using namespace rcu_ops;

std::string compiler_version() {
  std::ostringstream text;
  text << "gcc " << __GNUC__ << '.' << __GNUC_MINOR__ << '.' << __GNUC_PATCHLEVEL__;
  return text.str();
}

// "a,b" -> ["a", "b"]; "" -> []
py::list split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.append(part);
  return parts;
}

Facts build_info() {
  const rcu_ops::BuildFacts& facts = rcu_ops::build_facts;
  const std::string cuda = facts.cuda;
  Facts info;
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
  define(m, "build_info", build_info, {},
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
