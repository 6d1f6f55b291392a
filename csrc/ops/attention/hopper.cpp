// Attention with Hopper's warpgroup matrix multiplications. Small head sizes use hopper_fused.cpp, and larger
// head sizes use cuda/attention_hopper.cu. See docs/attention.md, "hopper".
#include "core/gpu.h"
#include "ops/attention/attention.h"

namespace segtrain {

namespace {

constexpr int TILE = 128, TILE_BYTES = 2 * TILE * TILE * 2;  // rows; bytes of a tile of P and dS

/// The kernel aligns its shared memory to 1024 bytes.
constexpr int ALIGN = 1024;

int forward_bytes(const Call& c) {
  return 64 * tiles(c.D, 128) * 128 * 2 + 64 * TILE * 2 + 4 * TILE * 128 * 2 + 2 * 64 * 4 + ALIGN;
}

/// Returns the maximum number of columns of dk, dv and dq that a block sums. With 128 columns, two blocks fit
/// on one multiprocessor, which is faster for small heads.
int most_columns(const Call& c) {
  return std::max(c.D, c.Dv) > 256 ? 256 : 128;
}

/// The number of blocks over which the columns are distributed, and the size in bytes of each block's ring
/// buffer of tiles. Both must have the same values as in struct Columns of the kernel source, which checks
/// this.
struct Columns {
  int blocks, bytes;
  Columns(int d, int most) {
    blocks = tiles(d, most);
    int n = tiles(tiles(d, 64), blocks) * 64;
    bytes = (n > 128 ? 4 : 3) * (64 * TILE * 2 + 64 * n * 2) + ALIGN;
  }
};

/// A range of query tiles in a range of groups. `width` is the maximum number of key tiles that a query tile
/// sees.
struct Range {
  int group, groups, tile, tiles, width;
};

int key_tiles(const Call& c, int tile) {
  int begin = c.first[tile * TILE] / TILE;
  return std::max(1, tiles(c.q_start + std::min(c.T, (tile + 1) * TILE), TILE) - begin);
}

/// Divides the queries into ranges whose tiles of P and dS need at most `bytes`. A range has at least one row
/// of tiles in one group.
std::vector<Range> ranges(const Call& c, size_t bytes) {
  const int rows = tiles(c.T, TILE), all = c.B * c.G;
  std::vector<int> width(rows);
  for (int i = 0; i < rows; ++i) width[i] = key_tiles(c, i);
  const size_t widest = *std::max_element(width.begin(), width.end()),
               unit = static_cast<size_t>(c.share()) * TILE_BYTES;
  const int at_once = std::clamp<int>(bytes / (unit * widest), 1, all);
  std::vector<Range> list;
  for (int group = 0; group < all; group += at_once) {
    int groups = std::min(at_once, all - group);
    for (int tile = 0; tile < rows;) {
      Range r{group, groups, tile, 0, 0};
      do {
        r.width = std::max(r.width, width[tile++]);
        ++r.tiles;
      } while (tile < rows && groups * unit * (r.tiles + 1) * std::max(r.width, width[tile]) <= bytes);
      list.push_back(r);
    }
  }
  return list;
}

/// Returns the number of bytes of scratch memory for P and dS. Each range reads and writes the sums of all
/// keys that it sees, so fewer and larger ranges are faster if a range sees most keys. They are also faster
/// if heads are small, because the launches of smaller ranges would have little work.
size_t scratch_bytes(const Call& c) {
  constexpr size_t some = 48 << 20, most = 256 << 20;
  if (std::max(c.D, c.Dv) <= 128) return most;
  size_t sums = static_cast<size_t>(c.B) * c.G * c.S * (c.D + c.Dv) * 4;
  int rows = tiles(c.T, TILE), widest = 0;
  for (int i = 0; i < rows; ++i) widest = std::max(widest, key_tiles(c, i));
  return 4 * widest < tiles(c.S, TILE) ? some : std::clamp(8 * sums, some, most);
}

using Values = std::map<std::string, mx::array>;

Values values_of(const Call& c, const Arrays& x) {
  return {{"q", x[0]},
          {"k", x[1]},
          {"v", x[2]},
          {"first", device_ints(c.first)},
          {"args", device_floats({c.scale, c.cap})}};
}

mx::array at_of(const Call& c, const Range& r, bool first) {
  return device_ints(
      {c.q_start, 0, c.B, c.H, c.G, c.T, c.S, r.group, r.groups, r.tile, r.tiles, r.width, first});
}

Template template_of(const Call& c) {
  return {{"T", c.dtype}, {"D", c.D}, {"DV", c.Dv}, {"CAP", c.cap > 0}, {"MOST", most_columns(c)}};
}

Arrays hopper_forward(const Call& c, const Arrays& x) {
  if (fused_forward_fits(c)) return fused_forward(c, x);
  auto values = values_of(c, x);
  values.insert({"at", at_of(c, {}, false)});
  return launch("attention_hopper", values, {{c.B, c.H, c.T, c.Dv}, {c.B, c.H, c.T}}, {c.dtype, mx::float32},
                template_of(c), {{tiles(c.T, 64) * c.B * c.H, 1, 1}, 256, forward_bytes(c), 1}, c.s);
}

Arrays hopper_vjp(const Call& c, const Arrays& x, const mx::array& d_o, const mx::array& o,
                  const mx::array& lse) {
  if (fused_vjp_fits(c)) return fused_vjp(c, x, d_o, o, lse);
  const auto args = template_of(c);
  auto with_blocks = [&](int n) {
    auto all = args;
    all.push_back({"BLOCKS", n});
    return all;
  };
  const Columns d(c.D, most_columns(c)), dv(c.Dv, most_columns(c));
  const auto list = ranges(c, scratch_bytes(c));
  auto values = values_of(c, x);
  values.insert(
      {{"lse", lse}, {"o", o}, {"d_o", mx::astype(d_o, c.dtype, c.s)}, {"at", at_of(c, list[0], false)}});
  long long most = 0;
  for (const auto& r : list) most = std::max<long long>(most, 1LL * r.groups * c.share() * r.tiles * r.width);
  check(most * TILE < (1LL << 31), "[attention] T and S are too long for one call; got ", c.T, " and ", c.S,
        ".");
  mx::Shape scratch{static_cast<int>(most * TILE), TILE}, dk{c.B, c.G, c.S, c.D}, dvs{c.B, c.G, c.S, c.Dv};
  auto begun = launch("attention_row_dot", values, {{c.B, c.H, c.T}, scratch, scratch, dk, dvs},
                      {mx::float32, c.dtype, c.dtype, mx::float32, mx::float32}, args,
                      {{tiles(c.B * c.H * c.T, 8), 1, 1}, 256}, c.s);
  values.insert(
      {{"delta", begun[0]}, {"p", begun[1]}, {"ds", begun[2]}, {"dk_sum", begun[3]}, {"dv_sum", begun[4]}});

  // These two arrays order the writes: the scores of a range wait for the sums of the previous range, and the
  // sums of a range wait for the scores of the same range.
  auto keys_done = values.at("args"), queries_done = x[0];
  Arrays parts, groups;
  for (const auto& r : list) {
    const int heads = r.groups * c.share(), rows = std::min(c.T, (r.tile + r.tiles) * TILE) - r.tile * TILE;
    values.insert_or_assign("at", at_of(c, r, r.tile == 0));
    values.insert_or_assign("keys_done", keys_done);
    values.insert_or_assign("queries_done", queries_done);
    auto done = launch("attention_scores_vjp", values, {{8}}, {mx::int32}, args,
                       {{heads * r.tiles * r.width, 1, 1}, 256, 3 * 2 * TILE * 128 + ALIGN, 2}, c.s)[0];
    values.insert_or_assign("scores_done", done);
    keys_done = launch(
        "attention_keys_vjp", values, {{1}}, {mx::float32}, with_blocks(d.blocks + dv.blocks),
        {{tiles(c.S, TILE) * r.groups * (d.blocks + dv.blocks), 1, 1}, 256, std::max(d.bytes, dv.bytes), 1},
        c.s)[0];
    queries_done =
        launch("attention_queries_vjp", values, {{heads, rows, c.D}}, {c.dtype}, with_blocks(d.blocks),
               {{heads * r.tiles * d.blocks, 1, 1}, 256, d.bytes, 1}, c.s)[0];
    parts.push_back(queries_done);
    if (r.tile + r.tiles < tiles(c.T, TILE)) continue;
    groups.push_back(parts.size() == 1 ? parts[0] : mx::concatenate(parts, 1, c.s));
    parts.clear();
  }
  // `keys_done` is 0. Adding it makes the results depend on the last range's sums.
  auto rounded = [&](const char* sum) {
    return mx::astype(mx::add(values.at(sum), keys_done, c.s), c.dtype, c.s);
  };
  auto dq = groups.size() == 1 ? groups[0] : mx::concatenate(groups, 0, c.s);
  return {mx::reshape(dq, {c.B, c.H, c.T, c.D}, c.s), rounded("dk_sum"), rounded("dv_sum")};
}

}  // namespace

std::string hopper_attention_unfit(const Call& c) {
  if (c.device != Gpu::cuda || compute_capability() != 90) return "it needs a GPU of compute capability 9.0";
  if (c.dtype == mx::float32) return "its matrix units support half precision only";
  bool fits = c.D % 8 == 0 && c.Dv % 8 == 0 && c.D <= 512 && c.Dv <= 512;
  return fits ? "" : "it supports head sizes in multiples of 8 up to 512";
}

const AttentionWay hopper_attention{hopper_forward, hopper_vjp};

}  // namespace segtrain
