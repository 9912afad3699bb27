# SPDX-License-Identifier: Apache-2.0
# The tests that mpiexec starts. More ranks than cores, and in containers as root, which Open MPI
# (its versions 4 and 5) must be told; other implementations do not read these variables. Leaks are
# MPI's own.
set(OCTET_MPI_ENVIRONMENT OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive ASAN_OPTIONS=detect_leaks=0
  OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
  PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
  PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe)

add_executable(comm_mpi_test comm/mpi_test.cpp)
octet_configure_program(comm_mpi_test)
target_include_directories(comm_mpi_test PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
target_link_libraries(comm_mpi_test PRIVATE Catch2::Catch2 MPI::MPI_CXX Threads::Threads)
foreach(ranks 1 2 3 5)
  add_test(NAME comm/mpi_test_${ranks}
    COMMAND ${MPIEXEC_EXECUTABLE} ${MPIEXEC_NUMPROC_FLAG} ${ranks} $<TARGET_FILE:comm_mpi_test>)
  set_tests_properties(comm/mpi_test_${ranks} PROPERTIES
    TIMEOUT 120 PROCESSORS 2 ENVIRONMENT "${OCTET_MPI_ENVIRONMENT}")
endforeach()

add_executable(comm_mpi_failure_ranks comm/mpi_failure_ranks.cpp)
octet_configure_program(comm_mpi_failure_ranks)
octet_test(comm/mpi_failure_test)
target_compile_definitions(comm_mpi_failure_test PRIVATE MPIEXEC="${MPIEXEC_EXECUTABLE}"
  RANKS_PROGRAM="$<TARGET_FILE:comm_mpi_failure_ranks>")
add_dependencies(comm_mpi_failure_test comm_mpi_failure_ranks)
set_tests_properties(comm/mpi_failure_test PROPERTIES
  TIMEOUT 240 PROCESSORS 2 ENVIRONMENT "${OCTET_MPI_ENVIRONMENT}")
