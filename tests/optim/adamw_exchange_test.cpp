// SPDX-License-Identifier: Apache-2.0
// AdamW on the contributions of all ranks gives the bits of reduce_mean into an f32 shard and AdamW
// on that, from any layout and alignment; copies of the weight are what the weight is.
#include "octet/optim/adamw.hpp"
#include "support/adamw_blocks.hpp"
#include "support/adamw_formats.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

using Bytes = std::vector<std::uint8_t>;
using S = StateFormat;

const StateFormats kTile = {WeightFormat::e4m3_tile, S::f16, S::e4m3, S::f16};
const StateFormats kTileOfBlocks = {WeightFormat::e4m3_tile, S::f32, S::e4m3_block, S::f16};

const std::vector<Shape> kVectors = {{1}, {129}, {2049}, {16385}, {40009}};
const std::vector<Shape> kMatrices = {{296, 256}, {136, 256}, {300, 128}, {17, 61}, {1, 300}};

std::vector<Shape> shapes_of(const StateFormats& formats) {
  std::vector<Shape> shapes = kMatrices;
  if (!needs_matrix(formats.weight)) shapes.insert(shapes.end(), kVectors.begin(), kVectors.end());
  return shapes;
}

/// Of every tensor all panels but each second one, so that the shard has gaps; of one none.
std::vector<Piece> pieces_of(std::size_t i, const Shape& shape) {
  std::vector<Piece> pieces;
  if (i == 3) return pieces;
  const std::vector<Piece> panels = panels_of(static_cast<std::int32_t>(i), shape);
  for (std::size_t p = 0; p < panels.size(); p += 2) pieces.push_back(panels[p]);
  return pieces;
}
std::int64_t owned_by(const std::vector<Piece>& pieces) {
  std::int64_t count = 0;
  for (const Piece& piece : pieces) count += piece.count;
  return count;
}

enum class Layout { whole, shard, own_whole };
/// What a run's steps read: the shard that reduce_mean filled, in f32 or in the contributions'
/// dtype, the contributions, or an f32 shard and these in turn.
enum class Source { shard, rounded, contributions, both };

struct ExchangeCase {
  StateFormats formats;
  DType dtype = DType::e4m3;
  int ranks = 1;
};

/// All ranks' gradients of all tensors. Few are different, so that many ranks cost no more; a zero
/// keeps its sign.
struct HostGradients {
  HostGradients(const std::vector<Shape>& shapes, DType dtype) {
    for (std::uint32_t r = 0; r < 3; ++r) {
      gradients.emplace_back();
      for (std::size_t i = 0; i < shapes.size(); ++i) {
        std::vector<float> values = normal_values(static_cast<std::size_t>(shapes[i].numel()),
                                                  100 * r + static_cast<std::uint32_t>(i),
                                                  0.1f * static_cast<float>(r + 1));
        for (std::size_t k = 0; k < values.size(); k += 7) values[k] = -0.0f;
        gradients.back().push_back(encode_values(dtype, values));
      }
    }
  }
  const Encoded& of(int rank, std::size_t tensor) const {
    return gradients[static_cast<std::size_t>(rank) % 3][tensor];
  }
  std::vector<std::vector<Encoded>> gradients;
};

/// The contributions in device memory: of every rank whole tensors and, apart, shards, each
/// starting `offset` elements past an aligned address.
class Contributions {
 public:
  Contributions(const Context& ctx, const ExchangeCase& what, const std::vector<Shape>& shapes,
                const HostGradients& host, std::int64_t offset)
      : ctx_(ctx), what_(what), shapes_(shapes) {
    const auto width = static_cast<std::int64_t>(size_of(what.dtype));
    for (const Shape& shape : shapes) {
      begins_.push_back(stride_ + offset * width);
      stride_ += (shape.numel() + offset) * width;
      stride_ = (stride_ + 15) / 16 * 16;
    }
    Bytes whole(static_cast<std::size_t>(stride_ * what.ranks), 0x7F), shard = whole;
    std::vector<TensorScale> scales;
    for (int r = 0; r < what.ranks; ++r) {
      for (std::size_t i = 0; i < shapes.size(); ++i) {
        const Encoded& g = host.of(r, i);
        const auto at = static_cast<std::ptrdiff_t>(r * stride_ + begins_[i]);
        std::copy(g.bytes.begin(), g.bytes.end(), whole.begin() + at);
        auto to = shard.begin() + at;
        for (const Piece& piece : pieces_of(i, shapes[i])) {
          to = std::copy_n(g.bytes.begin() + piece.begin * width, piece.count * width, to);
        }
        scales.push_back(g.scale);
      }
    }
    whole_ = upload(ctx, whole);
    shard_ = upload(ctx, shard);
    scales_ = upload(ctx, scales);
    mean_scales_ = upload(ctx, std::vector<TensorScale>(shapes.size()));
    flag_ = upload(ctx, std::vector<std::uint32_t>{0});
  }

  TensorScale* mean_scale(std::size_t i) const { return mean_scales_.as<TensorScale>() + i; }
  std::uint32_t* flag() const { return flag_.as<std::uint32_t>(); }

  RankGradients of_tensor(std::size_t i, Layout layout) const {
    RankGradients from;
    from.dtype = what_.dtype;
    from.scales = scales_.as<const TensorScale>() + i;
    from.scale_stride = static_cast<std::int64_t>(shapes_.size());
    for (int r = 0; r < what_.ranks; ++r) {
      const bool is_shard = layout == Layout::shard || (layout == Layout::own_whole && r > 0);
      const Buffer& buffer = is_shard ? shard_ : whole_;
      from.ranks.push_back({buffer.as<char>() + r * stride_ + begins_[i], is_shard});
    }
    return from;
  }

  /// The scales of the means; into shards, where there are any, also the means.
  void reduce(const std::vector<Tensor>& shards) const {
    std::vector<MeanPiece> pieces;
    for (std::size_t i = 0; i < shards.size(); ++i) {
      auto* out = shards[i].as<char>();
      for (const Piece& piece : pieces_of(i, shapes_[i])) {
        const std::int64_t at =
            begins_[i] + piece.begin * static_cast<std::int64_t>(size_of(what_.dtype));
        pieces.push_back(
            {static_cast<std::int32_t>(i), piece.count, whole_.as<char>() + at, at, out});
        out += piece.count * static_cast<std::int64_t>(size_of(shards[i].view().dtype));
      }
    }
    const Buffer table = upload(ctx_, pieces);
    const MeanArgs args = {.pieces = table.as<const MeanPiece>(),
                           .piece_count = static_cast<std::int64_t>(pieces.size()),
                           .ranks = what_.ranks,
                           .staging = whole_.data(),
                           .stride = stride_,
                           .dtype = what_.dtype,
                           .out_dtype = shards.empty() ? DType::f32 : shards[0].view().dtype,
                           .scales = scales_.as<const TensorScale>(),
                           .mean_scales = mean_scales_.as<TensorScale>(),
                           .tensor_count = static_cast<std::int64_t>(shapes_.size()),
                           .nonfinite = flag()};
    mean_scales(ctx_, args);
    reduce_mean(ctx_, args);
    ctx_.synchronize();
  }

 private:
  Context ctx_;
  ExchangeCase what_;
  std::vector<Shape> shapes_;
  std::vector<std::int64_t> begins_;
  std::int64_t stride_ = 0;
  Buffer whole_, shard_, scales_, mean_scales_, flag_;
};

std::size_t scale_bytes_of(const StateFormats& formats, const Shape& shape) {
  if (!has_block_scales(formats.weight)) return 0;
  return static_cast<std::size_t>(scale_bytes(Granularity::tile, shape[0], shape[1]));
}

/// What a copy must hold: the weight where this rank updates it, else what was there before.
std::string copy_difference(const Context& ctx, const AdamW& optimizer, std::size_t i,
                            const AdamWParam& param, std::size_t offset, const Guarded& copy,
                            const Guarded& blocks) {
  if (!copy.intact() || !blocks.intact()) return "something before or behind the copy";
  const std::size_t width = size_of(param.weight.dtype);
  const Bytes weight = download_bytes(ctx, param.weight);
  Bytes expected(weight.size(), Guarded::kFill);
  Bytes expected_blocks(blocks.bytes(), Guarded::kFill), scales;
  const bool has_scales = has_block_scales(param.formats.weight);
  if (has_scales) {
    scales = read_blocks(ctx, optimizer.block_weight(static_cast<int>(i))).scales;
  }
  // A panel of tiles has a line of scales, its padding included.
  const std::int64_t panel = kPanelRows * param.shape.row_numel();
  const std::size_t line =
      blocks.bytes() * 128 / static_cast<std::size_t>((param.shape[0] + 127) / 128 * 128);
  for (const Piece& piece : *param.pieces) {
    const auto copy_run = [](const Bytes& from, Bytes& to, std::size_t begin, std::size_t count) {
      const auto at = static_cast<std::ptrdiff_t>(begin);
      std::copy_n(from.begin() + at, count, to.begin() + at);
    };
    copy_run(weight, expected, static_cast<std::size_t>(piece.begin) * width,
             static_cast<std::size_t>(piece.count) * width);
    if (has_scales) {
      copy_run(scales, expected_blocks, static_cast<std::size_t>(piece.begin / panel) * line, line);
    }
  }
  expected.insert(expected.begin(), offset, Guarded::kFill);
  const std::string difference = first_difference(copy.values<std::uint8_t>(), expected);
  if (!difference.empty()) return "codes: " + difference;
  const std::string of_blocks = first_difference(blocks.values<std::uint8_t>(), expected_blocks);
  return of_blocks.empty() ? "" : "scales: " + of_blocks;
}

/// Fast code that a tensor should take but does not would pass every comparison.
void check_row_taken(const Context& ctx, const AdamW& optimizer, std::size_t i, DType gradient,
                     const StateFormats& formats) {
  const int p = static_cast<int>(i);
  const bool is_fast =
      ctx.device().type == DeviceType::cuda && optimizer.general_code_reason(p).empty();
  CHECK(download_one<AdamwTensorStep>(ctx, optimizer.tensor_step(p)).row ==
        (is_fast ? adamw_row_of(gradient, formats) : 0));
}

/// Everything stored after three steps. Contributions and copies start `offset` elements past an
/// aligned address. Copies of the weight are checked here.
Bytes bytes_after(const Context& ctx, const ExchangeCase& what, const HostGradients& host,
                  Source source, Layout layout, std::int64_t offset, int copy_count) {
  const std::vector<Shape> shapes = shapes_of(what.formats);
  const Contributions contributions(ctx, what, shapes, host, offset);
  const auto copy_offset =
      static_cast<std::size_t>(offset) * size_of(dtype_of(what.formats.weight));
  std::vector<Tensor> weights, shards;
  std::vector<Guarded> copies;
  std::vector<AdamWParam> params;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    AdamWParam param;
    param.name = to_string(shapes[i]);
    param.shape = shapes[i];
    param.formats = what.formats;
    param.pieces = pieces_of(i, shapes[i]);
    param.gradient_scale = contributions.mean_scale(i);
    param.gradient_is_shard = true;
    if (source != Source::contributions) {
      const DType dtype = source == Source::rounded ? what.dtype : DType::f32;
      shards.emplace_back(ctx, dtype, Shape{owned_by(*param.pieces)});
      param.gradient = shards.back().view();
    }
    const bool reads_shard = source == Source::shard || source == Source::rounded;
    if (!reads_shard) param.contributions = contributions.of_tensor(i, layout);
    weights.emplace_back(ctx, dtype_of(what.formats.weight), shapes[i]);
    param.weight = weights.back().view();
    for (int c = 0; c < copy_count; ++c) {
      copies.emplace_back(ctx, param.weight.bytes() + copy_offset);
      copies.emplace_back(ctx, scale_bytes_of(what.formats, shapes[i]));
      const Guarded &codes = copies[copies.size() - 2], &blocks = copies.back();
      param.weight_copies.push_back(
          {static_cast<char*>(codes.data()) + copy_offset,
           blocks.bytes() > 0 ? static_cast<float*>(blocks.data()) : nullptr});
    }
    params.push_back(param);
  }
  AdamW optimizer(ctx, {.weight_decay = 0.1f, .seed = 3}, params);
  for (std::size_t i = 0; i < params.size(); ++i) {
    const auto count = static_cast<std::size_t>(shapes[i].numel());
    const Buffer values = upload(ctx, normal_values(count, 77, 0.02f));
    optimizer.initialise(static_cast<int>(i), view_of(ctx, values, DType::f32, shapes[i]));
    ctx.synchronize();
  }
  for (int t = 0; t < 3; ++t) {
    contributions.reduce(shards);
    const bool sums = source == Source::contributions || (source == Source::both && t % 2 == 0);
    optimizer.step({.lr = 1e-3f, .nonfinite = contributions.flag(), .from_contributions = sums});
  }
  REQUIRE(download_one<AdamwScalars>(ctx, optimizer.scalars()).step == 3);
  Bytes all;
  const auto append = [&all](const Bytes& bytes) {
    all.insert(all.end(), bytes.begin(), bytes.end());
  };
  for (std::size_t i = 0; i < params.size(); ++i) {
    const int p = static_cast<int>(i);
    const DType gradient = source == Source::shard ? DType::f32 : what.dtype;
    check_row_taken(ctx, optimizer, i, gradient, what.formats);
    append(download_bytes(ctx, params[i].weight));
    append(block_scale_bytes(ctx, optimizer, p, what.formats.weight));
    for (const StateView& view : {optimizer.master(p), optimizer.m(p), optimizer.v(p)}) {
      append(download_state(ctx, view));
    }
    for (int c = 0; c < copy_count; ++c) {
      const std::size_t at =
          2 * (i * static_cast<std::size_t>(copy_count) + static_cast<std::size_t>(c));
      INFO("copy " << c << " of " << params[i].name);
      CHECK(copy_difference(ctx, optimizer, i, params[i], copy_offset, copies[at],
                            copies[at + 1]) == "");
    }
  }
  append(bytes_of(download<TensorScale>(ctx, optimizer.scales(),
                                        static_cast<std::size_t>(optimizer.scale_count()))));
  return all;
}

std::string name_of(const ExchangeCase& what, const Context& ctx) {
  return describe(what.formats, what.dtype) + ", " + std::to_string(what.ranks) + " ranks on " +
         to_string(ctx.device());
}

/// The bits of the shard path on the CPU, from every source, on every device.
void check_case(const ExchangeCase& what) {
  const HostGradients host(shapes_of(what.formats), what.dtype);
  const Bytes expected =
      bytes_after(Context::cpu(), what, host, Source::shard, Layout::whole, 0, 0);
  for (const Context& ctx : test_contexts()) {
    const auto check = [&](Source source, Layout layout, std::int64_t offset, int copies) {
      INFO(name_of(what, ctx) << ", source " << static_cast<int>(source) << ", layout "
                              << static_cast<int>(layout) << ", offset " << offset << ", " << copies
                              << " copies");
      const Bytes bytes = bytes_after(ctx, what, host, source, layout, offset, copies);
      CHECK(first_difference(bytes, expected) == "");
    };
    check(Source::contributions, Layout::whole, 0, 0);
    check(Source::contributions, Layout::shard, 0, 2);
    check(Source::contributions, Layout::own_whole, 0, 1);
    check(Source::contributions, Layout::own_whole, 1, 1);
    check(Source::shard, Layout::whole, 0, 2);
    check(Source::shard, Layout::whole, 1, 1);
    check(Source::both, Layout::own_whole, 0, 1);
  }
}

}  // namespace

TEST_CASE("copies beside a stored gradient in its own dtype, on every device") {
  for (const ExchangeCase& what :
       {ExchangeCase{kO2, DType::e4m3, 3}, ExchangeCase{kSmall, DType::e4m3, 2},
        ExchangeCase{kO1, DType::e4m3, 2}, ExchangeCase{kO0, DType::bf16, 2},
        ExchangeCase{kTile, DType::e4m3, 2}}) {
    const HostGradients host(shapes_of(what.formats), what.dtype);
    const auto run = [&](const Context& ctx, std::int64_t offset, int copies) {
      return bytes_after(ctx, what, host, Source::rounded, Layout::whole, offset, copies);
    };
    const Bytes expected = run(Context::cpu(), 0, 0);
    for (const Context& ctx : test_contexts()) {
      INFO(name_of(what, ctx));
      CHECK(first_difference(run(ctx, 0, 2), expected) == "");
      CHECK(first_difference(run(ctx, 1, 1), expected) == "");
    }
  }
}

TEST_CASE("contributions give the bits of a reduced shard, for the levels' formats") {
  for (int ranks : {1, 2, 3, 5, 8}) {
    check_case({kO2, DType::e4m3, ranks});
    check_case({kO0, DType::bf16, ranks});
    check_case({kO1, DType::e4m3, ranks});
    check_case({kPlain, DType::f32, ranks});
  }
}

TEST_CASE("contributions give the bits of a reduced shard, for blocks and tiles") {
  for (int ranks : {2, 3, 7}) {
    check_case({kSmall, DType::e4m3, ranks});
    check_case({kTile, DType::e4m3, ranks});
    check_case({kTileOfBlocks, DType::e4m3, ranks});
  }
}

TEST_CASE("contributions give the bits of a reduced shard, in dtypes that no level has") {
  for (const StateFormats& formats : {kO2, kSmall, kO0, kTile}) {
    for (DType dtype : {DType::e4m3, DType::bf16, DType::f32}) check_case({formats, dtype, 3});
  }
}

TEST_CASE("contributions of more ranks than a row takes at once, and than it takes at all") {
  for (int ranks : {15, 64, 65}) check_case({kO2, DType::e4m3, ranks});
  check_case({kPlain, DType::f32, 64});
}

TEST_CASE("scales of tiles go where the caller wants them") {
  const Shape shape{300, 200};
  for (const Context& ctx : test_contexts()) {
    std::vector<Bytes> results;
    for (bool is_given : {false, true}) {
      const Tensor weight(ctx, DType::e4m3, shape), gradient(ctx, DType::f32, shape);
      const Guarded blocks(ctx, scale_bytes_of(kTile, shape));
      write(ctx, gradient.view().data, normal_values(60000, 3, 0.1f));
      AdamWParam param;
      param.shape = shape;
      param.formats = kTile;
      param.gradient = gradient.view();
      param.weight = weight.view();
      if (is_given) param.weight_blocks = static_cast<float*>(blocks.data());
      AdamW optimizer(ctx, {}, {param});
      const Buffer values = upload(ctx, normal_values(60000, 77, 0.02f));
      optimizer.initialise(0, view_of(ctx, values, DType::f32, shape));
      optimizer.measure();
      optimizer.step({.lr = 1e-2f});
      results.push_back(block_scale_bytes(ctx, optimizer, 0, kTile.weight));
      CHECK((optimizer.block_weight(0).scales == blocks.data()) == is_given);
      CHECK(optimizer.state_bytes(0).weight_blocks == (is_given ? 0 : blocks.bytes()));
      CHECK(blocks.intact());
    }
    CHECK(first_difference(results[1], results[0]) == "");
  }
}

TEST_CASE("what AdamW refuses of contributions and copies is named") {
  const Context ctx = Context::cpu();
  const Shape shape{4, 4};
  const Tensor weight(ctx, DType::e4m3, shape), gradient(ctx, DType::e4m3, shape),
      shard(ctx, DType::f32, shape);
  const Buffer scales = upload(ctx, std::vector<TensorScale>(2));
  AdamWParam good;
  good.name = "p";
  good.shape = shape;
  good.formats = kO2;
  good.weight = weight.view();
  good.gradient_scale = scales.as<TensorScale>();
  good.contributions = RankGradients{
      {{gradient.view().data, false}}, DType::e4m3, scales.as<const TensorScale>() + 1, 0};
  good.weight_copies = {{weight.view().data, nullptr}};
  const auto refused = [&](const auto& spoil) {
    AdamWParam param = good;
    spoil(param);
    return error_of([&] { AdamW(ctx, {}, {param}); });
  };
  CHECK(refused([](AdamWParam&) {}) == "no error");
  const auto check = [&](const auto& spoil, std::initializer_list<std::string> words) {
    CHECK(missing(refused(spoil), words) == "");
  };
  check([](AdamWParam& p) { p.contributions->ranks.clear(); }, {"\"p\"", "contributions", "ranks"});
  check([](AdamWParam& p) { p.contributions->ranks[0].data = nullptr; },
        {"\"p\"", "contribution of rank 0", "null"});
  check([](AdamWParam& p) { p.contributions->dtype = DType::f16; },
        {"\"p\"", "contributions", "f16"});
  check([](AdamWParam& p) { p.contributions->scales = nullptr; }, {"\"p\"", "scales is null"});
  check([](AdamWParam& p) { p.contributions->scale_stride = -1; }, {"\"p\"", "scale_stride is -1"});
  check([](AdamWParam& p) { p.gradient_scale = nullptr; }, {"\"p\"", "no scale"});
  check([](AdamWParam& p) { p.measure_amax = true; }, {"\"p\"", "measure_amax is true"});
  check([&](AdamWParam& p) { p.gradient = gradient.view(); }, {"\"p\"", "e4m3", "must be f32"});
  check([](AdamWParam& p) { p.weight_copies[0].data = nullptr; }, {"\"p\"", "copy 0", "null"});
  check([&](AdamWParam& p) { p.weight_copies[0].blocks = scales.as<float>(); },
        {"\"p\"", "copy 0", "blocks", "e4m3"});
  check([&](AdamWParam& p) { p.weight_blocks = scales.as<float>(); },
        {"\"p\"", "weight_blocks", "e4m3"});
  check([](AdamWParam& p) { p.formats.weight = WeightFormat::e4m3_tile; },
        {"\"p\"", "copy 0", "no blocks", "e4m3_tile"});
  check(
      [&](AdamWParam& p) {
        p.formats.weight = WeightFormat::e4m3_and_transpose;
        p.weight_transposed = weight.view();
      },
      {"\"p\"", "copies", "e4m3_and_transpose"});

  AdamW optimizer(ctx, {}, {good});
  CHECK(missing(error_of([&] { optimizer.measure(); }),
                {"measure", "\"p\"", "contributions", "clipping"}) == "");
  CHECK(missing(error_of([&] { optimizer.step({.lr = 1e-3f}); }),
                {"step", "\"p\"", "no gradient"}) == "");
  AdamWParam both = good;
  both.gradient = shard.view();
  AdamW clipping(ctx, {}, {both});
  clipping.measure();
  CHECK(missing(error_of([&] {
                  clipping.step({.lr = 1e-3f, .max_norm = 0.5f, .from_contributions = true});
                }),
                {"max_norm is 0.5", "from_contributions"}) == "");
  AdamWParam alone = both;
  alone.contributions.reset();
  AdamW stored(ctx, {}, {alone});
  CHECK(missing(error_of([&] { stored.step({.lr = 1e-3f, .from_contributions = true}); }),
                {"from_contributions is true", "\"p\"", "no contributions"}) == "");
}

}  // namespace octet::test
