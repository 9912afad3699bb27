// SPDX-License-Identifier: Apache-2.0
// Checkpoints that are damaged, mixed up or of another model: a clear error on every rank, and an
// engine that has not changed.
#include <filesystem>
#include <fstream>
#include <functional>
#include <iomanip>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "octet/checkpoint/safetensors.hpp"
#include "octet/checkpoint/xxh64.hpp"
#include "support/catch.hpp"
#include "support/checkpoint_run.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"

namespace octet::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kRanks = 2, kStep = 2;

EngineConfig config() {
  return {.level = Level::O2,
          .sharding = Sharding::optimizer,
          .formats = small_formats(),
          .adamw = {.weight_decay = 0.1f, .seed = 5},
          .bucket_elements = 1 << 20};
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary)
      .write(text.data(), static_cast<std::streamsize>(text.size()));
}

/// A checkpoint that can be damaged and made whole again, and an engine to load it into.
class Victim {
 public:
  Victim() : ctx_(Context::cpu()), comm_(make_single(ctx_)), engine_(ctx_, *comm_, config()) {
    run_leg({.config = config(),
             .ranks = kRanks,
             .end = kStep,
             .after = [&](Engine& engine, Communicator& comm) {
               const CheckpointInfo info = save_checkpoint(engine, comm, directory());
               if (comm.rank() == 0) id_ = info.id;
             }});
    for (const auto& entry : fs::directory_iterator(directory())) {
      files_[entry.path().filename().string()] = read_file(entry.path().string());
    }
    add_saved_params(engine_, ctx_, keep_);
    engine_.freeze();
    take_step(engine_, ctx_, 100, 0, true);
    untouched_ = held_bytes(engine_, ctx_);
  }

  std::string directory() const { return folder_.file("run"); }
  static std::string index() { return "octet-00000002.json"; }
  std::string file(int rank) const {
    return "octet-00000002-" + id_ + "-rank-0000" + std::to_string(rank) + "-of-00002.safetensors";
  }
  std::string path(const std::string& name) const { return directory() + "/" + name; }
  const std::string& good(const std::string& name) const { return files_.at(name); }
  void put(const std::string& name, const std::string& text) { write_file(path(name), text); }
  void heal(const std::string& name) { put(name, files_.at(name)); }

  /// What loading fails with, after checking that it changed nothing.
  std::string error(const LoadOptions& options = {}) {
    const std::string text =
        error_of([&] { load_checkpoint(engine_, *comm_, directory(), options); });
    if (text != "no error") REQUIRE(first_difference(held_bytes(engine_, ctx_), untouched_) == "");
    return text;
  }
  /// Whether a load that went well made what the whole checkpoint makes; goes back to the start.
  bool is_right() {
    const Bytes loaded = held_bytes(engine_, ctx_);
    for (const auto& [name, text] : files_) put(name, text);
    load_checkpoint(engine_, *comm_, directory());
    const bool same = held_bytes(engine_, ctx_) == loaded;
    untouched_ = loaded;
    return same;
  }

 private:
  Folder folder_;
  Context ctx_;
  std::unique_ptr<Communicator> comm_;
  Engine engine_;
  std::vector<Buffer> keep_;
  std::string id_;
  std::map<std::string, std::string> files_;
  Bytes untouched_;
};

std::uint64_t header_bytes(const std::string& file) {
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  return 8 + length;
}

std::string flipped(std::string text, std::size_t at, unsigned bit) {
  text[at] = static_cast<char>(text[at] ^ (1 << bit));
  return text;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  require(at != std::string::npos, "there is no ", from);
  return text.replace(at, from.size(), to);
}

/// An index with its content changed and the checksum made to fit.
std::string forged(const std::string& index, const std::function<void(json&)>& change) {
  json all = json::parse(index);
  change(all["content"]);
  const std::string content = all["content"].dump();
  std::ostringstream hex;
  hex << std::hex << std::setw(16) << std::setfill('0') << xxh64(content.data(), content.size());
  all["xxh64"] = hex.str();
  return all.dump();
}

}  // namespace

TEST_CASE("what is not damaged loads, and the checksum is XXH64") {
  Victim victim;
  CHECK(victim.error() == "no error");
  CHECK(victim.is_right());
  CHECK(xxh64("", 0) == 0xEF46DB3751D8E999u);
  CHECK(xxh64("abc", 3) == 0x44BC2CF5AD770999u);
  const std::string text = "Nobody inspects the spammish repetition";
  CHECK(xxh64(text.data(), text.size()) == 0xFBCEA83C8A378BF1u);
  for (std::size_t cut = 0; cut <= text.size(); ++cut) {
    Xxh64 sum;
    sum.add(text.data(), cut);
    sum.add(text.data() + cut, text.size() - cut);
    CHECK(sum.value() == 0xFBCEA83C8A378BF1u);
  }
}

TEST_CASE("files that are cut short, grown, missing or of others are refused") {
  Victim victim;
  for (int rank = 0; rank < kRanks; ++rank) {
    const std::string name = victim.file(rank), text = victim.good(name);
    INFO(name);
    for (std::size_t size : {std::size_t{0}, std::size_t{7}, std::size_t{8}, std::size_t{200},
                             static_cast<std::size_t>(header_bytes(text)), text.size() - 1}) {
      victim.put(name, text.substr(0, size));
      CHECK(missing(victim.error(), {"rank 0: ", name, std::to_string(size) + " bytes",
                                     std::to_string(text.size())}) == "");
    }
    victim.put(name, text + "x");
    CHECK(missing(victim.error(), {name, "bytes"}) == "");
    fs::remove(victim.path(name));
    CHECK(missing(victim.error(), {name, "rank " + std::to_string(rank) + " is missing"}) == "");
    fs::create_directory(victim.path(name));
    CHECK(missing(victim.error(), {name}) == "");
    fs::remove(victim.path(name));
    victim.heal(name);
  }

  // The same model and step, saved by another run: every byte has its place but the wrong id.
  Victim other;
  victim.put(victim.file(1), other.good(other.file(1)));
  CHECK(missing(victim.error(), {victim.file(1), "id is", "not of one save"}) == "");
  victim.heal(victim.file(1));
  // Data of one run under the header of the other.
  const std::string mine = victim.good(victim.file(1));
  std::string mixed = mine;
  mixed.back() = static_cast<char>(mixed.back() ^ 1);
  victim.put(victim.file(1), mixed);
  CHECK(missing(victim.error(), {victim.file(1), "checksum", "damaged"}) == "");
  victim.heal(victim.file(1));
  // Both files are there, but under each other's names.
  victim.put(victim.file(0), victim.good(victim.file(1)));
  CHECK(missing(victim.error(), {victim.file(0)}) == "");
  victim.heal(victim.file(0));
  CHECK(victim.error() == "no error");
}

TEST_CASE("a flipped bit is found wherever it is, or changes nothing") {
  Victim victim;
  int refused = 0, harmless = 0;
  const auto check = [&](const std::string& name, std::size_t at, bool is_data) {
    victim.put(name, flipped(victim.good(name), at, static_cast<unsigned>(at % 8)));
    const std::string error = victim.error();
    INFO(name << " at byte " << at << ": " << error);
    if (error == "no error") {
      REQUIRE(!is_data);
      REQUIRE(victim.is_right());
      ++harmless;
      return;
    }
    REQUIRE(missing(error, {name == victim.index() ? "octet-0000000" : name}) == "");
    if (is_data) REQUIRE(missing(error, {"tensor \"", "checksum"}) == "");
    victim.heal(name);
    ++refused;
  };
  for (int rank = 0; rank < kRanks; ++rank) {
    const std::string name = victim.file(rank);
    const std::size_t data = header_bytes(victim.good(name)), end = victim.good(name).size();
    for (std::size_t at = 0; at < data; at += at < 8 ? 1 : 13) check(name, at, false);
    for (std::size_t at = data; at < end; at += (end - data) / 50) check(name, at, true);
    // The first and the last byte of every tensor.
    const SafetensorsReader reader(victim.path(name));
    for (const FileTensor& tensor : reader.tensors()) {
      check(name, data + tensor.begin, true);
      check(name, data + tensor.begin + tensor.bytes - 1, true);
    }
  }
  for (std::size_t at = 0; at < victim.good(victim.index()).size(); at += 29) {
    check(victim.index(), at, false);
  }
  CHECK(refused > 500);
  CHECK(harmless < refused / 20);  // blanks between the values of an index, say
}

TEST_CASE("headers that say something else than the index are refused") {
  Victim victim;
  const std::string name = victim.file(1), text = victim.good(name);
  const auto check = [&](const std::string& from, const std::string& to,
                         std::initializer_list<std::string> words) {
    REQUIRE(from.size() == to.size());
    victim.put(name, replaced(text, from, to));
    const std::string error = victim.error();
    CHECK(missing(error, words) == "");
    CHECK(missing(error, {name}) == "");
  };
  check("\"F8_E4M3\"", "\"F8_E5M2\"", {"dtype is F8_E5M2", "must be F8_E4M3"});
  check("[1000]", "[ 500]", {"bias"});
  check("\"dtype\":\"F32\",\"shape\":[1000]", "\"dtype\":\"I32\",\"shape\":[1000]",
        {"bias", "dtype is I32"});
  check("\"bias.m\"", "\"bias.q\"", {"bias.m"});
  check("\"step\":\"2\"", "\"step\":\"3\"", {"step is", "\"3\""});
  check("\"ranks\":\"2\"", "\"ranks\":\"3\"", {"ranks is"});
  victim.heal(name);
  CHECK(victim.error() == "no error");
}

TEST_CASE("an index that is garbage, or names what is not its own, is refused") {
  Victim victim;
  const std::string name = victim.index(), text = victim.good(name);
  const std::vector<std::pair<std::string, std::string>> texts = {
      {"", "JSON"},
      {"garbage", "JSON"},
      {text.substr(0, text.size() / 2), "JSON"},
      {std::string(100000, '['), "nested"},
      {R"({"content":{"a":)" + std::string(100000, '[') + std::string(100000, ']') + "}}",
       "nested"},
      {"[]", "is no object"},
      {"{}", "has no \"format\""},
      {replaced(text, "octet checkpoint", "other checkpoint"), "format"},
      {replaced(text, "\"version\": 1", "\"version\": 2"), "version"},
      {replaced(text, "\"skipped\": 0", "\"skipped\": 1"), "checksum"},
      {std::string("\0\xFF\xFE", 3), "JSON"}};
  for (const auto& [damaged, word] : texts) {
    victim.put(name, damaged);
    CHECK(missing(victim.error(), {name, word}) == "");
  }

  const auto check = [&](const std::function<void(json&)>& change,
                         std::initializer_list<std::string> words) {
    victim.put(name, forged(text, change));
    const std::string error = victim.error();
    CHECK(missing(error, {name}) == "");
    CHECK(missing(error, words) == "");
  };
  const auto range = [](json& c, std::size_t i) -> json& {
    return c["params"][2]["arrays"][0]["ranges"][i];  // of "odd", which both ranks hold
  };
  check([](json& c) { c["files"][0]["name"] = "../other"; }, {"files[0].name", "../other"});
  check([](json& c) { c["files"][0]["name"] = "/etc/passwd"; }, {"files[0].name"});
  check([](json& c) { std::swap(c["files"][0], c["files"][1]); }, {"files[0].name"});
  check([](json& c) { c["files"] = json::array(); }, {"files", "empty"});
  check([](json& c) { c["step"] = -1; }, {"content.step"});
  check([](json& c) { c["step"] = 2.5; }, {"content.step"});
  check([](json& c) { c["id"] = "xyz"; }, {"content.id"});
  check([](json& c) { c.erase("params"); }, {"has no \"params\""});
  check([](json& c) { c["metadata"] = 1; }, {"metadata"});
  check([](json& c) { c["adamw"]["maximize"] = 1; }, {"maximize"});
  check([](json& c) { c.erase("gradients"); }, {"has no \"gradients\""});
  check([](json& c) { c["gradients"]["reduced"] = 1; }, {"content.gradients.reduced"});
  check([&](json& c) { range(c, 0)["file"] = 2; }, {"ranges[0].file", "2"});
  check([&](json& c) { range(c, 0)["tensor"] = "bias.m"; }, {"bias.m", "odd.weight.0"});
  check([&](json& c) { range(c, 1)["begin"] = 0; }, {"ranges[1].begin"});
  check([&](json& c) { range(c, 0)["count"] = 1; }, {"ranges[1].begin"});
  check([&](json& c) { range(c, 0)["count"] = std::uint64_t{1} << 63; }, {"ranges[0].count"});
  check([&](json& c) { c["params"][2]["arrays"][0]["ranges"].erase(1); }, {"ranges", "end"});
  check([&](json& c) { range(c, 0)["xxh64"] = "00"; }, {"ranges[0].xxh64"});
  check([](json& c) { c["params"][0]["shape"] = {300, 98}; }, {"ranges"});
  check([](json& c) { c["params"][0]["shape"] = {97, 300}; }, {"embedding", "shape"});
  check(
      [](json& c) {
        c["params"][0]["shape"] = {std::int64_t{1} << 40, std::int64_t{1} << 40};
      },
      {"params[0].shape"});
  check([](json& c) { c["params"].erase(0); }, {"\"embedding\"", "missing"});
  check([](json& c) { c["params"].push_back(c["params"][0]); }, {"params"});
  check([](json& c) { std::swap(c["params"][0], c["params"][1]); }, {"params[0]", "order"});
  check([](json& c) { c["params"][0]["name"] = "stranger"; }, {"embedding"});
  check([](json& c) { c["params"][0]["arrays"].erase(3); }, {"embedding"});
  check([](json& c) { c["params"][0]["arrays"][2]["format"] = "f32"; }, {"embedding", "f32"});
  check([](json& c) { c["scales"]["tensor"] = "bias.m"; }, {"scales"});
  // A checksum that is not that of the data.
  victim.put(name, forged(text, [&](json& c) { range(c, 0)["xxh64"] = "0123456789abcdef"; }));
  CHECK(missing(victim.error(), {"odd.weight.0", "0123456789abcdef"}) == "");
  victim.heal(name);
  fs::rename(victim.path(name), victim.path("octet-00000003.json"));
  CHECK(missing(victim.error(), {"octet-00000003.json", "step"}) == "");
  fs::remove(victim.path("octet-00000003.json"));
  CHECK(missing(victim.error(), {victim.directory(), "no complete checkpoint"}) == "");
  victim.heal(name);
  CHECK(missing(victim.error({.step = 7}), {"step 7", "newest is of step 2"}) == "");
  CHECK(victim.error() == "no error");
}

TEST_CASE("a checkpoint of another model or configuration is refused") {
  Victim victim;
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  const auto error = [&](const EngineConfig& with,
                         const std::function<void(std::vector<SavedParam>&)>& change,
                         const LoadOptions& options = {}) {
    std::vector<SavedParam> params = saved_params();
    change(params);
    Engine engine(ctx, *comm, with);
    std::vector<Buffer> keep;
    for (const SavedParam& p : params) {
      const auto count = static_cast<std::size_t>(p.shape.numel());
      keep.push_back(upload(ctx, normal_values(count, 1, 0.02f)));
      engine.add({.name = p.name,
                  .shape = p.shape,
                  .init = view_of(ctx, keep.back(), DType::f32, p.shape),
                  .group = p.group});
    }
    engine.freeze();
    return error_of([&] { load_checkpoint(engine, *comm, victim.directory(), options); });
  };
  const auto same = [](std::vector<SavedParam>&) {};
  CHECK(error(config(), same) == "no error");
  CHECK(missing(error(config(), [](auto& p) { p.pop_back(); }), {"wide", "none of the engine's"}) ==
        "");
  CHECK(missing(error(config(),
                      [](auto& p) {
                        p.push_back({"new", {5}});
                      }),
                {"new", "missing"}) == "");
  CHECK(missing(error(config(), [](auto& p) { std::swap(p[0], p[1]); }), {"order"}) == "");
  CHECK(missing(error(config(),
                      [](auto& p) {
                        p[1].shape = {10, 100};
                      }),
                {"bias", "[1000]", "[10, 100]"}) == "");
  EngineConfig other = config();
  other.formats = formats_of(Level::O2);
  CHECK(missing(error(other, same), {"embedding", "master", "split", "f16"}) == "");
  other = config();
  other.fp8_min_elements = 100000;
  CHECK(missing(error(other, same), {"embedding", "weight", "e4m3", "f32"}) == "");

  const LoadOptions change{.change_hyper_parameters = true};
  const auto check_hyper = [&](const EngineConfig& with, auto edit, const std::string& field) {
    CHECK(missing(error(with, edit), {field, "change_hyper_parameters"}) == "");
    CHECK(error(with, edit, change) == "no error");
  };
  other = config();
  other.adamw.seed = 6;
  check_hyper(other, same, "seed");
  other = config();
  other.adamw.beta1 = 0.8f;
  check_hyper(other, same, "beta1");
  other = config();
  other.adamw.stochastic_rounding = false;
  check_hyper(other, same, "stochastic_rounding");
  other = config();
  other.reduced_gradient = DType::e4m3;
  check_hyper(other, same, "content.gradients: reduced was \"f32\"");
  other = config();
  other.formats->gradient = DType::bf16;
  check_hyper(other, same, "content.gradients: gradient was \"e4m3\"");
  // Micro-batches come and go; what they are summed in counts where both runs have them.
  other = config();
  other.micro_batches = 2;
  CHECK(error(other, same) == "no error");
  victim.put(victim.index(), forged(victim.good(victim.index()),
                                    [](json& c) { c["gradients"]["micro_batches"] = 4; }));
  CHECK(error(config(), same) == "no error");
  CHECK(error(other, same) == "no error");
  other.accumulator = DType::bf16;
  check_hyper(other, same, "content.gradients: accumulator was \"f32\"");
  victim.heal(victim.index());
  check_hyper(
      config(), [](auto& p) { p[2].group.lr_factor = 0.25f; }, "\"odd\": lr_factor");
}

TEST_CASE("while a unit is whole nothing is loaded, and nothing has changed") {
  Victim victim;
  constexpr int kLoaders = 3;
  EngineConfig sharded = config();
  sharded.sharding = Sharding::parameters;
  std::vector<std::string> errors(kLoaders);
  run_leg({.config = sharded, .ranks = kLoaders, .before = [&](Engine& engine, auto& comm) {
             const Bytes old = held_bytes(engine, comm.context());
             engine.gather(0);
             errors[static_cast<std::size_t>(comm.rank())] =
                 error_of([&] { load_checkpoint(engine, comm, victim.directory()); });
             engine.release(0);
             require(held_bytes(engine, comm.context()) == old, "the engine has changed");
             load_checkpoint(engine, comm, victim.directory());
           }});
  for (const std::string& error : errors) {
    CHECK(missing(error, {"load_checkpoint", "units, 0 are whole", "released first"}) == "");
    CHECK(error.find("partly") == std::string::npos);
  }
}

TEST_CASE("damage that one rank finds is an error of all, and none has changed") {
  Victim victim;
  std::string text = victim.good(victim.file(1));
  victim.put(victim.file(1), flipped(text, text.size() - 1, 3));
  constexpr int kLoaders = 3;
  std::vector<std::string> errors(kLoaders);
  const LegResult result = run_leg(
      {.config = config(), .ranks = kLoaders, .before = [&](Engine& engine, Communicator& comm) {
         const Bytes old = held_bytes(engine, comm.context());
         errors[static_cast<std::size_t>(comm.rank())] =
             error_of([&] { load_checkpoint(engine, comm, victim.directory()); });
         require(held_bytes(engine, comm.context()) == old, "the engine has changed");
       }});
  for (const std::string& error : errors) {
    CHECK(error == errors[0]);
    CHECK(missing(error, {"rank ", victim.file(1), "checksum"}) == "");
  }
}

}  // namespace octet::test
