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

  /// y, and what its backward pass takes: z [M, R] and factors in the activations' dtype; none without a
  /// low-rank branch. `ab`: a and b of those linears that have them.
  struct Forward {
    mx::array y;
    Arrays kept;
  };
  Forward forward(const mx::array& x, const Arrays& ab) const;

  /// dx, and u = scale·dy·b [M, R] if there is a low-rank branch.
  struct Backward {
    mx::array dx;
    std::optional<mx::array> u;
  };
  Backward dx(const mx::array& dy, const Arrays& kept) const;

  /// Gradients of `ab`.
  Arrays gradients(const Arrays& ab, const mx::array& x, const mx::array& dy, const mx::array& z,
                   const mx::array& u) const;

 private:
  /// [x z]·[W b]ᵀ and the like: `beside` stands beside or below W, `other` makes the rest of the branch.
  std::pair<mx::array, mx::array> product(const mx::array& x, bool transpose, const mx::array& beside,
                                          const mx::array& other) const;
  mx::array bias() const;
  /// Ranks and widths as the kernels read them.
  mx::array places(int rows) const;
  mx::array scales() const;

  std::vector<Base> bases_;
  std::vector<float> scales_;
  std::vector<int> ranks_, widths_;
  int k_, n_ = 0, r_;  ///< in, out and ranks of all
  mx::Dtype dtype_;
  mx::StreamOrDevice s_;
};

/// The `n` arrays that `split` makes of the y of linears that read x [M, in] as one product; `join` makes y's
/// gradient of theirs, and of y, which is kept for it where `keeps_y`.
struct Parts {
  size_t n;
  std::function<Arrays(const mx::array& y)> split;
  std::function<mx::array(const Arrays& dys, const std::optional<mx::array>& y)> join;
  bool keeps_y = false;
};
Arrays joint_linears(const mx::array& x, const std::vector<Linear>& linears, const Parts& parts,
                     mx::StreamOrDevice s);

}  // namespace segtrain
