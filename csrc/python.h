// Functions of C++ for Python, on Python's own C interface: what rcu_ops._native needs of a binding library, whose
// headers alone would take the compiler longer than the module does.
//
// A function's arguments and results are bool, integers, floating-point numbers, text, std::optional, std::array,
// std::vector and std::tuple of them, and results also py::dict, py::list and py::bytes. std::invalid_argument becomes
// ValueError, other exceptions RuntimeError; what cannot be an argument is a TypeError.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace py {

struct value_error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// An error that Python knows of already.
struct raised {};

// An owned reference; empty or not null.
class object {
 public:
  object() = default;
  explicit object(PyObject* owned) : at_(owned) {
    if (!owned) throw raised();
  }
  object(const object& other) : at_(other.at_) { Py_XINCREF(at_); }
  object(object&& other) noexcept : at_(std::exchange(other.at_, nullptr)) {}
  object& operator=(object other) noexcept {
    std::swap(at_, other.at_);
    return *this;
  }
  ~object() { Py_XDECREF(at_); }
  PyObject* get() const { return at_; }
  PyObject* release() { return std::exchange(at_, nullptr); }

 private:
  PyObject* at_ = nullptr;
};

inline object none() { return object(Py_NewRef(Py_None)); }

// ---- to Python ---------------------------------------------------------------------------------------------------

template <class T>
object to_python(const T& value);

class dict : public object {
 public:
  dict() : object(PyDict_New()) {}

  struct Place {
    dict& of;
    const char* key;
    template <class T>
    void operator=(const T& value) const {
      if (PyDict_SetItemString(of.get(), key, to_python(value).get()) < 0) throw raised();
    }
  };
  Place operator[](const char* key) { return {*this, key}; }
};

class list : public object {
 public:
  list() : object(PyList_New(0)) {}
  template <class T>
  void append(const T& value) {
    if (PyList_Append(get(), to_python(value).get()) < 0) throw raised();
  }
};

class bytes : public object {
 public:
  bytes(const char* data, size_t size) : object(PyBytes_FromStringAndSize(data, static_cast<Py_ssize_t>(size))) {}
};

template <class T>
object from_sequence(const std::vector<T>& values) {
  list all;
  for (const T& value : values) all.append(value);
  return all;
}
template <class... T>
object from_sequence(const std::tuple<T...>& values) {
  object all(PyTuple_New(sizeof...(T)));
  Py_ssize_t i = 0;
  std::apply([&](const T&... value) { (PyTuple_SET_ITEM(all.get(), i++, to_python(value).release()), ...); }, values);
  return all;
}
template <class T>
object from_sequence(const std::optional<T>& value) {
  return value ? to_python(*value) : none();
}

template <class T>
object to_python(const T& value) {
  if constexpr (std::is_base_of_v<object, T>) {
    return value;
  } else if constexpr (std::is_same_v<T, bool>) {
    return object(PyBool_FromLong(value));
  } else if constexpr (std::is_integral_v<T>) {
    return object(PyLong_FromLongLong(static_cast<long long>(value)));
  } else if constexpr (std::is_floating_point_v<T>) {
    return object(PyFloat_FromDouble(static_cast<double>(value)));
  } else if constexpr (std::is_convertible_v<const T&, std::string_view>) {
    const std::string_view text = value;
    return object(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
  } else {
    return from_sequence(value);
  }
}

// ---- from Python -------------------------------------------------------------------------------------------------

[[noreturn]] inline void wrong_type(const char* expected, PyObject* given) {
  PyErr_Format(PyExc_TypeError, "expected %s, got %s", expected, Py_TYPE(given)->tp_name);
  throw raised();
}

template <class T>
struct From {  // integers
  static_assert(std::is_integral_v<T>);
  static T python(PyObject* given) {
    const long long value = PyLong_AsLongLong(given);
    if (value == -1 && PyErr_Occurred()) throw raised();
    if (!std::in_range<T>(value)) {
      PyErr_SetString(PyExc_OverflowError, "an integer is too large");
      throw raised();
    }
    return static_cast<T>(value);
  }
};
template <>
struct From<bool> {
  static bool python(PyObject* given) {
    if (!PyBool_Check(given)) wrong_type("bool", given);
    return given == Py_True;
  }
};
template <>
struct From<double> {
  static double python(PyObject* given) {
    const double value = PyFloat_AsDouble(given);
    if (value == -1 && PyErr_Occurred()) throw raised();
    return value;
  }
};
template <>
struct From<float> {
  static float python(PyObject* given) { return static_cast<float>(From<double>::python(given)); }
};
template <>
struct From<std::string> {
  static std::string python(PyObject* given) {
    if (!PyUnicode_Check(given)) wrong_type("str", given);
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(given, &size);
    if (!text) throw raised();
    return {text, static_cast<size_t>(size)};
  }
};
template <class T>
struct From<std::optional<T>> {
  static std::optional<T> python(PyObject* given) {
    return given == Py_None ? std::nullopt : std::optional<T>(From<T>::python(given));
  }
};

// The items of a sequence of so many.
inline object items_of(PyObject* given, size_t count) {
  object items(PySequence_Fast(given, "expected a sequence"));
  if (static_cast<size_t>(PySequence_Fast_GET_SIZE(items.get())) != count) {
    PyErr_Format(PyExc_TypeError, "expected a sequence of %zu", count);
    throw raised();
  }
  return items;
}
template <class T, size_t Count>
struct From<std::array<T, Count>> {
  static std::array<T, Count> python(PyObject* given) {
    const object items = items_of(given, Count);
    std::array<T, Count> values;
    for (size_t i = 0; i < Count; ++i)
      values[i] = From<T>::python(PySequence_Fast_GET_ITEM(items.get(), static_cast<Py_ssize_t>(i)));
    return values;
  }
};
template <class... T>
struct From<std::tuple<T...>> {
  static std::tuple<T...> python(PyObject* given) {
    const object items = items_of(given, sizeof...(T));
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return std::tuple<T...>(From<T>::python(PySequence_Fast_GET_ITEM(items.get(), static_cast<Py_ssize_t>(I)))...);
    }(std::index_sequence_for<T...>());
  }
};

// ---- functions ---------------------------------------------------------------------------------------------------

// The name of an argument, and its default.
struct arg {
  const char* name;
  object value = {};
  explicit arg(const char* name_) : name(name_) {}
  template <class T>
  arg& operator=(const T& by_default) {
    value = to_python(by_default);
    return *this;
  }
};
struct kw_only {};  // stands before the arguments that have to be named

struct Function {
  std::string documentation;  // with what Python reads the signature from
  std::vector<arg> arguments;
  size_t positional = 0;  // of the arguments: those that need not be named
  void (*target)() = nullptr;
  object (*invoke)(void (*target)(), PyObject* const* values) = nullptr;
  PyMethodDef method = {};

  // The arguments' values in order, borrowed.
  std::vector<PyObject*> values_of(PyObject* given, PyObject* named) const {
    const auto fail = [&](const char* what, const char* which) {
      PyErr_Format(PyExc_TypeError, "%s() %s%s", method.ml_name, what, which);
      throw raised();
    };
    std::vector<PyObject*> values(arguments.size());
    const auto count = static_cast<size_t>(PyTuple_GET_SIZE(given));
    if (count > positional) fail("takes fewer positional arguments", "");
    for (size_t i = 0; i < count; ++i) values[i] = PyTuple_GET_ITEM(given, static_cast<Py_ssize_t>(i));
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; named && PyDict_Next(named, &at, &key, &value);) {
      size_t i = 0;
      while (i < arguments.size() && PyUnicode_CompareWithASCIIString(key, arguments[i].name) != 0) ++i;
      if (i == arguments.size()) fail("has no argument named ", From<std::string>::python(key).c_str());
      if (values[i]) fail("got two values for ", arguments[i].name);
      values[i] = value;
    }
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (!values[i]) values[i] = arguments[i].value.get();
      if (!values[i]) fail("lacks the argument ", arguments[i].name);
    }
    return values;
  }

  static PyObject* call(PyObject* self, PyObject* given, PyObject* named) {
    try {
      const auto& f = *static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
      return f.invoke(f.target, f.values_of(given, named).data()).release();
    } catch (const raised&) {
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }
};

template <class Result, class... Arguments, size_t... I>
object invoke(Result (*target)(Arguments...), [[maybe_unused]] PyObject* const* values, std::index_sequence<I...>) {
  return to_python(target(From<std::remove_cvref_t<Arguments>>::python(values[I])...));
}

class module_ {
 public:
  explicit module_(PyObject* module) : module_at_(module) {}

  // A function by its pointer (+[] {...}), its arguments' names, and what it does.
  template <class Result, class... Arguments, class... Described>
  void def(const char* name, Result (*target)(Arguments...), const Described&... described) {
    auto* f = new Function;  // as long as the process, as the module is
    f->target = reinterpret_cast<void (*)()>(target);
    f->invoke = [](void (*any)(), PyObject* const* values) {
      return py::invoke(reinterpret_cast<Result (*)(Arguments...)>(any), values,
                        std::index_sequence_for<Arguments...>());
    };
    f->method.ml_name = name;
    f->positional = sizeof...(Arguments);
    (describe(*f, described), ...);
    if (f->arguments.size() != sizeof...(Arguments)) throw std::logic_error(std::string(name) + ": not every argument");
    add(*f);
  }

 private:
  static void describe(Function& f, const arg& argument) { f.arguments.push_back(argument); }
  static void describe(Function& f, kw_only) { f.positional = f.arguments.size(); }
  static void describe(Function& f, const char* text) { f.documentation = text; }

  void add(Function& f) const {
    std::string signature = std::string(f.method.ml_name) + "(";
    for (size_t i = 0; i < f.arguments.size(); ++i) {
      if (i) signature += ", ";
      if (i == f.positional) signature += "*, ";
      signature += f.arguments[i].name;
      if (PyObject* value = f.arguments[i].value.get())
        signature += "=" + From<std::string>::python(object(PyObject_Repr(value)).get());
    }
    f.documentation = signature + ")\n--\n\n" + f.documentation;
    f.method.ml_doc = f.documentation.c_str();
    f.method.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function::call));
    f.method.ml_flags = METH_VARARGS | METH_KEYWORDS;
    const object self(PyCapsule_New(&f, nullptr, nullptr));
    const object function(PyCFunction_NewEx(&f.method, self.get(), nullptr));
    if (PyModule_AddObjectRef(module_at_, f.method.ml_name, function.get()) < 0) throw raised();
  }

  PyObject* module_at_;
};

}  // namespace py
