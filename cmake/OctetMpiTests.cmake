# SPDX-License-Identifier: Apache-2.0
# octet_mpi_properties(test): what a test that runs mpiexec needs around it. More ranks than cores,
# and in containers as root, which Open MPI (its versions 4 and 5) must be told; other
# implementations do not read these variables. Leaks are MPI's own.
function(octet_mpi_properties test)
  set_tests_properties(${test} PROPERTIES TIMEOUT 240 PROCESSORS 2 ENVIRONMENT
    "OMP_NUM_THREADS=1;OMP_WAIT_POLICY=passive;ASAN_OPTIONS=detect_leaks=0;OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMPI_MCA_rmaps_base_oversubscribe=1;PRTE_ALLOW_RUN_AS_ROOT=1;PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1;PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe")
endfunction()
