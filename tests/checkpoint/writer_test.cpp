// SPDX-License-Identifier: Apache-2.0
// Saving: beside training, what stays in the directory, what the caller adds.
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <thread>
#include <utility>

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
    for (const auto& [ranks, offload] : {std::pair(1, false), {3, false}, {2, true}}) {
      const Folder folder;
      const std::string at_once = folder.file("at once"), beside = folder.file("beside");
      EngineConfig config = saved_config();
      config.offload_states = offload;
      LegResult moved = run_leg({.config = config,
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
          run_leg({.config = config, .ranks = ranks, .end = 3, .device = device});
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

TEST_CASE("a writer that saves a step again leaves the first until the second is complete") {
  const Folder folder;
  const std::string directory = folder.file("run");
  Trained run;
  CheckpointWriter writer(run.engine, *run.comm, directory);
  writer.start();
  const auto first = writer.finish();
  writer.start();
  while (writer.is_writing()) std::this_thread::yield();
  CHECK(names_in(directory).size() == 3);  // an index and two files
  const Bytes held = run.held();
  run.go_on(3);
  CHECK(load_checkpoint(run.engine, *run.comm, directory).id == first->id);
  CHECK(run.held() == held);
  CHECK(writer.finish()->id != first->id);
  CHECK(names_in(directory).size() == 2);
  fs::remove_all(directory);
  writer.start();
  writer.finish();
  CHECK(checkpoint_steps(directory) == std::vector<std::int64_t>{2});
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

TEST_CASE("ranks that cannot open all that they need change nothing") {
  const Folder folder;
  const std::string directory = folder.file("run");
  run_leg(
      {.config = saved_config(), .ranks = 4, .end = 2, .after = [&](Engine& engine, auto& comm) {
         save_checkpoint(engine, comm, directory);
       }});
  rlimit old{};
  getrlimit(RLIMIT_NOFILE, &old);
  const auto open_now = static_cast<rlim_t>(
      std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator()));
  EngineConfig whole = saved_config();
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
    run_leg({.config = saved_config(),
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
      run_leg({.config = saved_config(),
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

}  // namespace octet::test
