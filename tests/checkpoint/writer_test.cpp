// SPDX-License-Identifier: Apache-2.0
// Saving: beside training, what stays in the directory, what the caller adds, what is refused.
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <set>

#include "octet/checkpoint/safetensors.hpp"
#include "octet/comm/sum_reducer.hpp"
#include "octet/ops/delayed_scaling.hpp"
#include "support/catch.hpp"
#include "support/checkpoint_run.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"

namespace octet::test {
namespace {

namespace fs = std::filesystem;

EngineConfig config() {
  return {.level = Level::O3, .adamw = {.weight_decay = 0.1f, .seed = 5}, .bucket_elements = 20000};
}

std::set<std::string> names_in(const std::string& directory) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) {
    names.insert(entry.path().filename().string());
  }
  return names;
}

/// A trained engine of one rank.
struct Trained {
  explicit Trained(int until = 2) {
    add_saved_params(engine, ctx, keep);
    engine.freeze();
    go_on(until);
  }
  void go_on(int until) {
    while (steps < until) take_step(engine, ctx, ++steps, 0, true);
  }
  Bytes held() { return held_bytes(engine, ctx); }

  Context ctx = Context::cpu();
  std::unique_ptr<Communicator> comm = make_single(ctx);
  Engine engine{ctx, *comm, config()};
  std::vector<Buffer> keep;
  int steps = 0;
};

/// Of all tensors of all files of a directory, without the names of the files.
std::map<std::string, std::string> tensors_in(const std::string& directory) {
  std::map<std::string, std::string> tensors;
  for (const std::string& name : names_in(directory)) {
    if (!name.ends_with(".safetensors")) continue;
    const SafetensorsReader reader(directory + "/" + name);
    for (const FileTensor& tensor : reader.tensors()) {
      std::string data(tensor.bytes, '\0');
      reader.read(tensor, 0, tensor.bytes, data.data());
      tensors[tensor.name] = tensor.dtype + data;
    }
  }
  return tensors;
}

}  // namespace

TEST_CASE("what is written beside training is what the engine was when it began") {
  for (DeviceType device : rank_devices()) {
    for (int ranks : {1, 3}) {
      const Folder folder;
      const std::string at_once = folder.file("at once"), beside = folder.file("beside");
      LegResult moved = run_leg({.config = config(),
                                 .ranks = ranks,
                                 .end = 2,
                                 .device = device,
                                 .after = [&](Engine& engine, Communicator& comm) {
                                   save_checkpoint(engine, comm, at_once);
                                   CheckpointWriter writer(engine, comm, beside);
                                   require(!writer.finish().has_value(), "nothing was started");
                                   writer.start();
                                   take_step(engine, comm.context(), 3, comm.rank(), true);
                                   require(checkpoint_steps(beside).empty(), "not yet finished");
                                   const auto info = writer.finish();
                                   require(info.has_value() && info->step == 2, "wrong step");
                                   require(!writer.is_writing(), "still writing");
                                 }});
      CHECK(tensors_in(beside) == tensors_in(at_once));
      CHECK(checkpoint_steps(beside) == std::vector<std::int64_t>{2});
      const LegResult same =
          run_leg({.config = config(), .ranks = ranks, .end = 3, .device = device});
      CHECK(moved.after == same.after);  // saving changes nothing
    }
  }
}

TEST_CASE("each start finishes the save before, and only `keep` checkpoints stay") {
  const Folder folder;
  const std::string directory = folder.file("a/new/folder");
  CHECK(checkpoint_steps(directory).empty());
  Trained run;
  CheckpointWriter writer(run.engine, *run.comm, directory);
  for (int step = 3; step <= 6; ++step) {
    run.go_on(step);
    writer.start({.keep = 2, .metadata = {{"position", std::to_string(100 * step)}}});
  }
  CHECK(checkpoint_steps(directory) == std::vector<std::int64_t>{4, 5});
  writer.finish();
  CHECK(checkpoint_steps(directory) == std::vector<std::int64_t>{5, 6});
  CHECK(names_in(directory).size() == 4);
  CHECK(read_checkpoint_info(directory).step == 6);
  CHECK(read_checkpoint_info(directory, 5).metadata.at("position") == "500");

  const Bytes newest = run.held();
  run.go_on(7);
  const CheckpointInfo info = load_checkpoint(run.engine, *run.comm, directory);
  CHECK(info.step == 6);
  CHECK(info.metadata.at("position") == "600");
  CHECK(run.held() == newest);
  load_checkpoint(run.engine, *run.comm, directory, {.step = 5});
  CHECK(run.held() != newest);
  // An older one is no ground to save over newer ones.
  CHECK(missing(error_of([&] { save_checkpoint(run.engine, *run.comm, directory); }),
                {directory, "step 6", "step 5"}) == "");
  run.steps = 5;
  run.go_on(6);
  CHECK(run.held() == newest);
}

TEST_CASE("a step that is saved again takes the place of the first, and litter is swept") {
  const Folder folder;
  const std::string directory = folder.file("run");
  Trained run;
  save_checkpoint(run.engine, *run.comm, directory, {.metadata = {{"try", "1"}}});
  const std::set<std::string> first = names_in(directory);
  const std::string id = "-0123456789abcdef-rank-00000-of-00001.safetensors";
  const std::set<std::string> litter = {"octet-00000001" + id, "octet-00000002" + id + ".tmp",
                                        "octet-00000009.json.tmp"};
  const std::set<std::string> others = {"octet-notes.txt", "octet-2.json", "model.safetensors",
                                        "octet-00000002-x-rank-00000-of-00001.safetensors",
                                        "octet-00000002.json.bak"};
  for (const std::string& name : litter) std::ofstream(directory + "/" + name) << "x";
  for (const std::string& name : others) std::ofstream(directory + "/" + name) << "x";
  save_checkpoint(run.engine, *run.comm, directory, {.metadata = {{"try", "2"}}});
  CHECK(read_checkpoint_info(directory).metadata.at("try") == "2");
  std::set<std::string> left = names_in(directory);
  for (const std::string& name : others) CHECK(left.erase(name) == 1);
  CHECK(left.size() == 2);
  CHECK(left != first);
  const Bytes held = run.held();
  run.go_on(3);
  load_checkpoint(run.engine, *run.comm, directory);
  CHECK(run.held() == held);
}

TEST_CASE("litter is gone before a save takes room, and what cannot be removed is no failure") {
  const Folder folder;
  const std::string directory = folder.file("run");
  const std::string id = "-0123456789abcdef-rank-00000-of-00001.safetensors";
  Trained run;
  save_checkpoint(run.engine, *run.comm, directory);
  const std::set<std::string> kept = names_in(directory);
  const std::string litter = directory + "/octet-00000003" + id + ".tmp";
  std::ofstream(litter) << "x";
  run.go_on(3);
  {
    CheckpointWriter writer(run.engine, *run.comm, directory);
    writer.start();
    CHECK(!fs::exists(litter));
  }
  CHECK(names_in(directory) == kept);  // also what no index will name

  const std::string stubborn = directory + "/octet-00000001" + id;
  fs::create_directories(stubborn + "/full");
  const CheckpointInfo info = save_checkpoint(run.engine, *run.comm, directory);
  CHECK(missing(info.not_removed, {stubborn, "removed"}) == "");
  CHECK(checkpoint_steps(directory) == std::vector<std::int64_t>{3});
  fs::remove_all(stubborn);
  CHECK(save_checkpoint(run.engine, *run.comm, directory).not_removed.empty());
  CHECK(names_in(directory).size() == 2);
}

TEST_CASE("where the index cannot be written no rank leaves its file") {
  const Folder folder;
  const std::string directory = folder.file("run"),
                    stubborn = directory + "/octet-00000002.json.tmp";
  fs::create_directories(stubborn + "/full");
  std::vector<std::string> errors(3);
  run_leg(
      {.config = config(), .ranks = 3, .end = 2, .after = [&](Engine& engine, Communicator& comm) {
         errors[static_cast<std::size_t>(comm.rank())] =
             error_of([&] { save_checkpoint(engine, comm, directory); });
       }});
  for (const std::string& error : errors) CHECK(missing(error, {"rank 0", stubborn}) == "");
  CHECK(names_in(directory).size() == 1);
}

TEST_CASE("ranks that cannot open all that they need change nothing") {
  const Folder folder;
  const std::string directory = folder.file("run");
  run_leg({.config = config(), .ranks = 4, .end = 2, .after = [&](Engine& engine, auto& comm) {
             save_checkpoint(engine, comm, directory);
           }});
  rlimit old{};
  getrlimit(RLIMIT_NOFILE, &old);
  const auto open_now = static_cast<rlim_t>(
      std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator()));
  EngineConfig whole = config();
  whole.sharding = Sharding::none;  // every rank reads every file
  whole.reduced_gradient = DType::e4m3;
  int refused = 0;
  // The checks alone need about half of what reading needs.
  for (rlim_t limit = open_now; limit <= open_now + 10; ++limit) {
    std::vector<std::string> errors(2);
    run_leg({.config = whole, .ranks = 2, .before = [&](Engine& engine, Communicator& comm) {
               const Bytes before = held_bytes(engine, comm.context());
               const auto rank = static_cast<std::size_t>(comm.rank());
               all_gather_text_sync(comm, "");
               const rlimit few{.rlim_cur = limit, .rlim_max = old.rlim_max};
               setrlimit(RLIMIT_NOFILE, &few);
               errors[rank] = error_of([&] {
                 load_checkpoint(engine, comm, directory, {.change_hyper_parameters = true});
               });
               setrlimit(RLIMIT_NOFILE, &old);
               if (errors[rank] == "no error") return;
               require(held_bytes(engine, comm.context()) == before, "the engine has changed");
             }});
    CHECK(errors[1] == errors[0]);
    if (errors[0] == "no error") continue;
    CHECK(missing(errors[0], {directory, "opened"}) == "");
    CHECK(errors[0].find("partly") == std::string::npos);
    ++refused;
  }
  CHECK(refused >= 5);
  CHECK(refused <= 9);
}

TEST_CASE("a save that is never finished is no checkpoint, and leaves nothing") {
  const Folder folder;
  const std::string directory = folder.file("run");
  Trained run;
  { CheckpointWriter(run.engine, *run.comm, directory).start(); }
  CHECK(names_in(directory).empty());
}

TEST_CASE("a disk that is full fails the save on every rank and keeps the checkpoint before") {
  const Folder folder;
  const std::string directory = folder.file("run");
  std::vector<std::string> errors(6);
  std::set<std::string> before;
  const auto with_small_files = [&](const std::function<void()>& work) {
    rlimit old{};
    getrlimit(RLIMIT_FSIZE, &old);
    const rlimit small{.rlim_cur = 20000, .rlim_max = old.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    work();
    setrlimit(RLIMIT_FSIZE, &old);
  };
  const LegResult whole = run_leg(
      {.config = config(), .ranks = 3, .end = 2, .after = [&](Engine& engine, Communicator& comm) {
         save_checkpoint(engine, comm, directory);
       }});
  before = names_in(directory);
  with_small_files([&] {
    run_leg({.config = config(),
             .ranks = 3,
             .end = 3,
             .after = [&](Engine& engine, Communicator& comm) {
               const auto rank = static_cast<std::size_t>(comm.rank());
               errors[rank] = error_of([&] { save_checkpoint(engine, comm, directory); });
               CheckpointWriter writer(engine, comm, directory);
               writer.start();
               errors[3 + rank] = error_of([&] { writer.finish(); });
               require(error_of([&] { writer.finish(); }) == "no error", "it was over");
             }});
  });
  for (const std::string& error : errors) {
    CHECK(missing(error, {"rank ", directory, "octet-00000003", "written"}) == "");
  }
  CHECK(names_in(directory) == before);
  const LegResult loaded = run_leg({.config = config(),
                                    .ranks = 3,
                                    .begin = 2,
                                    .end = 2,
                                    .before = [&](Engine& engine, Communicator& comm) {
                                      load_checkpoint(engine, comm, directory);
                                    }});
  CHECK(loaded.after == whole.after);
}

TEST_CASE("the caller's buffers come back to every rank") {
  for (DeviceType device : rank_devices()) {
    const Folder folder;
    const std::string directory = folder.file("run");
    // Delayed scaling with another history on every rank, and mu.
    struct Recipe {
      explicit Recipe(const Context& ctx, int ranks)
          : scale(upload<TensorScale>(ctx, {{}})),
            delayed(ctx, {.amax_history_len = 16}, {{scale.as<TensorScale>(), DType::e4m3}}),
            mu(ctx, ranks) {}
      std::vector<ExtraState> extras() {
        return {{"scale", scale.data(), sizeof(TensorScale)},
                {"history", delayed.history(), 16 * sizeof(float)},
                {"next", delayed.next(), sizeof(std::uint32_t)},
                {"mu", mu.state(), sizeof(AutoScaleState)},
                {"nothing", nullptr, 0}};
      }
      Buffer scale;
      DelayedScaling delayed;
      AutoScale mu;
    };
    run_leg({.config = config(),
             .ranks = 3,
             .end = 1,
             .device = device,
             .after = [&](Engine& engine, Communicator& comm) {
               const Context ctx = comm.context();
               Recipe recipe(ctx, 3);
               write_one(ctx, &recipe.scale.as<TensorScale>()->amax,
                         1.0f + static_cast<float>(comm.rank()));
               recipe.delayed.update();
               recipe.mu.set_exponent_sync(123);
               save_checkpoint(engine, comm, directory, {.extras = recipe.extras()});
             }});
    for (int ranks : {2, 3, 5}) {
      run_leg({.config = config(),
               .ranks = ranks,
               .device = device,
               .before = [&](Engine& engine, Communicator& comm) {
                 const Context ctx = comm.context();
                 Recipe recipe(ctx, 3);
                 load_checkpoint(engine, comm, directory, {.extras = recipe.extras()});
                 const float amax = download_one<float>(ctx, recipe.delayed.history());
                 require(amax == 1.0f + static_cast<float>(comm.rank() % 3), "rank ", comm.rank(),
                         " got ", amax);
                 require(download_one<std::uint32_t>(ctx, recipe.delayed.next()) == 1, "next");
                 require(recipe.mu.exponent_sync() == 123, "mu");
               }});
    }
  }
}

TEST_CASE("buffers that do not fit are refused before anything changes") {
  const Folder folder;
  const std::string directory = folder.file("run");
  Trained run;
  std::uint64_t word = 7, other = 0;
  save_checkpoint(run.engine, *run.comm, directory, {.extras = {{"word", &word, 8}}});
  run.go_on(3);
  const Bytes held = run.held();
  const auto error = [&](const LoadOptions& options) {
    return error_of([&] { load_checkpoint(run.engine, *run.comm, directory, options); });
  };
  CHECK(missing(error({}), {"octet-00000002.json", "word", "leave_extras"}) == "");
  CHECK(missing(error({.extras = {{"word", &other, 4}}}), {"word", "8", "4"}) == "");
  CHECK(missing(error({.extras = {{"word", nullptr, 8}}}), {"word", "null"}) == "");
  CHECK(missing(error({.extras = {{"world", &other, 8}}}), {"world"}) == "");
  CHECK(run.held() == held);
  CHECK(other == 0);
  CHECK(error({.extras = {{"word", &other, 8}}}) == "no error");
  CHECK(other == 7);
  CHECK(error({.leave_extras = true}) == "no error");
}

TEST_CASE("a directory is made where the path leads, over links too") {
  const Folder folder;
  fs::create_directories(folder.file("far/deep"));
  fs::create_directory_symlink(folder.file("far/deep"), folder.file("link"));
  Trained run(1);
  save_checkpoint(run.engine, *run.comm, folder.file("link/../beside/new/"));
  CHECK(checkpoint_steps(folder.file("far/beside/new")) == std::vector<std::int64_t>{1});
  CHECK(!fs::exists(folder.file("beside")));
  CHECK(missing(error_of([&] { save_checkpoint(run.engine, *run.comm, ""); }), {"empty name"}) ==
        "");
}

TEST_CASE("saves that cannot be right are refused") {
  const Folder folder;
  const std::string directory = folder.file("run");
  Trained run;
  int word = 0;
  const auto error = [&](const SaveOptions& options) {
    return error_of([&] { save_checkpoint(run.engine, *run.comm, directory, options); });
  };
  CHECK(missing(error({.keep = 0}), {"SaveOptions::keep is 0"}) == "");
  CHECK(missing(error({.extras = {{"", &word, 4}}}), {"extras", "no name"}) == "");
  CHECK(missing(error({.extras = {{"a", &word, 4}, {"a", &word, 4}}}), {"extras", "\"a\""}) == "");
  CHECK(missing(error({.extras = {{"\xFF", &word, 4}}}), {"SaveOptions::extras", "UTF-8"}) == "");
  CHECK(missing(error({.extras = {{"a", nullptr, 4}}}), {"extras", "\"a\"", "null"}) == "");
  CHECK(missing(error({.metadata = {{"key", "\xFF"}}}), {"metadata", "UTF-8"}) == "");
  CHECK(checkpoint_steps(directory).empty());
  std::ofstream(folder.file("file")) << "x";
  CHECK(missing(error_of([&] { save_checkpoint(run.engine, *run.comm, folder.file("file")); }),
                {folder.file("file")}) == "");
  CHECK(missing(error_of([&] { load_checkpoint(run.engine, *run.comm, folder.file("none")); }),
                {folder.file("none"), "no complete checkpoint"}) == "");

  const std::vector<SavedParam> params = saved_params();
  const Buffer gradient = upload(run.ctx, leg_gradient(1, params[1].shape, 1, 0, true));
  run.engine.add_gradient({1}, view_of(run.ctx, gradient, DType::f32, params[1].shape));
  CHECK(missing(error({}), {"\"bias\"", "1 gradient"}) == "");
  CHECK(checkpoint_steps(directory).empty());
}

TEST_CASE("ranks that save different things all learn of it") {
  const Folder folder;
  const auto errors_of = [&](auto options_of, auto directory_of) {
    std::vector<std::string> errors(3);
    run_leg({.config = config(),
             .ranks = 3,
             .end = 1,
             .after = [&](Engine& engine, Communicator& comm) {
               const int rank = comm.rank();
               errors[static_cast<std::size_t>(rank)] = error_of(
                   [&] { save_checkpoint(engine, comm, directory_of(rank), options_of(rank)); });
             }});
    CHECK(errors[1] == errors[0]);
    CHECK(errors[2] == errors[0]);
    return errors[0];
  };
  const auto one_directory = [&](int) { return folder.file("run"); };
  CHECK(missing(errors_of(
                    [](int rank) {
                      return SaveOptions{.metadata = {{"p", rank == 2 ? "1" : "0"}}};
                    },
                    one_directory),
                {"metadata", "rank 0", "rank 2"}) == "");
  CHECK(missing(errors_of([](int rank) { return SaveOptions{.keep = 1 + rank}; }, one_directory),
                {"keep", "rank 1"}) == "");
  CHECK(missing(errors_of([](int rank) { return SaveOptions{.keep = rank}; }, one_directory),
                {"rank 0", "keep is 0"}) == "");
  const auto no_options = [](int) { return SaveOptions{}; };
  CHECK(missing(
            errors_of(no_options,
                      [&](int rank) { return rank == 1 ? "/proc/none/run" : folder.file("run"); }),
            {"rank 1", "/proc/none"}) == "");
  CHECK(missing(errors_of(no_options, [&](int rank) { return folder.file(rank == 1 ? "a" : "b"); }),
                {"rank-00001-of-00003", "one directory"}) == "");
  CHECK(checkpoint_steps(folder.file("run")).empty());
  CHECK(checkpoint_steps(folder.file("b")).empty());
}

}  // namespace octet::test
