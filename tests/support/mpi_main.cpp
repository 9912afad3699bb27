// SPDX-License-Identifier: Apache-2.0
// The main function of programs whose tests every rank of an MPI job runs.
#define CATCH_CONFIG_RUNNER
#include <mpi.h>

#include "support/catch.hpp"

int main(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  const int failures = Catch::Session().run(argc, argv);
  MPI_Finalize();
  return failures == 0 ? 0 : 1;
}
