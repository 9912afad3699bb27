// SPDX-License-Identifier: Apache-2.0
// Pieces of a list of parameters updated apart give the bits of the whole; so do CPU and CUDA.
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

const std::vector<Shape> kShapes = {{300, 97}, {1},       {40000},   {129, 131},
                                    {128, 64}, {2, 9000}, {260, 128}};

std::vector<ParamCase> cases_of(const StateFormats& formats, DType gradient) {
  std::vector<ParamCase> cases;
  for (const Shape& shape : kShapes) {
    const bool small = shape.numel() < 100;
    StateFormats own = small ? kPlain : formats;
    if (shape.rank() != 2 && needs_matrix(own.weight)) {
      own.weight = WeightFormat::e4m3;
    }
    cases.push_back({shape, own, small ? DType::f32 : gradient, small ? 0.0f : 0.1f});
  }
  return cases;
}

std::vector<float> values_of(std::size_t i, std::uint32_t seed, float sigma) {
  const auto count = static_cast<std::size_t>(kShapes[i].numel());
  return normal_values(count, seed * 100 + static_cast<std::uint32_t>(i), sigma);
}

int param_count() { return static_cast<int>(kShapes.size()); }

/// Which owner has which panels: dealt out one by one, so that shards are scattered.
std::vector<std::vector<Piece>> pieces_of(std::size_t owner, std::size_t owners) {
  std::vector<std::vector<Piece>> pieces(kShapes.size());
  std::size_t dealt = 0;
  for (std::size_t i = 0; i < kShapes.size(); ++i) {
    for (const Piece& panel : panels_of(static_cast<std::int32_t>(i), kShapes[i])) {
      if (dealt++ % owners == owner) pieces[i].push_back(panel);
    }
  }
  return pieces;
}

/// The owners' models, kept together by what a communicator would do: sums of squares and amaxes.
class Group {
 public:
  Group(const Context& ctx, const AdamWConfig& config, const StateFormats& formats, DType gradient,
        std::size_t owners, bool weights_are_shards = false)
      : ctx_(ctx), weights_are_shards_(weights_are_shards) {
    for (std::size_t owner = 0; owner < owners; ++owner) {
      std::vector<ParamCase> cases = cases_of(formats, gradient);
      const auto pieces = pieces_of(owner, owners);
      if (owners > 1) {
        for (std::size_t i = 0; i < cases.size(); ++i) cases[i].pieces = pieces[i];
      }
      for (ParamCase& what : cases) what.weight_is_shard = weights_are_shards;
      models_.push_back(std::make_unique<AdamwModel>(ctx, config, cases));
      pieces_.push_back(pieces);
    }
  }

  void initialise() {
    for (int i = 0; i < param_count(); ++i) {
      for (auto& model : models_) {
        model->initialise(i, values_of(static_cast<std::size_t>(i), 1, 0.02f));
      }
    }
  }

  void step(std::uint32_t t, float max_norm) {
    for (auto& model : models_) {
      for (int i = 0; i < param_count(); ++i) {
        model->set_gradient(i, values_of(static_cast<std::size_t>(i), 10 + t, 0.1f));
      }
      if (max_norm > 0) model->optimizer().measure();
    }
    if (max_norm > 0) share_sums();
    for (auto& model : models_) {
      model->optimizer().step({.lr = 1e-3f, .max_norm = max_norm, .nonfinite = model->flag()});
    }
    share_amax();
  }

  /// Bytes of all weights and states put together from their owners, and the scales of the first.
  std::vector<std::uint8_t> all_bytes() const {
    std::vector<std::uint8_t> all;
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      const int p = static_cast<int>(i);
      const auto weight = [p](const AdamwModel& m) { return plane_of(m.weight_view(p)); };
      append(all, gather(i, weight, weights_are_shards_));
      append(all, gather_transposed(i));
      append(all, gather_scales(i));
      const void* const weight_data = models_[0]->weight_view(p).data;
      const bool own_master =
          weight_data == nullptr || models_[0]->optimizer().master(p).data != weight_data;
      const auto master = [p](AdamwModel& m) { return codes_of(m.optimizer().master(p)); };
      append(all, gather(i, master, own_master || weights_are_shards_));
      for (Plane (*part)(const StateView&) : {&Group::codes_of, &Group::blocks_of}) {
        const auto m_part = [&](AdamwModel& m) { return part(m.optimizer().m(p)); };
        const auto v_part = [&](AdamwModel& m) { return part(m.optimizer().v(p)); };
        append(all, gather(i, m_part, true));
        append(all, gather(i, v_part, true));
      }
    }
    append(all, bytes_of(models_[0]->scales()));
    return all;
  }

  std::vector<TensorScale> scales(std::size_t owner) const { return models_[owner]->scales(); }
  AdamwScalars scalars(std::size_t owner) const { return models_[owner]->scalars(); }
  AdamwGroupScalars group_scalars(std::size_t owner) const {
    return models_[owner]->group_scalars(0);
  }
  std::size_t size() const { return models_.size(); }
  std::vector<float> sums(std::size_t owner) const {
    AdamW& optimizer = models_[owner]->optimizer();
    return download<float>(ctx_, optimizer.segment_sums(),
                           static_cast<std::size_t>(optimizer.total_segments()));
  }

 private:
  static void append(std::vector<std::uint8_t>& all, const std::vector<std::uint8_t>& part) {
    all.insert(all.end(), part.begin(), part.end());
  }

  void share_sums() {
    std::vector<float> sums(static_cast<std::size_t>(models_[0]->optimizer().total_segments()));
    for (std::size_t owner = 0; owner < models_.size(); ++owner) {
      const std::vector<float> own = this->sums(owner);
      for (const Segment& segment : models_[owner]->optimizer().segments()) {
        const auto index = static_cast<std::size_t>(segment.index);
        sums[index] = own[index];
      }
    }
    for (auto& model : models_) write(ctx_, model->optimizer().segment_sums(), sums);
  }

  void share_amax() {
    std::vector<TensorScale> common = models_[0]->scales();
    for (const auto& model : models_) {
      const std::vector<TensorScale> own = model->scales();
      for (std::size_t i = 0; i < own.size(); ++i) {
        common[i].amax = std::max(common[i].amax, own[i].amax);
      }
    }
    for (auto& model : models_) {
      std::vector<TensorScale> own = model->scales();
      for (std::size_t i = 0; i < own.size(); ++i) own[i].amax = common[i].amax;
      write(ctx_, model->optimizer().scales(), own);
    }
  }

  /// Memory with an entry of `width` bytes for every `run` elements; 0 bytes where there is none.
  struct Plane {
    const void* data = nullptr;
    std::size_t elements = 0, width = 0, run = 1;
    std::size_t bytes_for(std::size_t count) const { return (count + run - 1) / run * width; }
  };
  static Plane plane_of(const TensorView& view) {
    if (view.empty()) return {};
    return {view.data, static_cast<std::size_t>(view.numel()), size_of(view.dtype)};
  }
  static Plane codes_of(const StateView& view) {
    return {view.data, static_cast<std::size_t>(view.count), size_of(view.format)};
  }
  static Plane blocks_of(const StateView& view) {
    if (!is_block(view.format)) return {};
    return {view.blocks, static_cast<std::size_t>(view.count), sizeof(float), 128};
  }
  std::vector<std::uint8_t> read(const Plane& plane) const {
    return download<std::uint8_t>(ctx_, plane.data, plane.bytes_for(plane.elements));
  }

  /// A plane of parameter i from the pieces of its owners; `sharded` says how they hold it.
  template <class PlaneOf>
  std::vector<std::uint8_t> gather(std::size_t i, PlaneOf plane_of, bool sharded) const {
    if (models_.size() == 1) return read(plane_of(*models_[0]));
    const auto count = static_cast<std::size_t>(kShapes[i].numel());
    std::vector<std::uint8_t> whole;
    for (std::size_t owner = 0; owner < models_.size(); ++owner) {
      const Plane plane = plane_of(*models_[owner]);
      const std::vector<std::uint8_t> held = read(plane);
      // A shard without elements is nothing at all.
      whole.resize(std::max(whole.size(), plane.bytes_for(count)));
      std::size_t local = 0;
      for (const Piece& piece : pieces_[owner][i]) {
        const std::size_t begin = plane.bytes_for(static_cast<std::size_t>(piece.begin));
        const std::size_t bytes = plane.bytes_for(static_cast<std::size_t>(piece.count));
        std::copy_n(held.begin() + static_cast<std::ptrdiff_t>(sharded ? local : begin), bytes,
                    whole.begin() + static_cast<std::ptrdiff_t>(begin));
        local += bytes;
      }
      if (sharded) REQUIRE(held.size() == local);
    }
    return whole;
  }

  /// The transposed weight of parameter i, every element from its owner.
  std::vector<std::uint8_t> gather_transposed(std::size_t i) const {
    const int p = static_cast<int>(i);
    std::vector<std::uint8_t> whole = models_[0]->transposed_weight(p);
    if (models_.size() == 1 || whole.empty()) return whole;
    const auto columns = static_cast<std::size_t>(kShapes[i].row_numel());
    const std::size_t rows = whole.size() / columns;
    for (std::size_t owner = 0; owner < models_.size(); ++owner) {
      const std::vector<std::uint8_t> held = models_[owner]->transposed_weight(p);
      for (const Piece& piece : pieces_[owner][i]) {
        const auto begin = static_cast<std::size_t>(piece.begin);
        for (std::size_t k = begin; k < begin + static_cast<std::size_t>(piece.count); ++k) {
          const std::size_t at = k % columns * rows + k / columns;
          whole[at] = held[at];
        }
      }
    }
    return whole;
  }

  /// The scales of the blocks of weight i and of its transposed copy, those of every element from
  /// its owner.
  std::vector<std::uint8_t> gather_scales(std::size_t i) const {
    const int p = static_cast<int>(i);
    const WeightFormat format = models_[0]->formats(p).weight;
    if (!has_block_scales(format)) return {};
    const BlockKind kind{granularity_of(format)};
    const std::int64_t rows = kShapes[i][0], columns = kShapes[i][1];
    const ScalePlaces places{kind, rows, columns}, turned{kind, columns, rows};
    const bool has_copy = is_transposed(format);
    Codes whole(places.bytes()), whole_turned(has_copy ? turned.bytes() : 0);
    for (std::size_t owner = 0; owner < models_.size(); ++owner) {
      const AdamwModel& model = *models_[owner];
      const Codes held = model.weight_scales(p);
      const Codes held_turned = has_copy ? model.block_weight_transposed(p).scales : Codes();
      for (const Piece& piece : pieces_[owner][i]) {
        for (std::int64_t k = piece.begin; k < piece.begin + piece.count; ++k) {
          const std::int64_t row = k / columns, column = k % columns;
          std::copy_n(&held[places.of(row, column)], 4, &whole[places.of(row, column)]);
          if (!has_copy) continue;
          std::copy_n(&held_turned[turned.of(column, row)], 4,
                      &whole_turned[turned.of(column, row)]);
        }
      }
    }
    append(whole, whole_turned);
    return whole;
  }

  Context ctx_;
  bool weights_are_shards_;
  std::vector<std::unique_ptr<AdamwModel>> models_;
  std::vector<std::vector<std::vector<Piece>>> pieces_;
};

}  // namespace

TEST_CASE("sharded pieces give the bits of the whole for 2, 3 and 4 owners") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats :
         {kPlain, kO0, kO1, kO2, kSmall, kSmallTransposed, kBlocksAlone, kRowBlocks, kTiles}) {
      for (float max_norm : {0.0f, 1.0f}) {
        const DType gradient = formats == kPlain ? DType::f32 : DType::e4m3;
        Group whole(ctx, {.seed = 4}, formats, gradient, 1);
        whole.initialise();
        for (std::uint32_t t = 1; t <= 3; ++t) whole.step(t, max_norm);
        for (std::size_t owners : {2u, 3u, 4u}) {
          INFO(to_string(ctx.device())
               << ", " << describe(formats) << ", " << owners << " owners, max_norm " << max_norm);
          Group group(ctx, {.seed = 4}, formats, gradient, owners);
          group.initialise();
          for (std::uint32_t t = 1; t <= 3; ++t) group.step(t, max_norm);
          CHECK(first_difference(group.all_bytes(), whole.all_bytes()) == "");
          for (std::size_t owner = 0; owner < owners; ++owner) {
            CHECK(bits_of(group.scalars(owner).norm) == bits_of(whole.scalars(0).norm));
            CHECK(bits_of(group.scalars(owner).clip) == bits_of(whole.scalars(0).clip));
            CHECK(group.scalars(owner).step == 3);
          }
        }
      }
    }
  }
}

TEST_CASE("weights in shards have the bits of whole ones, for 2, 3 and 5 owners") {
  const StateFormats tiles = {WeightFormat::e4m3_tile, StateFormat::f16, StateFormat::e4m3,
                              StateFormat::f16};
  const StateFormats block_states = {WeightFormat::e4m3_tile, StateFormat::f32,
                                     StateFormat::e4m3_block, StateFormat::f16};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO0, kO1, kO2, kSmall, tiles, block_states}) {
      const DType gradient = formats == kPlain ? DType::f32 : DType::e4m3;
      Group whole(ctx, {.seed = 4}, formats, gradient, 1);
      whole.initialise();
      const std::vector<std::uint8_t> initial = whole.all_bytes();
      for (std::uint32_t t = 1; t <= 3; ++t) whole.step(t, 1.0f);
      for (std::size_t owners : {2u, 3u, 5u}) {
        INFO(to_string(ctx.device()) << ", " << describe(formats) << ", " << owners << " owners");
        Group group(ctx, {.seed = 4}, formats, gradient, owners, true);
        group.initialise();
        CHECK(first_difference(group.all_bytes(), initial) == "");
        for (std::uint32_t t = 1; t <= 3; ++t) group.step(t, 1.0f);
        CHECK(first_difference(group.all_bytes(), whole.all_bytes()) == "");
      }
    }
  }
}

TEST_CASE("sums of squares do not depend on who computes them and hit the true norm") {
  for (const Context& ctx : test_contexts()) {
    Group whole(ctx, {}, kO2, DType::e4m3, 1), group(ctx, {}, kO2, DType::e4m3, 3);
    for (Group* each : {&whole, &group}) {
      each->initialise();
      each->step(1, 1.0f);
    }
    for (std::size_t owner = 0; owner < 3; ++owner) {
      CHECK(first_difference(group.sums(owner), whole.sums(0)) == "");
    }
    double squares = 0;
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      const Encoded g = encode_values(kShapes[i].numel() < 100 ? DType::f32 : DType::e4m3,
                                      values_of(i, 11, 0.1f));
      squares += std::pow(norm_of(g.decoded), 2);
    }
    CHECK(std::abs(static_cast<double>(whole.scalars(0).norm) / std::sqrt(squares) - 1) < 1e-6);
  }
}

TEST_CASE("whole runs on CPU and CUDA have equal bits") {
  const std::vector<Context> contexts = test_contexts();
  if (contexts.size() < 2) {
    WARN("no CUDA device: nothing to compare with");
    return;
  }
  for (const StateFormats& formats : all_formats()) {
    // The formats of the levels and the smallest go on for longer and with every clipping.
    const std::vector<StateFormats> watched = {kPlain, kO0, kO1, kO2, kSmall, kSmallTransposed};
    const bool is_watched = std::find(watched.begin(), watched.end(), formats) != watched.end();
    for (DType gradient : kGradientFormats) {
      for (float max_norm : {0.0f, 1.0f}) {
        if (!is_watched && max_norm == 0.0f) continue;
        INFO(describe(formats, gradient) << ", max_norm " << max_norm);
        Group cpu(contexts[0], {.seed = 4}, formats, gradient, 1);
        Group cuda(contexts[1], {.seed = 4}, formats, gradient, 1);
        cpu.initialise();
        cuda.initialise();
        REQUIRE(first_difference(cuda.all_bytes(), cpu.all_bytes()) == "");
        for (std::uint32_t t = 1; t <= (is_watched ? 8u : 2u); ++t) {
          cpu.step(t, max_norm);
          cuda.step(t, max_norm);
          INFO("step " << t);
          REQUIRE(first_difference(cuda.sums(0), cpu.sums(0)) == "");
          REQUIRE(bits_of(cuda.scalars(0).norm) == bits_of(cpu.scalars(0).norm));
          const AdamwGroupScalars a = cuda.group_scalars(0), b = cpu.group_scalars(0);
          REQUIRE(bits_of(a.root_factor) == bits_of(b.root_factor));
          REQUIRE(bits_of(a.root_eps) == bits_of(b.root_eps));
          REQUIRE(bits_of(a.bound) == bits_of(b.bound));
          REQUIRE(first_difference(cuda.all_bytes(), cpu.all_bytes()) == "");
        }
      }
    }
  }
}

}  // namespace octet::test
