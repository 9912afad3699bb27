// SPDX-License-Identifier: Apache-2.0
// The files that the library writes, read by Python's safetensors where it is installed.
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "octet/checkpoint/weights.hpp"
#include "support/catch.hpp"
#include "support/checkpoint_run.hpp"
#include "support/folder.hpp"

namespace octet::test {
namespace {

bool has_python() {
  if (std::system("python3 -c 'import safetensors' 2>/dev/null") == 0) return true;
  WARN("python3 has no safetensors here: not tested");
  return false;
}

/// Names, dtypes, shapes, sums of bytes and metadata are what the library's reader has.
void check_by_python(const Folder& folder, const std::string& path) {
  const std::string script = folder.file("read.py"), out = folder.file("out");
  std::ofstream(script) << R"(
import sys
import safetensors
for name, tensor in safetensors.deserialize(open(sys.argv[1], "rb").read()):
    print(name, tensor["dtype"], list(tensor["shape"]), sum(tensor["data"]), sep="|")
try:
    import numpy
except ImportError:
    sys.exit()
with safetensors.safe_open(sys.argv[1], framework="np") as file:
    for key, value in file.metadata().items():
        print(key, value, sep="=")
)";
  const int status =
      std::system(("python3 '" + script + "' '" + path + "' >'" + out + "' 2>&1").c_str());
  const std::string lines = "\n" + read_file(out);
  INFO(path << lines);
  REQUIRE((WIFEXITED(status) && WEXITSTATUS(status) == 0));
  const SafetensorsReader file(path);
  REQUIRE(!file.tensors().empty());
  for (const FileTensor& tensor : file.tensors()) {
    std::string line = "\n" + tensor.name + "|" + tensor.dtype + "|[";
    for (std::int64_t dim : tensor.shape) {
      line += (line.back() == '[' ? "" : ", ") + std::to_string(dim);
    }
    Bytes bytes(tensor.bytes);
    file.read(tensor, 0, tensor.bytes, bytes.data());
    const auto sum = std::accumulate(bytes.begin(), bytes.end(), std::uint64_t{0});
    CHECK(lines.find(line + "]|" + std::to_string(sum) + "\n") != std::string::npos);
  }
  if (lines.find("=") == std::string::npos) return;  // without numpy
  for (const auto& [key, value] : file.metadata()) {
    CHECK(lines.find("\n" + key + "=" + value + "\n") != std::string::npos);
  }
}

}  // namespace

TEST_CASE("Python's safetensors reads exported weights") {
  if (!has_python()) return;
  for (const DType dtype : {DType::e4m3, DType::bf16}) {
    const Folder folder;
    const std::string path = folder.file("w.safetensors");
    EngineConfig config{.level = Level::O2, .formats = formats_of(Level::O2)};
    config.formats->state.weight = WeightFormat::e4m3_tile;
    run_leg({.config = config, .after = [&](Engine& engine, Communicator& comm) {
               std::vector<NamedWeight> weights;
               for (int p = 0; p < static_cast<int>(saved_params().size()); ++p) {
                 weights.push_back({engine.spec({p}).name, {p}});
               }
               export_weights_sync(comm.context(), engine, path, weights,
                                   {.dtype = dtype, .scales = ScaleNaming::weight_scale_inv});
             }});
    check_by_python(folder, path);
  }
}

TEST_CASE("Python's safetensors reads the files of a checkpoint's ranks") {
  if (!has_python()) return;
  for (const Formats& formats : {formats_of(Level::O2), small_formats()}) {
    const Folder folder;
    const std::string directory = folder.file("run");
    const EngineConfig config{
        .level = Level::O2, .sharding = Sharding::parameters, .formats = formats};
    run_leg({.config = config, .ranks = 3, .end = 1, .after = [&](Engine& engine, auto& comm) {
               std::uint32_t word = 7;
               save_checkpoint(engine, comm, directory, {.extras = {{"word", &word, 4}}});
             }});
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(directory)) {
      if (entry.path().extension() != ".safetensors") continue;
      check_by_python(folder, entry.path().string());
      ++files;
    }
    CHECK(files == 3);
  }
}

}  // namespace octet::test
