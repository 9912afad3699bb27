// SPDX-License-Identifier: Apache-2.0
// What launchers leave in the environment.
#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "octet/comm/bootstrap.hpp"
#include "octet/core/error.hpp"

namespace octet {
namespace {

/// Slurm's default port is one of 10000 from here: below the ports that systems hand out.
constexpr int kSlurmFirstPort = 20000;
constexpr std::uint32_t kSlurmPorts = 10000;

/// A launcher's variables; null where it has none.
struct Names {
  const char* launcher;
  const char* rank;
  const char* size;
  const char* local_rank;
  const char* local_size;
};
constexpr Names kTorchrun{"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"};
constexpr Names kOpenMpi{"openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                         "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"};
constexpr Names kPmi{"pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"};
constexpr Names kSlurm{"slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", nullptr};

class Variables {
 public:
  explicit Variables(const Environment& lookup) : lookup_(lookup) {}

  /// Empty counts as not set: `RANK= program` is how shells unset.
  std::optional<std::string> text(const char* name) const {
    const char* value = name == nullptr ? nullptr : lookup_ ? lookup_(name) : std::getenv(name);
    if (value == nullptr || *value == '\0') return std::nullopt;
    return value;
  }

  std::optional<int> number(const char* name) const {
    const auto value = text(name);
    if (!value) return std::nullopt;
    int result = 0;
    const char* const end = value->data() + value->size();
    const auto [stop, error] = std::from_chars(value->data(), end, result);
    require(error == std::errc{} && stop == end && result >= 0, name, "=", *value,
            ": must be a whole number from 0 to 2147483647");
    return result;
  }

  bool has(const char* name) const { return text(name).has_value(); }

 private:
  const Environment& lookup_;
};

/// Slurm's variables as they are here: a step's own count of tasks goes before the allocation's.
Names slurm_names(const Variables& env) {
  Names names = kSlurm;
  if (env.has("SLURM_STEP_NUM_TASKS")) names.size = "SLURM_STEP_NUM_TASKS";
  return names;
}

/// The launchers that have left something, the innermost first.
std::vector<Names> launchers_here(const Variables& env) {
  std::vector<Names> here;
  for (const Names& names : {kTorchrun, kOpenMpi, kPmi}) {
    if (env.has(names.rank) || env.has(names.size)) here.push_back(names);
  }
  // A batch script has SLURM_PROCID=0 and the tasks of the whole allocation, but runs once.
  if (env.has("SLURM_STEP_ID") && env.has("SLURM_PROCID")) here.push_back(slurm_names(env));
  return here;
}

void check_pair(const Variables& env, const Names& names) {
  const auto check = [&](const char* one, const char* other) {
    require(!env.has(one) || env.has(other), one, "=", env.text(one).value_or(""), ", but ", other,
            " is not set");
  };
  check(names.rank, names.size);
  check(names.size, names.rank);
}

/// RANK and WORLD_SIZE that a shell exported once would make every process of a job rank 0 of 1.
void check_hand_set(const Variables& env, const std::vector<Names>& here) {
  if (env.has("TORCHELASTIC_RUN_ID") || std::string("torchrun") != here.front().launcher) return;
  for (const Names& other : here) {
    for (const auto& [own, theirs] :
         {std::pair{here.front().rank, other.rank}, std::pair{here.front().size, other.size}}) {
      const auto a = env.number(own), b = env.number(theirs);
      require(!a || !b || *a == *b, own, "=", a.value_or(0), " contradicts ", theirs, "=",
              b.value_or(0), "; unset the one that does not belong to this job");
    }
  }
}

bool is_one_host(const Variables& env) {
  for (const char* name : {"SLURM_STEP_NUM_NODES", "SLURM_NNODES"}) {
    if (env.has(name)) return env.number(name) == 1;
  }
  return false;
}

/// The first host of a list as Slurm writes it: "node[03-05,9],other" is node03.
std::string first_host(const std::string& list) {
  std::string host;
  for (std::size_t i = 0; i < list.size() && list[i] != ','; ++i) {
    if (list[i] != '[') {
      host += list[i];
      continue;
    }
    const std::size_t close = list.find(']', i);
    const std::size_t end = std::min({list.find_first_of("-,", i), close, list.size()});
    require(close != std::string::npos && end > i + 1, "SLURM_NODELIST=", list,
            ": is not a list of hosts as Slurm writes it");
    host += list.substr(i + 1, end - i - 1);
    i = close;
  }
  return host;
}

std::string joined(const std::optional<std::string>& a, const std::optional<std::string>& b) {
  if (!a) return {};
  return b ? *a + "." + *b : *a;
}

std::string job_of(const Variables& env, const std::string& launcher) {
  if (launcher == "torchrun") {
    return joined(env.text("TORCHELASTIC_RUN_ID"), env.text("TORCHELASTIC_RESTART_COUNT"));
  }
  if (launcher == "openmpi") return env.text("PMIX_NAMESPACE").value_or("");
  if (launcher == "slurm") return joined(env.text("SLURM_JOB_ID"), env.text("SLURM_STEP_ID"));
  return {};
}

std::string host_of(const Variables& env, const Launch& launch) {
  if (const auto host = env.text("MASTER_ADDR")) return *host;
  if (launch.launcher == "slurm") {
    for (const char* name : {"SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"}) {
      if (const auto list = env.text(name)) return first_host(*list);
    }
  }
  return launch.local_size == launch.size ? "127.0.0.1" : "";
}

int port_of(const Variables& env, const Launch& launch) {
  if (const auto port = env.number("MASTER_PORT")) {
    require(*port >= 1 && *port <= 65535, "MASTER_PORT=", *port, ": allowed are 1 to 65535");
    if (env.text("TORCHELASTIC_USE_AGENT_STORE") != "True") return *port;
    return *port == 65535 ? *port - 1 : *port + 1;
  }
  const std::string job = job_of(env, launch.launcher);
  if (launch.launcher != "slurm" || job.empty()) return 0;
  std::uint32_t hash = 2166136261u;  // FNV-1a
  for (char c : job) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619u;
  return kSlurmFirstPort + static_cast<int>(hash % kSlurmPorts);
}

/// A number with where it came from, for messages.
struct Sourced {
  int value;
  std::string text;
};

Sourced sourced(const Variables& env, const char* name, std::optional<int> argument,
                const char* argument_name, int otherwise) {
  if (argument) {
    return {*argument, std::string(argument_name) + " (argument)=" + std::to_string(*argument)};
  }
  const int value = env.number(name).value_or(otherwise);
  return {value, std::string(name == nullptr ? argument_name : name) + "=" + std::to_string(value)};
}

}  // namespace

Launch launch_from_environment(const LaunchArguments& arguments, const Environment& environment) {
  const Variables env(environment);
  const std::vector<Names> here = launchers_here(env);
  Names names{"none", nullptr, nullptr, nullptr, nullptr};
  if (!here.empty()) {
    names = here.front();
    if (!arguments.rank && !arguments.size) {
      check_pair(env, names);
      check_hand_set(env, here);
    }
  }
  const Sourced rank = sourced(env, names.rank, arguments.rank, "rank", 0);
  const Sourced size = sourced(env, names.size, arguments.size, "size", 1);
  require(size.value >= 1, size.text, ": must be at least 1");
  require(rank.value >= 0 && rank.value < size.value, rank.text, ": must be below ", size.text);
  const Sourced local_rank = sourced(env, names.local_rank, arguments.local_rank, "local_rank", 0);
  const bool one_host = std::string("slurm") == names.launcher && is_one_host(env);
  const Sourced local_size = sourced(env, names.local_size, arguments.local_size, "local_size",
                                     one_host ? size.value : local_rank.value + 1);
  require(local_size.value >= 1 && local_size.value <= size.value, local_size.text,
          ": must be from 1 to ", size.text);
  require(local_rank.value >= 0 && local_rank.value < local_size.value, local_rank.text,
          ": must be below ", local_size.text);

  Launch launch{.rank = rank.value,
                .size = size.value,
                .local_rank = local_rank.value,
                .local_size = local_size.value,
                .host = {},
                .port = 0,
                .job = {},
                .launcher = names.launcher};
  launch.host = arguments.host ? *arguments.host : host_of(env, launch);
  launch.port = arguments.port ? *arguments.port : port_of(env, launch);
  require(!arguments.port || (launch.port >= 1 && launch.port <= 65535),
          "port (argument)=", launch.port, ": allowed are 1 to 65535");
  launch.job = arguments.job ? *arguments.job : job_of(env, launch.launcher);
  return launch;
}

}  // namespace octet
