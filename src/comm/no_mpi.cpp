// SPDX-License-Identifier: Apache-2.0
// Takes the place of mpi.cpp in a build without MPI.
#include "octet/comm/mpi.hpp"

namespace octet {
namespace {

[[noreturn]] void refuse(const char* what) {
  fail(what, ": this build of octet has no MPI; configure it with OCTET_MPI=ON");
}

}  // namespace

bool has_mpi() { return false; }
std::unique_ptr<Communicator> create_mpi(const Context&, const MpiOptions&) {
  refuse("create_mpi");
}

namespace detail {

std::unique_ptr<Communicator> adopt_mpi(const void*, std::size_t, const Context&,
                                        const MpiOptions&) {
  refuse("adopt_mpi");
}

}  // namespace detail
}  // namespace octet
