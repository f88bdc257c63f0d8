// What the native_<op>.cpp files share: how a function of C++ becomes one of Python, and names from Python to what the
// planners take.
//
// pybind11's own m.def instantiates its templates for each list of argument types anew, and compiling them takes longer
// than compiling the planners. Here a function costs a call that unpacks its arguments; what binds them to parameters
// is compiled once, in native.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/gpu.h"
#include "common/types.h"

namespace rcu_ops {

namespace py = pybind11;

using Strides = std::array<int64_t, 5>;

// ---- arguments ---------------------------------------------------------------------------------------------------

// A parameter's name, and its value where it is not given: none for one that has to be.
struct Parameter {
  Parameter(const char* name) : name(name) {}
  Parameter(const char* name, int otherwise) : name(name), otherwise(py::int_(otherwise)) {}
  Parameter(const char* name, bool otherwise) : name(name), otherwise(py::bool_(otherwise)) {}
  Parameter(const char* name, const char* otherwise) : name(name), otherwise(py::str(otherwise)) {}
  Parameter(const char* name, std::nullptr_t) : name(name), otherwise(py::none()) {}

  const char* name;
  py::object otherwise;
};

inline constexpr const char* keyword_only = "*";  // in place of a parameter: those after it are given by name alone

// A type's name in a signature, and its value from Python (py::cast_error: it has none).
template <typename T>
struct FromPython;

#define RCU_OPS_FROM_PYTHON(type, name)                                \
  template <>                                                          \
  struct FromPython<type> {                                            \
    static constexpr const char* text = name;                          \
    static type of(py::handle value) { return py::cast<type>(value); } \
  }
RCU_OPS_FROM_PYTHON(bool, "bool");
RCU_OPS_FROM_PYTHON(int, "typing.SupportsInt | typing.SupportsIndex");
RCU_OPS_FROM_PYTHON(int64_t, "typing.SupportsInt | typing.SupportsIndex");
RCU_OPS_FROM_PYTHON(float, "typing.SupportsFloat | typing.SupportsIndex");
RCU_OPS_FROM_PYTHON(std::string, "str");
#undef RCU_OPS_FROM_PYTHON

// A sequence of just so many integers.
void integers_from(py::handle value, int64_t* integers, size_t count);

template <>
struct FromPython<Strides> {
  static constexpr const char* text =
      "typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], \"FixedSize(5)\"]";
  static Strides of(py::handle value) {
    Strides strides;
    integers_from(value, strides.data(), strides.size());
    return strides;
  }
};

using Pair = std::pair<int64_t, int64_t>;

template <>
struct FromPython<Pair> {
  static constexpr const char* text =
      "tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]";
  static Pair of(py::handle value) {
    int64_t pair[2];
    integers_from(value, pair, 2);
    return {pair[0], pair[1]};
  }
};

template <typename T>
struct FromPython<std::optional<T>> {
  static std::optional<T> of(py::handle value) {
    return value.is_none() ? std::nullopt : std::optional<T>(FromPython<T>::of(value));
  }
};

// ---- results -----------------------------------------------------------------------------------------------------

// A dict of what a planner found, by name.
class Facts {
 public:
  class Place {
   public:
    Place(const py::dict& facts, const char* name) : facts_(facts), name_(name) {}
    void operator=(const py::object& value) const;
    void operator=(bool value) const;
    void operator=(int value) const;
    void operator=(int64_t value) const;
    void operator=(double value) const;
    void operator=(const char* value) const;  // None for no text
    void operator=(const std::string& value) const;
    void operator=(const std::vector<int64_t>& value) const;  // their bytes

   private:
    const py::dict& facts_;
    const char* name_;
  };

  Place operator[](const char* name) const { return {facts_, name}; }
  const py::dict& dict() const { return facts_; }

 private:
  py::dict facts_;
};

using Names = std::vector<std::string>;

py::object to_python(bool value);
py::object to_python(int value);
py::object to_python(const std::string& value);
py::object to_python(const std::optional<std::string>& value);
py::object to_python(const Names& value);
py::object to_python(const Facts& value);

template <typename T>
constexpr const char* result_text = std::is_same_v<T, bool>          ? "bool"
                                    : std::is_same_v<T, int>         ? "int"
                                    : std::is_same_v<T, std::string> ? "str"
                                    : std::is_same_v<T, Names>       ? "list[str]"
                                    : std::is_same_v<T, Facts>       ? "dict"
                                                                     : "str | None";

// ---- functions ---------------------------------------------------------------------------------------------------

struct TypeName {
  const char* text;
  bool or_none;
};

template <typename T>
struct NameOf {
  static constexpr TypeName value{FromPython<T>::text, false};
};
template <typename T>
struct NameOf<std::optional<T>> {
  static constexpr TypeName value{FromPython<T>::text, true};
};

struct Signature {
  std::string name, text;  // text: as help() shows it
  std::vector<Parameter> parameters;
  size_t positional = 0;  // so many of them can be given by their place

  // An argument does not fit.
  [[noreturn]] void refuse(const std::string& why) const;
};

using Anything = void (*)();
using Run = py::object (*)(Anything function, const Signature& signature, const py::handle* arguments);

template <typename T>
T argument_from(const Signature& signature, const py::handle* arguments, size_t i) {
  try {
    return FromPython<T>::of(arguments[i]);
  } catch (const py::cast_error&) {
    signature.refuse(std::string(signature.parameters[i].name) + " is " + std::string(py::repr(arguments[i])));
  }
}

template <typename Result, typename... Of, size_t... I>
py::object run(Result (*function)(Of...), const Signature& signature, const py::handle* arguments,
               std::index_sequence<I...>) {
  return to_python(function(argument_from<std::decay_t<Of>>(signature, arguments, I)...));
}

void define(py::module_& m, const char* name, Anything function, Run run, std::initializer_list<Parameter> parameters,
            const TypeName* types, size_t count, const char* result, const char* doc);

// Adds a function to the module.
template <typename Result, typename... Of>
void define(py::module_& m, const char* name, Result (*function)(Of...), std::initializer_list<Parameter> parameters,
            const char* doc) {
  static constexpr TypeName types[] = {NameOf<std::decay_t<Of>>::value..., {}};
  const Run unpack = [](Anything erased, const Signature& signature, const py::handle* arguments) {
    return run(reinterpret_cast<Result (*)(Of...)>(erased), signature, arguments, std::index_sequence_for<Of...>());
  };
  define(m, name, reinterpret_cast<Anything>(function), unpack, parameters, types, sizeof...(Of), result_text<Result>,
         doc);
}

// ---- names -------------------------------------------------------------------------------------------------------

inline DType parse_dtype(const std::string& name) {
  if (name == "float64") return DType::f64;
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw py::value_error("dtype: expected float64, float32, bfloat16 or float16, got '" + name + "'");
}

// sm90a: the library has code for sm_90a; whoever asks about the library at hand reads that off its build's record.
inline Gpu gpu_of(int architecture, int multiprocessors, int64_t shared_bytes, bool sm90a) {
  Gpu gpu;
  gpu.architecture = architecture, gpu.multiprocessors = multiprocessors, gpu.shared_bytes = shared_bytes;
  gpu.sm90a = sm90a && architecture == 90;
  return gpu;
}

}  // namespace rcu_ops
