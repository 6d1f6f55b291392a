// Gathers rows of a table by index, and computes the gradient of the table. The host code is in csrc/ops/rows/rows.cpp.
//
// One block computes one row of the output. x and y have the dtype T. index [m] int32 selects m of the n rows of a table
// with W columns.

namespace segtrain {

/// y [m, W] <- x[index]
template <typename T>
__device__ void take_rows(const T* x, const int* index, T* y, int width) {
  const T* from = x + static_cast<size_t>(index[blockIdx.x]) * width;
  T* to = y + static_cast<size_t>(blockIdx.x) * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

/// Row i of y [n, W] is the sum of the rows of x [m, W] whose index is i, added in order.
template <typename T>
__device__ void put_rows(const T* x, const int* index, T* y, int m, int width) {
  const int row = blockIdx.x;
  T* to = y + static_cast<size_t>(row) * width;
  bool none = true;
  for (int begin = 0; begin < m; begin += blockDim.x) {
    const int j = begin + threadIdx.x, end = min(m, begin + static_cast<int>(blockDim.x));
    if (!__syncthreads_or(j < m && index[j] == row)) continue;
    for (int k = begin; k < end; ++k) {
      if (index[k] != row) continue;
      const T* from = x + static_cast<size_t>(k) * width;
      for (int i = threadIdx.x; i < width; i += blockDim.x)
        put(to[i], to_float(from[i]) + (none ? 0.0f : to_float(to[i])));
      none = false;
    }
  }
  if (none)
    for (int i = threadIdx.x; i < width; i += blockDim.x) put(to[i], 0.0f);
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. Here, at = {m, W}.

//: take_rows: x index at -> taken
take_rows(x, index, taken, at[1]);
//: put_rows: x index at -> summed
put_rows(x, index, summed, at[0], at[1]);
