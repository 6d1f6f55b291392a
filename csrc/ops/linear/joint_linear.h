// Linears that read the same x, as one product on CUDA, with their low-rank updates in it.
#pragma once

#include "ops/linear/base.h"

namespace segtrain {

/// y = x·Wᵀ + z·bᵀ with z = x·a; W, a and b those of all linears, one below the other.
///
/// W is unpacked into a scratch array for each product, and the update rides in the product. Where the side
/// that is read is the narrower one, it is copied with the rank's columns behind it, [x z]·[W b]ᵀ; else the
/// weight gets the rank's rows below it, x·[W; aᵀ]ᵀ = [y z], and the update is one pass over the narrower y.
/// A product of R columns by itself would run at 1 % of the device.
class JointLinear {
 public:
  /// Why it cannot serve x [rows, ·] of `dtype`; empty if it can.
  static std::string unfit(const std::vector<Linear>& linears, int rows, mx::Dtype dtype,
                           mx::StreamOrDevice s);

  JointLinear(const std::vector<Linear>& linears, mx::Dtype dtype, mx::StreamOrDevice s);

  struct Factors {
    std::optional<mx::array> a_rows, a_columns, b_rows, b_columns;  ///< in the activations' dtype; b scaled
  };
  /// `ab`: a and b of those linears that have them.
  Factors prepare(const Arrays& ab) const;

  /// A product, and [M, R] of the low-rank branch (empty without one).
  struct Result {
    mx::array y;
    std::optional<mx::array> low;
  };
  Result forward(const mx::array& x, const Factors& f) const;  ///< {y, z}
  Result dx(const mx::array& dy, const Factors& f) const;      ///< {dx, u = scale·dy·b}

  /// Gradients of `ab`; z and u are [M, R].
  Arrays gradients(const Arrays& ab, const mx::array& x, const mx::array& dy, const mx::array& z,
                   const mx::array& u) const;
  /// y by linear.
  Arrays split(const mx::array& y) const;

 private:
  mx::array outer(const mx::array& x, const mx::array& low, bool turned) const;
  Result product(const mx::array& x, bool transpose, const Factors& f) const;

  std::vector<Base> bases_;
  std::vector<float> scales_;
  std::vector<int> ranks_, widths_;
  int k_, n_ = 0, r_;
  mx::Dtype dtype_;
  mx::StreamOrDevice s_;
};

}  // namespace segtrain
