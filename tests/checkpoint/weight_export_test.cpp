// SPDX-License-Identifier: Apache-2.0
// Weights of an engine written to a file, against what the engine stores, decoded from the codes in
// double precision.
#include <cstring>
#include <filesystem>

#include "octet/checkpoint/weights.hpp"
#include "octet/comm/collectives.hpp"
#include "support/adamw_blocks.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"
#include "support/random.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

/// Whole tiles, cut ones, one row of tiles under the alignment of their scales, a vector, a cube,
/// one that is kept out of FP8.
struct Case {
  Shape shape;
  bool fp8 = true;
};
const std::vector<Case> kCases = {{{384, 256}},     {{129, 131}}, {{1000}},
                                  {{300, 697}},     {{2, 9000}},  {{3, 40, 50}, false},
                                  {{70, 64}, false}};

const Case& case_of(int p) { return kCases[static_cast<std::size_t>(p)]; }
std::string name_of_case(int p) { return "layer." + std::to_string(p) + ".weight"; }

/// A trained engine: one step from made-up weights.
class Model {
 public:
  Model(const Context& ctx, WeightFormat format, const std::vector<Case>& cases = kCases)
      : Model(make_single(ctx), format, Sharding::none, cases) {}
  Model(std::shared_ptr<Communicator> comm, WeightFormat format, Sharding sharding,
        const std::vector<Case>& cases)
      : comm_(std::move(comm)),
        ctx_(comm_->context()),
        engine_(ctx_, *comm_, config_of(format, sharding)) {
    std::vector<Buffer> keep;
    for (const Case& c : cases) {
      const int p = static_cast<int>(keep.size());
      keep.push_back(upload(ctx_, values_of(c.shape, p)));
      const TensorView init = view_of(ctx_, keep.back(), DType::f32, c.shape);
      names.push_back({name_of_case(p), engine_.add({.name = "p" + std::to_string(p),
                                                     .shape = c.shape,
                                                     .init = init,
                                                     .fp8 = c.fp8,
                                                     .unit = p / 3})});
    }
    engine_.freeze();
    for (auto weight = names.rbegin(); weight != names.rend(); ++weight) {
      const Shape& shape = cases[static_cast<std::size_t>(weight->id.index)].shape;
      const Buffer gradient = upload(ctx_, values_of(shape, 100 + weight->id.index));
      engine_.add_gradient(weight->id, view_of(ctx_, gradient, DType::f32, shape));
      ctx_.synchronize();
    }
    engine_.step({.lr = 1e-3f});
    ctx_.synchronize();
  }

  Engine& engine() const { return engine_; }
  const Context& context() const { return ctx_; }

  /// The weight as it is stored, with exact values.
  Stored stored(ParamId id) const {
    const WeightFormat format = engine_.weight_format(id);
    if (!has_block_scales(format)) return read_tensor(ctx_, engine_.weight(id));
    const BlockScaledView view = engine_.block_weight(id);
    Stored stored = read_tensor(ctx_, {view.data, nullptr});
    decode_blocks(stored, view.data.shape, view.granularity, read_blocks(ctx_, view));
    return stored;
  }

  std::string error(const std::string& path, const WeightExport& how) const {
    return error_of([&] { export_weights_sync(ctx_, engine_, path, names, how); });
  }

  std::vector<NamedWeight> names;

 private:
  static EngineConfig config_of(WeightFormat weight, Sharding sharding) {
    EngineConfig config = {.sharding = sharding};
    config.formats =
        Formats{DType::f32, {weight, StateFormat::f32, StateFormat::f32, StateFormat::f32}};
    return config;
  }
  static std::vector<float> values_of(const Shape& shape, int seed) {
    return normal_values(static_cast<std::size_t>(shape.numel()), static_cast<std::uint32_t>(seed),
                         0.02f);
  }

  std::shared_ptr<Communicator> comm_;
  Context ctx_;
  mutable Engine engine_;
};

const WeightFormat kFormats[] = {
    WeightFormat::bf16,           WeightFormat::e4m3,      WeightFormat::e4m3_and_transpose,
    WeightFormat::e4m3_row_block, WeightFormat::e4m3_tile, WeightFormat::e4m3_tile_and_transpose};

std::vector<std::uint8_t> bytes_in(const SafetensorsReader& file, const std::string& name) {
  const FileTensor& tensor = file.at(name);
  std::vector<std::uint8_t> bytes(tensor.bytes);
  file.read(tensor, 0, tensor.bytes, bytes.data());
  return bytes;
}

std::vector<float> floats_in(const SafetensorsReader& file, const std::string& name) {
  REQUIRE(file.at(name).dtype == "F32");
  const auto bytes = bytes_in(file, name);
  std::vector<float> values(bytes.size() / 4);
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

/// Values of a tensor in F32, BF16 or F16.
Doubles values_in(const SafetensorsReader& file, const std::string& name, DType dtype) {
  REQUIRE(file.at(name).dtype == file_dtype(dtype));
  Doubles values;
  if (dtype == DType::f32) {
    for (float value : floats_in(file, name)) values.push_back(static_cast<double>(value));
    return values;
  }
  const auto bytes = bytes_in(file, name);
  for (std::size_t i = 0; i < bytes.size(); i += 2) {
    values.push_back(
        table_of(dtype).decode(static_cast<std::uint32_t>(bytes[i] | bytes[i + 1] << 8)));
  }
  return values;
}

/// The nearest values of a dtype.
Doubles rounded(const Doubles& exact, DType dtype) {
  Doubles values;
  for (double x : exact) {
    values.push_back(dtype == DType::f32 ? static_cast<double>(static_cast<float>(x))
                                         : table_of(dtype).round(x));
  }
  return values;
}

/// The factor of element (row, column) in the layout that readers expect.
double factor_at(const FileTensor& scale, const std::vector<float>& factors, const Shape& shape,
                 std::int64_t i) {
  if (scale.shape == std::vector<std::int64_t>{1}) return static_cast<double>(factors[0]);
  const std::int64_t row = i / shape[1], column = i % shape[1];
  const std::int64_t line = scale.shape[0] == shape[0] ? row : row / 128;
  return static_cast<double>(
      factors[static_cast<std::size_t>(line * scale.shape[1] + column / 128)]);
}

}  // namespace

TEST_CASE("Weights in f32, bf16 and f16 are the stored ones rounded once") {
  const Folder folder;
  const std::string path = folder.file("w.safetensors");
  for (const Context& ctx : test_contexts()) {
    for (WeightFormat format : kFormats) {
      std::vector<Case> cases = kCases;
      const Model model(ctx, format, cases);
      for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        for (std::size_t piece : {std::size_t{1000}, std::size_t{64} << 20}) {
          export_weights_sync(ctx, model.engine(), path, model.names,
                              {.dtype = dtype, .piece_bytes = piece});
          const SafetensorsReader file(path);
          CHECK(file.tensors().size() == kCases.size());
          CHECK(file.metadata().at("format") == "pt");
          for (const NamedWeight& weight : model.names) {
            INFO(name_of(format) << " to " << name_of(dtype) << ", " << weight.name);
            const Doubles wanted = rounded(model.stored(weight.id).values, dtype);
            CHECK(first_difference(values_in(file, weight.name, dtype), wanted) == "");
          }
        }
      }
    }
  }
}

TEST_CASE("Codes and scales are the stored ones, and decode to them") {
  const Folder folder;
  const std::string path = folder.file("w.safetensors");
  for (const Context& ctx : test_contexts()) {
    for (WeightFormat format : kFormats) {
      if (!is_e4m3(format)) continue;
      const Model model(ctx, format);
      for (ScaleNaming naming : {ScaleNaming::weight_scale, ScaleNaming::weight_scale_inv}) {
        const bool inverse = naming == ScaleNaming::weight_scale_inv;
        if (inverse && format == WeightFormat::e4m3_row_block) continue;
        export_weights_sync(ctx, model.engine(), path, model.names,
                            {.dtype = DType::e4m3,
                             .scales = naming,
                             .others = DType::f16,
                             .metadata = {{"by", "test"}},
                             .piece_bytes = 5000});
        const SafetensorsReader file(path);
        CHECK(file.metadata() ==
              std::map<std::string, std::string>{{"by", "test"}, {"format", "pt"}});
        for (const NamedWeight& weight : model.names) {
          INFO(name_of(format) << (inverse ? " _scale_inv " : " _scale ") << weight.name);
          const Shape& shape = case_of(weight.id.index).shape;
          const Doubles exact = model.stored(weight.id).values;
          const std::string scale_name = weight.name + (inverse ? "_scale_inv" : "_scale");
          if (!is_e4m3(model.engine().weight_format(weight.id))) {
            CHECK(first_difference(values_in(file, weight.name, DType::f16),
                                   rounded(exact, DType::f16)) == "");
            CHECK(file.find(scale_name) == nullptr);
            continue;
          }
          const FileTensor& scale = file.at(scale_name);
          const std::int64_t tiles[] = {(shape[0] + 127) / 128, (shape[1] + 127) / 128};
          const std::vector<std::int64_t> of_tiles = {tiles[0], tiles[1]};
          CHECK(scale.shape == (inverse || granularity_of(format) == Granularity::tile ? of_tiles
                                : has_tensor_scale(format)
                                    ? std::vector<std::int64_t>{1}
                                    : std::vector<std::int64_t>{shape[0], tiles[1]}));
          const auto codes = bytes_in(file, weight.name);
          const auto factors = floats_in(file, scale_name);
          REQUIRE(codes.size() == exact.size());
          Doubles decoded;
          for (std::size_t i = 0; i < codes.size(); ++i) {
            decoded.push_back(table_of(DType::e4m3).decode(codes[i]) *
                              factor_at(scale, factors, shape, static_cast<std::int64_t>(i)));
          }
          CHECK(first_difference(decoded, exact) == "");
        }
      }
    }
  }
}

TEST_CASE("What is exported starts another engine with the same weights") {
  const Folder folder;
  const std::string path = folder.file("w.safetensors");
  for (const Context& ctx : test_contexts()) {
    const Model model(ctx, WeightFormat::e4m3);
    export_weights_sync(ctx, model.engine(), path, model.names, {.dtype = DType::f32});
    const WeightFiles files(path);
    auto comm = make_single(ctx);
    Engine engine(ctx, *comm, {.level = Level::O1});
    std::vector<Tensor> keep;
    for (const NamedWeight& weight : model.names) {
      const Case& c = case_of(weight.id.index);
      keep.emplace_back(ctx, DType::f32, c.shape);
      files.read_sync(ctx, weight.name, keep.back());
      engine.add({.name = weight.name, .shape = c.shape, .init = keep.back(), .fp8 = c.fp8});
    }
    engine.freeze();
    for (const NamedWeight& weight : model.names) {
      CHECK(first_difference(read_tensor(ctx, engine.weight(weight.id)).values,
                             model.stored(weight.id).values) == "");
    }
  }
}

namespace {

/// The other way round, and units that come again.
std::vector<NamedWeight> mixed(std::vector<NamedWeight> names) {
  std::reverse(names.begin(), names.end());
  std::swap(names[1], names[5]);
  return names;
}

/// Every rank with weights cut over them; it is its caller that lives as long.
Model sharded_model(Communicator& comm, WeightFormat format) {
  const std::vector<Case> even = {{{384, 256}},        {{144, 131}}, {{1000}},
                                  {{304, 697}},        {{16, 900}},  {{70, 64}, false},
                                  {{3, 40, 50}, false}};
  return {std::shared_ptr<Communicator>(std::shared_ptr<void>(), &comm), format,
          Sharding::parameters, even};
}

}  // namespace

TEST_CASE("Weights that are cut over ranks give the same file, whoever writes") {
  const Folder folder;
  const auto path_of = [&](int rank) { return folder.file("rank" + std::to_string(rank)); };
  for (DeviceType device : rank_devices()) {
    for (WeightFormat format : {WeightFormat::bf16, WeightFormat::e4m3, WeightFormat::e4m3_tile,
                                WeightFormat::e4m3_tile_and_transpose}) {
      for (DType dtype : {DType::bf16, DType::e4m3}) {
        if (dtype == DType::e4m3 && !is_e4m3(format)) continue;
        const WeightExport how = {.dtype = dtype, .others = DType::f16, .piece_bytes = 5000};
        std::string whole;
        for (int ranks : {1, 2, 3}) {
          for (int writer = -1; writer < ranks; ++writer) {  // -1: all
            INFO(name_of(format) << " as " << name_of(dtype) << ", rank " << writer << " of "
                                 << ranks << ", cuda " << (device == DeviceType::cuda));
            run_ranks(
                ranks,
                [&](Communicator& comm) {
                  const Model model = sharded_model(comm, format);
                  const bool writes = writer < 0 || writer == comm.rank();
                  export_weights_sync(model.context(), model.engine(),
                                      writes ? path_of(comm.rank()) : "", mixed(model.names), how);
                },
                device);
            for (int rank = 0; rank < ranks; ++rank) {
              REQUIRE(std::filesystem::exists(path_of(rank)) == (writer < 0 || writer == rank));
              if (writer >= 0 && writer != rank) continue;
              const std::string bytes = read_file(path_of(rank));
              if (whole.empty()) whole = bytes;
              CHECK((bytes.size() > 100000 && bytes == whole));
              std::filesystem::remove(path_of(rank));
            }
          }
        }
      }
    }
  }
}

TEST_CASE("A rank that cannot write its file leaves nobody waiting") {
  const Folder folder;
  std::vector<std::string> errors(3), steps(3), refused(3);
  run_ranks(3, [&](Communicator& comm) {
    const auto rank = static_cast<std::size_t>(comm.rank());
    const Model model = sharded_model(comm, WeightFormat::e4m3);
    const std::string name = "rank" + std::to_string(rank);
    const std::string path = folder.file(rank == 1 ? "missing/" + name : name);
    errors[rank] = error_of(
        [&] { export_weights_sync(model.context(), model.engine(), path, model.names, {}); });
    refused[rank] = model.error(rank == 0 ? path : "", {.dtype = DType::e5m2});
    steps[rank] = error_of([&] { model.engine().step({.lr = 1e-3f}); });
  });
  for (std::size_t rank = 0; rank < 3; ++rank) {
    CHECK(missing(refused[rank], {"dtype is e5m2"}) == "");
    CHECK(steps[rank] == "no error");
    if (rank == 1) {
      CHECK(missing(errors[rank], {"missing/rank1"}) == "");
    } else {
      CHECK(errors[rank] == "no error");
      CHECK(SafetensorsReader(folder.file("rank" + std::to_string(rank))).tensors().size() == 7);
    }
  }
}

TEST_CASE("Every tensor begins at a multiple of its element") {
  const Folder folder;
  const std::string path = folder.file("w.safetensors");
  const Model model(Context::cpu(), WeightFormat::e4m3);
  export_weights_sync(model.context(), model.engine(), path, model.names, {.dtype = DType::e4m3});
  const SafetensorsReader file(path);
  for (const FileTensor& tensor : file.tensors()) {
    CHECK(tensor.begin % static_cast<std::uint64_t>(file_dtype_bits(tensor.dtype) / 8) == 0);
  }
}

TEST_CASE("What cannot be exported is refused before a file is made") {
  const Folder folder;
  const std::string path = folder.file("w.safetensors");
  const WeightExport codes = {.dtype = DType::e4m3};
  const WeightExport inverse = {.dtype = DType::e4m3, .scales = ScaleNaming::weight_scale_inv};
  const Context ctx = Context::cpu();
  Model plain(ctx, WeightFormat::bf16);
  CHECK(missing(plain.error(path, codes), {path, "e4m3", "FP8-managed"}) == "");
  CHECK(missing(plain.error(path, {.dtype = DType::e5m2}), {path, "e5m2"}) == "");
  CHECK(missing(plain.error(path, {.others = DType::e4m3}), {path, "others", "e4m3"}) == "");
  const Model rows(ctx, WeightFormat::e4m3_row_block);
  CHECK(missing(rows.error(path, inverse), {path, "layer.0.weight", "e4m3_row_block"}) == "");
  const Model cube(ctx, WeightFormat::e4m3, {{{30, 40, 50}}});
  CHECK(missing(cube.error(path, inverse), {path, "layer.0.weight", "[30, 40, 50]"}) == "");
  CHECK(cube.error(path, codes) == "no error");
  CHECK(SafetensorsReader(path).at("layer.0.weight_scale").shape == std::vector<std::int64_t>{1});
  std::filesystem::remove(path);
  plain.names[1].name = plain.names[0].name;
  CHECK(missing(plain.error(path, {}), {path, "layer.0.weight", "twice"}) == "");
  Model taken(ctx, WeightFormat::e4m3);
  taken.names[2].name = "layer.0.weight_scale";
  CHECK(missing(taken.error(path, codes), {path, "layer.0.weight_scale", "twice"}) == "");
  CHECK(taken.error(path, inverse) == "no error");
  std::filesystem::remove(path);
  taken.names[0].id = {99};
  CHECK(taken.error(path, codes) != "no error");
  CHECK(!std::filesystem::exists(path));
  CHECK(!std::filesystem::exists(path + ".tmp"));
}

}  // namespace octet::test
