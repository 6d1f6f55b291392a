// Linear layers that read the same x, computed on CUDA as one product that includes their low-rank updates.
#pragma once

#include "ops/linear/base.h"

namespace segtrain {

/// y = x·Wᵀ + z·bᵀ with z = x·a, where W, a and b are those of all layers, concatenated.
///
/// For each product W is unpacked into a scratch array, and the update is made part of the product. If the
/// input is narrower than the output, it is copied with R columns appended: [x z]·[W b]ᵀ. Otherwise R rows
/// are appended to the weight, x·[W; aᵀ]ᵀ = [y z], and the update is one pass over y. A separate product of R
/// columns would reach only 1 % of the device's peak.
class JointLinear {
 public:
  /// Why it does not support x [rows, ·] of `dtype`; empty if it does.
  static std::string unfit(const std::vector<Linear>& linears, int rows, mx::Dtype dtype,
                           mx::StreamOrDevice s);

  JointLinear(const std::vector<Linear>& linears, mx::Dtype dtype, mx::StreamOrDevice s);

  /// y, and what its backward pass needs: z [M, R] and the factors in the dtype of x, or nothing without a
  /// low-rank branch. `ab`: a and b of the layers that have them.
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
  /// One of the products above, such as [x z]·[W b]ᵀ. `beside` is the factor that is appended to W, `other`
  /// is the other factor of the branch.
  std::pair<mx::array, mx::array> product(const mx::array& x, bool transpose, const mx::array& beside,
                                          const mx::array& other) const;
  mx::array bias() const;
  /// Ranks and widths, in the layout that the kernels read.
  mx::array places(int rows) const;
  mx::array scales() const;

  std::vector<Base> bases_;
  std::vector<float> scales_;
  std::vector<int> ranks_, widths_;
  int k_, n_ = 0, r_;  ///< input width; total output width; total rank, padded
  mx::Dtype dtype_;
  mx::StreamOrDevice s_;
};

/// `split` computes `n` arrays from y, the joint product of linear layers. `join` computes the gradient of y
/// from those of the arrays and, if `keeps_y`, from y, which is then kept for the backward pass.
struct Parts {
  size_t n;
  std::function<Arrays(const mx::array& y)> split;
  std::function<mx::array(const Arrays& dys, const std::optional<mx::array>& y)> join;
  bool keeps_y = false;
};
/// The arrays that `parts.split` computes, for linear layers that read x [M, in].
Arrays joint_linears(const mx::array& x, const std::vector<Linear>& linears, const Parts& parts,
                     mx::StreamOrDevice s);

}  // namespace segtrain
