// Linear layers that read the same x. On CUDA they are computed as one matrix product that includes their
// low-rank updates.
#pragma once

#include "ops/linear/base.h"

namespace segtrain {

/// y = x·Wᵀ + z·bᵀ with z = x·a, where W, a and b are the concatenated arrays of all layers.
///
/// For each matrix product, W is dequantized into a scratch array, and the low-rank update becomes part of
/// the product. If the input is narrower than the output, the product is [x z]·[W b]ᵀ: the input is copied
/// with R columns appended, where R is the total rank. Otherwise it is x·[W; aᵀ]ᵀ = [y z]: R rows are
/// appended to the weight, and the update is added to y in one pass. A separate matrix product with R columns
/// would reach only 1 % of the device's peak.
class JointLinear {
 public:
  /// Returns why JointLinear does not support x [rows, ·] of `dtype`, or an empty string if it does.
  static std::string unfit(const std::vector<Linear>& linears, int rows, mx::Dtype dtype,
                           mx::StreamOrDevice s);

  JointLinear(const std::vector<Linear>& linears, mx::Dtype dtype, mx::StreamOrDevice s);

  /// y and the arrays for the backward pass. If there is a low-rank branch, these are z [M, R] and the
  /// factors in the dtype of x; otherwise there are none. The parameter `ab` contains a and b of the layers
  /// that have them.
  struct Forward {
    mx::array y;
    Arrays kept;
  };
  Forward forward(const mx::array& x, const Arrays& ab) const;

  /// dx and, if there is a low-rank branch, u = scale·dy·b [M, R].
  struct Backward {
    mx::array dx;
    std::optional<mx::array> u;
  };
  Backward dx(const mx::array& dy, const Arrays& kept) const;

  /// Returns the gradients with respect to `ab`.
  Arrays gradients(const Arrays& ab, const mx::array& x, const mx::array& dy, const mx::array& z,
                   const mx::array& u) const;

 private:
  /// Computes one of the matrix products above, such as [x z]·[W b]ᵀ. `beside` is the low-rank factor that is
  /// appended to W, and `other` is the branch's other factor.
  std::pair<mx::array, mx::array> product(const mx::array& x, bool transpose, const mx::array& beside,
                                          const mx::array& other) const;
  mx::array bias() const;
  /// Returns the ranks and widths in the layout that the kernels read.
  mx::array places(int rows) const;
  mx::array scales() const;

  std::vector<Base> bases_;
  std::vector<float> scales_;
  std::vector<int> ranks_, widths_;
  int k_, n_ = 0, r_;  ///< input width; total output width; total rank, padded
  mx::Dtype dtype_;
  mx::StreamOrDevice s_;
};

/// Keeps the arrays z that only a product with the whole weight yields (those of layers whose input is wider
/// than their output), so that a stage that is recomputed for its backward pass need not repeat these
/// products.
///
/// While an instance exists, the layers that run on this thread append their z to `made` or, if `given` is
/// not empty, take their z from `given`, in the same order.
class KeptProducts {
 public:
  explicit KeptProducts(Arrays given);
  ~KeptProducts();
  KeptProducts(const KeptProducts&) = delete;
  KeptProducts& operator=(const KeptProducts&) = delete;

  /// Returns the kept array instead of z if there is one, and keeps z otherwise.
  static mx::array exchange(const mx::array& z);

  Arrays made;

 private:
  Arrays given_;
  size_t next_ = 0;
  KeptProducts* outer_;
};

/// `split` computes `n` arrays from y, the joint output of linear layers. `join` computes the gradient of y
/// from the gradients of these arrays. If `keeps_y` is set, y is kept for the backward pass and passed to
/// `join`.
struct Parts {
  size_t n;
  std::function<Arrays(const mx::array& y)> split;
  std::function<mx::array(const Arrays& dys, const std::optional<mx::array>& y)> join;
  bool keeps_y = false;
};
/// Returns the arrays that `parts.split` computes for linear layers that read x [M, in].
Arrays joint_linears(const mx::array& x, const std::vector<Linear>& linears, const Parts& parts,
                     mx::StreamOrDevice s);

}  // namespace segtrain
