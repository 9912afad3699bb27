// SPDX-License-Identifier: Apache-2.0
// What launch_from_environment makes of the variables of every launcher.
#include <map>
#include <string>

#include "octet/comm/bootstrap.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

using Variables = std::map<std::string, std::string>;

Launch launch(const Variables& variables, const LaunchArguments& arguments = {}) {
  return launch_from_environment(arguments, [&](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

std::string error(const Variables& variables, const LaunchArguments& arguments = {}) {
  return error_of([&] { launch(variables, arguments); });
}

std::string text_of(const Launch& l) {
  return l.launcher + " " + std::to_string(l.rank) + "/" + std::to_string(l.size) + " local " +
         std::to_string(l.local_rank) + "/" + std::to_string(l.local_size) + " at " + l.host + ":" +
         std::to_string(l.port) + " job " + l.job;
}

Variables with(Variables variables, const Variables& more) {
  for (const auto& [name, value] : more) variables[name] = value;
  return variables;
}

const Variables kTorchrun = {{"RANK", "5"},
                             {"WORLD_SIZE", "8"},
                             {"LOCAL_RANK", "1"},
                             {"LOCAL_WORLD_SIZE", "4"},
                             {"MASTER_ADDR", "node7"},
                             {"MASTER_PORT", "29400"},
                             {"TORCHELASTIC_RUN_ID", "run"},
                             {"TORCHELASTIC_RESTART_COUNT", "2"},
                             {"TORCHELASTIC_USE_AGENT_STORE", "False"}};
const Variables kOpenMpi = {{"OMPI_COMM_WORLD_RANK", "2"},
                            {"OMPI_COMM_WORLD_SIZE", "3"},
                            {"OMPI_COMM_WORLD_LOCAL_RANK", "2"},
                            {"OMPI_COMM_WORLD_LOCAL_SIZE", "3"},
                            {"PMIX_NAMESPACE", "841285633"}};
const Variables kSlurm = {{"SLURM_PROCID", "3"},  {"SLURM_NTASKS", "4"},
                          {"SLURM_LOCALID", "1"}, {"SLURM_JOB_ID", "1234"},
                          {"SLURM_STEP_ID", "0"}, {"SLURM_NODELIST", "gpu[007-009,12],other1"}};

}  // namespace

TEST_CASE("every launcher's variables are read") {
  CHECK(text_of(launch({})) == "none 0/1 local 0/1 at 127.0.0.1:0 job ");
  CHECK(text_of(launch(kTorchrun)) == "torchrun 5/8 local 1/4 at node7:29400 job run.2");
  CHECK(text_of(launch(kOpenMpi)) == "openmpi 2/3 local 2/3 at 127.0.0.1:0 job 841285633");
  CHECK(text_of(launch({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "0"}})) ==
        "pmi 1/2 local 0/1 at :0 job ");
  const Launch slurm = launch(kSlurm);
  CHECK(slurm.port >= 20000);
  CHECK(slurm.port < 30000);
  CHECK(text_of(slurm) ==
        "slurm 3/4 local 1/2 at gpu007:" + std::to_string(slurm.port) + " job 1234.0");
  CHECK(launch(with(kSlurm, {{"SLURM_STEP_ID", "1"}})).port != slurm.port);
}

TEST_CASE("the machine's own environment is read when no other is given") {
  const Launch own = launch_from_environment({.rank = 1, .size = 3, .host = "h", .job = "j"});
  CHECK(own.rank == 1);
  CHECK(own.size == 3);
  CHECK(own.host == "h");
  CHECK(own.job == "j");
}

TEST_CASE("arguments stand above the environment") {
  const Launch given = launch(kTorchrun, {.rank = 0,
                                          .size = 2,
                                          .local_rank = 0,
                                          .local_size = 2,
                                          .port = 5,
                                          .host = "here",
                                          .job = "mine"});
  CHECK(text_of(given) == "torchrun 0/2 local 0/2 at here:5 job mine");
  CHECK(text_of(launch({}, {.rank = 1, .size = 2})) == "none 1/2 local 0/1 at :0 job ");
  CHECK(missing(error({}, {.rank = 2, .size = 2}), {"rank (argument)=2", "size (argument)=2"}) ==
        "");
  CHECK(missing(error({}, {.rank = -1, .size = 2}), {"rank (argument)=-1"}) == "");
  CHECK(missing(error({}, {.port = 70000}), {"port (argument)=70000", "65535"}) == "");
}

TEST_CASE("the innermost launcher counts") {
  // torchrun under mpiexec or srun; mpiexec inside an allocation of Slurm's.
  CHECK(launch(with(with(kOpenMpi, kSlurm), kTorchrun)).launcher == "torchrun");
  CHECK(launch(with(kOpenMpi, kSlurm)).launcher == "openmpi");
  // A batch script sees the allocation's variables, but is one process.
  Variables batch = kSlurm;
  batch.erase("SLURM_STEP_ID");
  CHECK(launch(batch).size == 1);
  // A step has fewer tasks than its allocation.
  CHECK(launch(with(kSlurm, {{"SLURM_NTASKS", "64"}, {"SLURM_STEP_NUM_TASKS", "4"}})).size == 4);
  CHECK(launch(with(kOpenMpi, {{"RANK", ""}, {"WORLD_SIZE", ""}})).launcher == "openmpi");
}

TEST_CASE("address and port") {
  const Variables master = {{"MASTER_ADDR", "there"}, {"MASTER_PORT", "1"}};
  CHECK(text_of(launch(with(kOpenMpi, master))) ==
        "openmpi 2/3 local 2/3 at there:1 job 841285633");
  CHECK(launch(with(kSlurm, master)).port == 1);
  // torchrun's own store listens on MASTER_PORT.
  CHECK(launch(with(kTorchrun, {{"TORCHELASTIC_USE_AGENT_STORE", "True"}})).port == 29401);
  CHECK(
      launch(with(kTorchrun, {{"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"MASTER_PORT", "65535"}}))
          .port == 65534);
  const auto host = [](const char* list) {
    return launch(with(kSlurm, {{"SLURM_STEP_NODELIST", list}})).host;
  };
  CHECK(host("single") == "single");
  CHECK(host("a,b") == "a");
  CHECK(host("n[1]") == "n1");
  CHECK(host("n[08,10-12]x[2-3].site,m") == "n08x2.site");
  for (const char* list : {"n[1-2", "n[]", "n[-1]"}) {
    CHECK(missing(error(with(kSlurm, {{"SLURM_STEP_NODELIST", list}})), {"NODELIST", list}) == "");
  }
  CHECK(launch(with(kSlurm, {{"SLURM_STEP_NUM_NODES", "1"}})).local_size == 4);
}

TEST_CASE("malformed and contradictory values name variable and value") {
  for (const char* value : {"x", "-1", "3x", " 3", "1.5", "99999999999"}) {
    CHECK(missing(error(with(kTorchrun, {{"RANK", value}})), {std::string("RANK=") + value}) == "");
    CHECK(missing(error(with(kOpenMpi, {{"OMPI_COMM_WORLD_SIZE", value}})),
                  {std::string("OMPI_COMM_WORLD_SIZE=") + value}) == "");
  }
  CHECK(missing(error({{"RANK", "1"}}), {"RANK=1", "WORLD_SIZE is not set"}) == "");
  CHECK(missing(error({{"PMI_SIZE", "4"}}), {"PMI_SIZE=4", "PMI_RANK is not set"}) == "");
  CHECK(missing(error(with(kTorchrun, {{"RANK", "8"}})), {"RANK=8", "WORLD_SIZE=8"}) == "");
  CHECK(missing(error(with(kTorchrun, {{"WORLD_SIZE", "0"}})), {"WORLD_SIZE=0"}) == "");
  CHECK(missing(error(with(kTorchrun, {{"LOCAL_RANK", "4"}})),
                {"LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4"}) == "");
  CHECK(missing(error(with(kTorchrun, {{"LOCAL_WORLD_SIZE", "9"}})),
                {"LOCAL_WORLD_SIZE=9", "WORLD_SIZE=8"}) == "");
  for (const char* port : {"0", "65536", "http"}) {
    CHECK(missing(error(with(kTorchrun, {{"MASTER_PORT", port}})),
                  {std::string("MASTER_PORT=") + port}) == "");
  }
}

TEST_CASE("RANK and WORLD_SIZE that a shell has left behind do not split a job") {
  const Variables stale = {{"RANK", "0"}, {"WORLD_SIZE", "1"}};
  CHECK(missing(error(with(kOpenMpi, stale)), {"RANK=0", "OMPI_COMM_WORLD_RANK=2"}) == "");
  CHECK(missing(error(with(kSlurm, stale)), {"RANK=0", "SLURM_PROCID=3"}) == "");
  const Variables same = {{"RANK", "2"}, {"WORLD_SIZE", "3"}, {"LOCAL_RANK", "2"}};
  CHECK(launch(with(kOpenMpi, same)).rank == 2);
}

}  // namespace octet::test
