// What bindings.cpp needs of Python: functions of numbers, byte strings and arrays of numbers made
// callable by position, and errors handed over.
//
// All of it is in the stable ABI of Python 3.10 (CMakeLists.txt sets Py_LIMITED_API), so that one
// module serves that Python and every later one. pybind11 would take half of a build's time.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace dsd::python {

// Thrown where Python has its exception set already.
struct ErrorIsSet {};

[[noreturn]] inline void raise(PyObject* kind, const char* words) {
    PyErr_SetString(kind, words);
    throw ErrorIsSet{};
}

// ---- arguments ----

template <class T>
struct From;

template <>
struct From<bool> {
    static bool get(PyObject* object) {
        if (!PyBool_Check(object)) raise(PyExc_TypeError, "expected True or False");
        return object == Py_True;
    }
};

template <>
struct From<int64_t> {
    static int64_t get(PyObject* object) {
        const long long value = PyLong_AsLongLong(object);
        if (value == -1 && PyErr_Occurred() != nullptr) throw ErrorIsSet{};
        return value;
    }
};

template <>
struct From<int> {
    static int get(PyObject* object) {
        const int64_t value = From<int64_t>::get(object);
        if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
            raise(PyExc_OverflowError, "a number too large for an int");
        }
        return static_cast<int>(value);
    }
};

// An address.
template <>
struct From<std::uintptr_t> {
    static std::uintptr_t get(PyObject* object) {
        const std::size_t value = PyLong_AsSize_t(object);
        if (value == static_cast<std::size_t>(-1) && PyErr_Occurred() != nullptr) {
            throw ErrorIsSet{};
        }
        return value;
    }
};

template <>
struct From<double> {
    static double get(PyObject* object) {
        const double value = PyFloat_AsDouble(object);
        if (value == -1.0 && PyErr_Occurred() != nullptr) throw ErrorIsSet{};
        return value;
    }
};

// From bytes.
template <>
struct From<std::string> {
    static std::string get(PyObject* object) {
        char* bytes = nullptr;
        Py_ssize_t size = 0;
        if (PyBytes_AsStringAndSize(object, &bytes, &size) != 0) throw ErrorIsSet{};
        return {bytes, static_cast<std::size_t>(size)};
    }
};

// From a sequence of N.
template <class T, std::size_t N>
struct From<std::array<T, N>> {
    static std::array<T, N> get(PyObject* object) {
        const Py_ssize_t size = PySequence_Size(object);
        if (size < 0) throw ErrorIsSet{};
        if (size != static_cast<Py_ssize_t>(N)) {
            PyErr_Format(PyExc_TypeError, "expected %zd values, got %zd",
                         static_cast<Py_ssize_t>(N), size);
            throw ErrorIsSet{};
        }
        std::array<T, N> values = {};
        for (std::size_t i = 0; i < N; ++i) {
            struct Item {
                PyObject* object;
                ~Item() { Py_XDECREF(object); }
            } item{PySequence_GetItem(object, static_cast<Py_ssize_t>(i))};
            if (item.object == nullptr) throw ErrorIsSet{};
            values[i] = From<T>::get(item.object);
        }
        return values;
    }
};

// ---- results ----

template <class T>
PyObject* to_python(T value) {
    if constexpr (std::is_same_v<T, PyObject*>) {
        return value;
    } else if constexpr (std::is_same_v<T, bool>) {
        return PyBool_FromLong(value);
    } else {
        static_assert(std::is_integral_v<T>);
        return PyLong_FromLongLong(value);
    }
}

// ---- calls ----

template <class R, class... A, std::size_t... I>
PyObject* call(R (*function)(A...), PyObject* const* arguments, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<R>) {
        function(From<std::decay_t<A>>::get(arguments[I])...);
        Py_INCREF(Py_None);
        return Py_None;
    } else {
        return to_python(function(From<std::decay_t<A>>::get(arguments[I])...));
    }
}

template <class R, class... A>
PyObject* checked_call(R (*function)(A...), PyObject* const* arguments, Py_ssize_t n) {
    constexpr auto expected = static_cast<Py_ssize_t>(sizeof...(A));
    if (n != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, n);
        return nullptr;
    }
    try {
        return call(function, arguments, std::index_sequence_for<A...>{});
    } catch (const ErrorIsSet&) {
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

template <auto function>
PyObject* entry(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t n) {
    return checked_call(function, arguments, n);
}

// A line of the module's table of functions.
template <auto function>
PyMethodDef method(const char* name, const char* doc = nullptr) {
    // By way of a pointer that fits any function: the two signatures differ, METH_FASTCALL says so.
    const auto any = reinterpret_cast<void (*)()>(&entry<function>);
    return {name, reinterpret_cast<PyCFunction>(any), METH_FASTCALL, doc};
}

// Lets other Python threads run for as long as it lives.
class WithoutGil {
  public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    ~WithoutGil() { PyEval_RestoreThread(state_); }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

  private:
    PyThreadState* state_;
};

}  // namespace dsd::python
