# SPDX-License-Identifier: Apache-2.0
# cmake -DMODE=installed|subdirectory -DSOURCE=.. -DBUILD=.. -DWORK=.. -DGENERATOR=.. -DCOMPILER=..
#       -DHAS_CUDA=.. -DHAS_NCCL=.. -DHAS_MPI=.. -P check.cmake
# Builds and runs the consumer project, against what BUILD installs or with SOURCE as a part of it.
cmake_minimum_required(VERSION 3.25)

function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

# Asking for a component that the package does not have must fail and say so.
function(expect_refusal components message)
  execute_process(COMMAND ${configure} -B ${WORK}/refused "-DOCTET_COMPONENTS=${components}"
    RESULT_VARIABLE status OUTPUT_QUIET ERROR_VARIABLE output)
  string(REGEX REPLACE "[ \n]+" " " output "${output}")
  if(status EQUAL 0 OR NOT output MATCHES "${message}")
    message(FATAL_ERROR "components ${components}: expected \"${message}\", got: ${output}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK})
set(configure ${CMAKE_COMMAND} -S ${SOURCE}/tests/consumer -G ${GENERATOR}
  -DCMAKE_CXX_COMPILER=${COMPILER})
if(MODE STREQUAL installed)
  run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
  list(APPEND configure -DCMAKE_PREFIX_PATH=${WORK}/prefix)
  expect_refusal(UCX "has no component UCX")
  set(components "")
  foreach(part CUDA NCCL MPI)
    if(HAS_${part})
      list(APPEND components ${part})
    else()
      expect_refusal(${part} "was built without ${part}")
    endif()
  endforeach()
  run(${configure} -B ${WORK}/build "-DOCTET_COMPONENTS=${components}")
else()
  # Unoptimised and without CUDA: what is tested is the use of the project, not the code.
  run(${configure} -B ${WORK}/build -DOCTET_SOURCE=${SOURCE} -DOCTET_CUDA=OFF
    -DCMAKE_BUILD_TYPE=Debug)
endif()
run(${CMAKE_COMMAND} --build ${WORK}/build --parallel)
run(${WORK}/build/consumer)
