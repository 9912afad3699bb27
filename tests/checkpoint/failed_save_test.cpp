// SPDX-License-Identifier: Apache-2.0
// Saves that fail: on every rank, with the reason, and with the checkpoint before left as it was.
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <thread>

#include "support/catch.hpp"
#include "support/checkpoint_run.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"

namespace octet::test {
namespace {

namespace fs = std::filesystem;

}  // namespace

TEST_CASE("where the index cannot be written no rank leaves its file") {
  const Folder folder;
  const std::string directory = folder.file("run"),
                    stubborn = directory + "/octet-00000002.json.tmp";
  fs::create_directories(stubborn + "/full");
  std::vector<std::string> errors(3);
  run_leg({.config = saved_config(),
           .ranks = 3,
           .end = 2,
           .after = [&](Engine& engine, Communicator& comm) {
             errors[static_cast<std::size_t>(comm.rank())] =
                 error_of([&] { save_checkpoint(engine, comm, directory); });
           }});
  for (const std::string& error : errors) CHECK(missing(error, {"rank 0", stubborn}) == "");
  CHECK(names_in(directory).size() == 1);
}

TEST_CASE(
    "what is wrong with a save beside training finish() tells every rank, and the next works") {
  const Folder folder;
  const std::string directory = folder.file("run");
  const auto errors_of = [&](const std::function<SaveOptions(int)>& options_of, bool waiting) {
    std::vector<std::string> errors(3);
    run_leg({.config = saved_config(),
             .ranks = 3,
             .end = 1,
             .after = [&](Engine& engine, Communicator& comm) {
               const Context ctx = comm.context();
               CheckpointWriter writer(engine, comm, directory);
               writer.start();
               writer.finish();
               const auto error = [&](int step, const SaveOptions& options) {
                 take_step(engine, ctx, step, comm.rank(), true);
                 const Shape bias = saved_params()[1].shape;
                 const Buffer gradient = upload(ctx, leg_gradient(1, bias, 9, 0, true));
                 const bool waits = waiting && step == 2;
                 if (waits) engine.add_gradient({1}, view_of(ctx, gradient, DType::f32, bias));
                 writer.start(options);
                 const std::string text = error_of([&] { writer.finish(); });
                 if (waits) engine.step({.lr = 0.0f});
                 return text;
               };
               const int rank = comm.rank();
               const std::set<std::string> before = names_in(directory);
               errors[static_cast<std::size_t>(rank)] = error(2, options_of(rank));
               all_gather_text_sync(comm, "all have failed");
               require(names_in(directory) == before, "something of the failed one is left");
               all_gather_text_sync(comm, "all have looked");
               require(error_of([&] { writer.finish(); }) == "no error", "it was over");
               require(error(3, {.keep = 1}) == "no error", "the next save");
             }});
    CHECK(errors[1] == errors[0]);
    CHECK(errors[2] == errors[0]);
    CHECK(names_in(directory).size() == 4);
    fs::remove_all(directory);
    return errors[0];
  };
  const auto options_with = [&](const SaveOptions& of_one) {
    return [=](int rank) { return rank == 1 ? of_one : SaveOptions{}; };
  };
  CHECK(missing(errors_of(options_with({.keep = 0}), false), {"rank 1", "keep is 0"}) == "");
  CHECK(missing(errors_of(options_with({.extras = {{"a", nullptr, 4}}}), false),
                {"rank 1", "\"a\"", "null"}) == "");
  CHECK(missing(errors_of(options_with({.metadata = {{"p", "1"}}}), false),
                {"metadata", "rank 0", "rank 1"}) == "");
  CHECK(missing(errors_of(options_with({}), true), {"\"bias\"", "1 gradient"}) == "");
}

TEST_CASE("a directory that cannot be made is told at the first start, and the next tries again") {
  const Folder folder;
  std::ofstream(folder.file("file")) << "x";
  std::vector<std::string> errors(3);
  run_leg({.config = saved_config(),
           .ranks = 3,
           .end = 1,
           .after = [&](Engine& engine, Communicator& comm) {
             const int rank = comm.rank();
             CheckpointWriter writer(engine, comm, folder.file("file/run"));
             errors[static_cast<std::size_t>(rank)] = error_of([&] { writer.start(); });
             require(!writer.finish().has_value(), "nothing was started");
             all_gather_text_sync(comm, "all have failed");
             const std::string litter = folder.file("file/run/octet-00000009.json.tmp");
             if (rank == 0) {
               fs::remove(folder.file("file"));
               fs::create_directories(folder.file("file/run"));
               std::ofstream(litter) << "x";
             }
             all_gather_text_sync(comm, "the way is free");
             writer.start();
             require(!fs::exists(litter), "the next try sweeps, as the first would have");
             require(writer.finish().has_value(), "the next try");
           }});
  for (const std::string& error : errors) {
    CHECK(missing(error, {"rank 0", folder.file("file")}) == "");
  }
  CHECK(names_in(folder.file("file/run")).size() == 4);
}

TEST_CASE("after a commit that failed the next start sweeps what is left") {
  const Folder folder;
  const std::string directory = folder.file("run");
  const std::string stubborn = directory + "/octet-00000002.json";
  Trained run;
  CheckpointWriter writer(run.engine, *run.comm, directory);
  writer.start();
  fs::create_directories(stubborn + "/full");  // where the index is to go
  CHECK(missing(error_of([&] { writer.finish(); }), {stubborn}) == "");
  fs::remove_all(stubborn);
  CHECK(!names_in(directory).empty());
  run.go_on(3);
  writer.start();
  while (writer.is_writing()) std::this_thread::yield();
  CHECK(names_in(directory).size() == 1);
  CHECK(writer.finish()->step == 3);
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
  const LegResult whole = run_leg({.config = saved_config(),
                                   .ranks = 3,
                                   .end = 2,
                                   .after = [&](Engine& engine, Communicator& comm) {
                                     save_checkpoint(engine, comm, directory);
                                   }});
  before = names_in(directory);
  with_small_files([&] {
    run_leg({.config = saved_config(),
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
  const LegResult loaded = run_leg({.config = saved_config(),
                                    .ranks = 3,
                                    .begin = 2,
                                    .end = 2,
                                    .before = [&](Engine& engine, Communicator& comm) {
                                      load_checkpoint(engine, comm, directory);
                                    }});
  CHECK(loaded.after == whole.after);
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
    run_leg({.config = saved_config(),
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
