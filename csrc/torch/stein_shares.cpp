// What processes compute that share a Stein direction, or the search for a median: fekernels/distributed calls these.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/dispatch.h"
#include "torch/large_tensors.h"
#include "torch/registration.h"
#include "torch/stein_codes.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

bool is_plain(const Tensor& tensor, ScalarType dtype) { return tensor.scalar_type() == dtype && tensor.is_contiguous(); }

void check_rows(const Tensor& tensor, int64_t d) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) &&
                      tensor.dim() == 2 && tensor.is_contiguous() && tensor.size(1) == d,
                  "rows must be contiguous float32, bfloat16 or float16 of shape [rows, ", d, "]");
}

void check_floats(const Tensor& tensor, const char* name, int64_t least) {
  STD_TORCH_CHECK(is_plain(tensor, ScalarType::Float) && tensor.numel() >= least, name,
                  " must be contiguous float32 of at least ", least, " elements");
}

void check_records(const Tensor& tensor, const char* name, int64_t floats) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 && tensor.size(1) == floats &&
                      tensor.stride(1) == 1 && tensor.stride(0) >= floats,
                  name, " must be float32 [records, ", floats, "], whose rows are contiguous");
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
float* floats(Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// What every share of one direction is told; `numbers`: beta, c, temperature.
fe::SvgdCall call_of(int64_t n, int64_t d, int64_t kernel, const Tensor& bandwidth, const std::vector<double>& numbers) {
  fe::check_kernel(kernel);
  STD_TORCH_CHECK(n >= 1 && d >= 1, "n and d must be positive; got ", n, " and ", d);
  STD_TORCH_CHECK(is_plain(bandwidth, ScalarType::Float) && bandwidth.numel() == 1, "bandwidth must be one float32 element");
  STD_TORCH_CHECK(numbers.size() == 3, "numbers must be beta, c and temperature");
  fe::SvgdCall call{};
  call.n = n;
  call.d = d;
  call.kernel = static_cast<int>(kernel);
  call.params = {static_cast<float>(numbers[0]), static_cast<float>(numbers[1])};
  call.temperature = static_cast<float>(numbers[2]);
  call.bandwidth = floats(bandwidth)[0];
  call.parallel_for = fe::parallel_for;
  return call;
}

void set_rows(fe::SvgdCall& call, const Tensor& particles, const Tensor& scores) {
  check_rows(particles, call.d);
  check_rows(scores, call.d);
  STD_TORCH_CHECK(particles.size(0) == scores.size(0), "particles and scores must have as many rows");
  call.particles = particles.const_data_ptr();
  call.particles_dtype = fe::dtype_of(particles);
  call.scores = scores.const_data_ptr();
  call.scores_dtype = fe::dtype_of(scores);
}

fe::SvgdShare share_of(const fe::SvgdCall& call, bool sharp, Tensor& fixed, Tensor& sums) {
  const fe::SvgdLayout layout = fe::cpu_kernels().svgd_layout(call, sharp);
  STD_TORCH_CHECK(layout.algorithm == fe::SvgdLayout::kTiles, "so few particles are no problem of tiles");
  check_records(fixed, "fixed", layout.fixed);
  check_records(sums, "sums", layout.sums);
  return {call, sharp, floats(fixed), floats(sums), fixed.stride(0), sums.stride(0)};
}

// Records and blocks must exist.
void check_blocks(const fe::SvgdShare& share, const std::vector<int64_t>& blocks, const Tensor& fixed, const Tensor& sums,
                  int64_t rows) {
  const fe::SvgdLayout layout = fe::cpu_kernels().svgd_layout(share.call, share.sharp);
  const int64_t all = (share.call.n + layout.block - 1) / layout.block;
  STD_TORCH_CHECK(blocks.size() % 3 == 0, "blocks must be threes of record, number and first row");
  for (size_t at = 0; at < blocks.size(); at += 3) {
    const int64_t record = blocks[at], index = blocks[at + 1], first = blocks[at + 2];
    STD_TORCH_CHECK(record >= 0 && record < fixed.size(0) && record < sums.size(0) &&
                        index >= 0 && index < all && first >= 0 &&
                        first + std::min(layout.block, share.call.n - index * layout.block) <= rows,
                    "no such record, block or row: ", record, ", ", index, ", ", first);
  }
}

// algorithm, particles of a block, blocks of a group, floats of its two records, whether centred, columns of a segment, floats
// of its products; `like` says the device.
std::vector<int64_t> svgd_layout_cpu(Tensor, int64_t n, int64_t d, int64_t kernel, bool sharp) {
  fe::check_kernel(kernel);
  STD_TORCH_CHECK(n >= 1 && d >= 1, "n and d must be positive; got ", n, " and ", d);
  fe::SvgdCall call{};
  call.n = n;
  call.d = d;
  call.kernel = static_cast<int>(kernel);
  const fe::SvgdLayout layout = fe::cpu_kernels().svgd_layout(call, sharp);
  return {layout.algorithm, layout.block, layout.group, layout.fixed, layout.sums, layout.centred, layout.segment,
          layout.products};
}

// Memory of records: kept for the next call and on huge pages, as one process has its own.
Tensor svgd_memory_cpu(Tensor like, int64_t floats) { return fe::empty_large(like, {&floats, size_t{1}}); }

void svgd_add_columns_cpu(Tensor sums, Tensor rows) {
  STD_TORCH_CHECK(is_plain(sums, ScalarType::Double) && sums.dim() == 1, "sums must be contiguous float64 [d]");
  check_rows(rows, sums.numel());
  fe::SvgdCall call{};
  call.d = sums.numel();
  call.particles = rows.const_data_ptr();
  call.particles_dtype = fe::dtype_of(rows);
  fe::cpu_kernels().svgd_add_columns(call, rows.size(0), static_cast<double*>(sums.data_ptr()));
}

Tensor svgd_prepare_cpu(Tensor particles, Tensor scores, Tensor means, Tensor bandwidth, Tensor fixed, Tensor sums,
                        std::vector<int64_t> blocks, int64_t n, int64_t kernel, std::vector<double> numbers, bool sharp) {
  STD_TORCH_CHECK(particles.dim() == 2, "particles must have shape [rows, d]");
  fe::SvgdCall call = call_of(n, particles.size(1), kernel, bandwidth, numbers);
  set_rows(call, particles, scores);
  check_floats(means, "means", call.d);
  const fe::SvgdShare share = share_of(call, sharp, fixed, sums);
  const int64_t rows = particles.size(0);
  check_blocks(share, blocks, fixed, sums, rows);
  Tensor norms = torch::stable::empty({&rows, size_t{1}}, ScalarType::Float);
  fe::cpu_kernels().svgd_prepare(share, blocks.data(), static_cast<int64_t>(blocks.size()) / 3, floats(means),
                                       floats(norms));
  return norms;
}

void svgd_meet_cpu(Tensor bandwidth, Tensor fixed, Tensor sums, std::vector<int64_t> pairings, int64_t n, int64_t d,
                   int64_t kernel, std::vector<double> numbers, bool sharp) {
  const fe::SvgdShare share = share_of(call_of(n, d, kernel, bandwidth, numbers), sharp, fixed, sums);
  const fe::SvgdLayout layout = fe::cpu_kernels().svgd_layout(share.call, sharp);
  const int64_t blocks = (n + layout.block - 1) / layout.block, groups = (blocks + layout.group - 1) / layout.group;
  STD_TORCH_CHECK(pairings.size() % 4 == 0, "pairings must be fours of two groups and their records");
  for (size_t at = 0; at < pairings.size(); at += 4)
    for (int side = 0; side < 2; ++side) {
      const int64_t group = pairings[at + side], record = pairings[at + 2 + side];
      const int64_t first = group * layout.group, count = std::min(layout.group, blocks - first);
      const int64_t end = record * layout.group + count;
      STD_TORCH_CHECK(pairings[at] <= pairings[at + 1] && group >= 0 && group < groups && record >= 0 &&
                          end <= fixed.size(0) && end <= sums.size(0),
                      "no such group or record: ", group, ", ", record);
    }
  fe::cpu_kernels().svgd_meet(share, pairings.data(), static_cast<int64_t>(pairings.size()) / 4);
}

Tensor svgd_totals_cpu(Tensor bandwidth, Tensor fixed, Tensor sums, std::vector<int64_t> blocks, int64_t rows, int64_t n,
                       int64_t d, int64_t kernel, std::vector<double> numbers, bool sharp) {
  const fe::SvgdShare share = share_of(call_of(n, d, kernel, bandwidth, numbers), sharp, fixed, sums);
  check_blocks(share, blocks, fixed, sums, rows);
  const int64_t size[2] = {rows, d};
  Tensor totals = torch::stable::empty({size, size_t{2}}, ScalarType::Float);
  fe::cpu_kernels().svgd_totals(share, blocks.data(), static_cast<int64_t>(blocks.size()) / 3, floats(totals));
  return totals;
}

Tensor svgd_complete_cpu(Tensor totals, Tensor particles, Tensor scores, Tensor bandwidth, int64_t n, int64_t kernel,
                         std::vector<double> numbers) {
  STD_TORCH_CHECK(particles.dim() == 2, "particles must have shape [rows, d]");
  fe::SvgdCall call = call_of(n, particles.size(1), kernel, bandwidth, numbers);
  set_rows(call, particles, scores);
  check_floats(totals, "totals", particles.numel());
  Tensor out = fe::empty_large(particles, particles.sizes());
  call.direction = out.data_ptr();
  fe::cpu_kernels().svgd_complete(call, particles.size(0), floats(totals));
  return out;
}

// [segments, floats of one]: of columns [n, some of d], which begin where a segment does.
Tensor svgd_wide_products_cpu(Tensor columns, int64_t d, bool differences) {
  STD_TORCH_CHECK(columns.dim() == 2 && columns.size(1) <= d, "columns must have shape [n, at most d]");
  check_rows(columns, columns.size(1));
  fe::SvgdCall call{};
  call.n = columns.size(0);
  call.d = d;
  const fe::SvgdLayout layout = fe::cpu_kernels().svgd_layout(call, false);
  STD_TORCH_CHECK(layout.algorithm == fe::SvgdLayout::kWide, "so few columns are no wide problem");
  call.d = columns.size(1);
  call.particles = columns.const_data_ptr();
  call.particles_dtype = fe::dtype_of(columns);
  call.parallel_for = fe::parallel_for;
  const int64_t size[2] = {(call.d + layout.segment - 1) / layout.segment, layout.products};
  Tensor segments = torch::stable::empty({size, size_t{2}}, ScalarType::Float);
  if (call.d > 0) fe::cpu_kernels().svgd_wide_products(call, d, differences, floats(segments));
  return segments;
}

Tensor svgd_wide_share_cpu(Tensor particles, Tensor scores, Tensor products, Tensor bandwidth, int64_t d, int64_t kernel,
                           std::vector<double> numbers, bool sharp) {
  STD_TORCH_CHECK(particles.dim() == 2 && particles.size(1) <= d, "particles must have shape [n, at most d]");
  fe::SvgdCall call = call_of(particles.size(0), d, kernel, bandwidth, numbers);
  const fe::SvgdLayout layout = fe::cpu_kernels().svgd_layout(call, false);
  STD_TORCH_CHECK(layout.algorithm == fe::SvgdLayout::kWide, "so few columns are no wide problem");
  check_floats(products, "products", layout.products);
  call.d = particles.size(1);
  set_rows(call, particles, scores);
  Tensor out = fe::empty_large(particles, particles.sizes());
  call.direction = out.data_ptr();
  if (call.d > 0) fe::cpu_kernels().svgd_wide_share(call, d, sharp, floats(products));
  return out;
}

int64_t sq_dist_tiles_cpu(Tensor, int64_t n, int64_t others) { return fe::cpu_kernels().sq_dist_tiles(n, others); }

// Counts: below the bracket, and in its bins; and those distances inside it for which there is room, float32 as they were found.
std::vector<Tensor> sq_dist_scan_cpu(Tensor particles, std::optional<Tensor> others, Tensor means, int64_t low, int64_t high,
                                     int64_t begin, int64_t end, int64_t room) {
  STD_TORCH_CHECK(particles.dim() == 2 && particles.size(1) > 0, "particles must have shape [n, d]");
  const int64_t n = particles.size(0), d = particles.size(1);
  check_rows(particles, d);
  if (others) {
    check_rows(*others, d);
    STD_TORCH_CHECK(others->scalar_type() == particles.scalar_type(), "others must have the particles' dtype");
  }
  check_floats(means, "means", d);
  STD_TORCH_CHECK(0 <= low && low <= high && high <= 0x7f800000, "low and high must be the bits of numbers >= 0");
  const int64_t tiles = fe::cpu_kernels().sq_dist_tiles(n, others ? others->size(0) : -1);
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= tiles && room >= 0, "begin and end must be in [0, ", tiles, "]");
  const int64_t bins = 1 + fe::kScanBins;
  Tensor counts = torch::stable::empty({&bins, size_t{1}}, ScalarType::Long);
  Tensor keys = fe::empty_large(means, {&room, size_t{1}});
  fe::cpu_kernels().sq_dist_scan({n, others ? others->size(0) : 0, d, particles.const_data_ptr(),
                                  others ? others->const_data_ptr() : nullptr, fe::dtype_of(particles), floats(means),
                                  static_cast<uint32_t>(low), static_cast<uint32_t>(high), begin, end, room,
                                  static_cast<int64_t*>(counts.data_ptr()), static_cast<uint32_t*>(keys.data_ptr()),
                                  fe::parallel_for});
  return {counts, keys};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fekernels_native, m) {
  m.def("svgd_layout(Tensor like, int n, int d, int kernel, bool sharp) -> int[]");
  m.def("svgd_memory(Tensor like, int floats) -> Tensor");
  m.def("svgd_add_columns(Tensor(a!) sums, Tensor rows) -> ()");
  m.def(
      "svgd_prepare(Tensor particles, Tensor scores, Tensor means, Tensor bandwidth, Tensor(a!) fixed, Tensor(b!) sums, "
      "int[] blocks, int n, int kernel, float[] numbers, bool sharp) -> Tensor");
  m.def(
      "svgd_meet(Tensor bandwidth, Tensor fixed, Tensor(a!) sums, int[] pairings, int n, int d, int kernel, float[] numbers, "
      "bool sharp) -> ()");
  m.def(
      "svgd_totals(Tensor bandwidth, Tensor fixed, Tensor(a!) sums, int[] blocks, int rows, int n, int d, int kernel, "
      "float[] numbers, bool sharp) -> Tensor");
  m.def(
      "svgd_complete(Tensor totals, Tensor particles, Tensor scores, Tensor bandwidth, int n, int kernel, float[] numbers) "
      "-> Tensor");
  m.def("svgd_wide_products(Tensor columns, int d, bool differences) -> Tensor");
  m.def(
      "svgd_wide_share(Tensor particles, Tensor scores, Tensor products, Tensor bandwidth, int d, int kernel, "
      "float[] numbers, bool sharp) -> Tensor");
  m.def("sq_dist_tiles(Tensor like, int n, int others) -> int");
  m.def(
      "sq_dist_scan(Tensor particles, Tensor? others, Tensor means, int low, int high, int begin, int end, int room) "
      "-> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CPU, m) {
  m.impl("svgd_layout", TORCH_BOX(&svgd_layout_cpu));
  m.impl("svgd_memory", TORCH_BOX(&svgd_memory_cpu));
  m.impl("svgd_add_columns", TORCH_BOX(&svgd_add_columns_cpu));
  m.impl("svgd_prepare", TORCH_BOX(&svgd_prepare_cpu));
  m.impl("svgd_meet", TORCH_BOX(&svgd_meet_cpu));
  m.impl("svgd_totals", TORCH_BOX(&svgd_totals_cpu));
  m.impl("svgd_complete", TORCH_BOX(&svgd_complete_cpu));
  m.impl("svgd_wide_products", TORCH_BOX(&svgd_wide_products_cpu));
  m.impl("svgd_wide_share", TORCH_BOX(&svgd_wide_share_cpu));
  m.impl("sq_dist_tiles", TORCH_BOX(&sq_dist_tiles_cpu));
  m.impl("sq_dist_scan", TORCH_BOX(&sq_dist_scan_cpu));
}
