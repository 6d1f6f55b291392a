// The Python binding of each op is at the end of the op's file. It consists of names, defaults and
// docstrings, and contains no logic.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <vector>

namespace segtrain {

namespace nb = nanobind;
using namespace nb::literals;

/// Registers the function `add`, which is called when the module is imported. Each file with bindings has one
/// static Binding.
struct Binding {
  using Add = void (*)(nb::module_&);
  explicit Binding(Add add) { all().push_back(add); }
  static std::vector<Add>& all();
};

}  // namespace segtrain
