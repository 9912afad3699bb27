# SPDX-License-Identifier: Apache-2.0
# Finds what the library is built with and says how its targets are compiled.
# Leaves behind OCTET_HAS_CUDA, OCTET_HAS_NCCL, OCTET_HAS_MPI, OCTET_HAS_OPENMP and the functions
#   octet_configure_library(target)   the library itself
#   octet_configure_program(target)   tests, benchmarks, examples and tools: links the library
#   octet_print_summary()

set(OCTET_MINIMUM_CUDA 12.8)  # the first that knows every architecture of the default list
set(OCTET_DEFAULT_CUDA_ARCHITECTURES 80 89 90a 100 120)

option(BUILD_SHARED_LIBS "Build a shared library instead of a static one" OFF)
set(OCTET_OPENMP AUTO CACHE STRING "OpenMP for the CPU implementation: AUTO, ON or OFF")
option(OCTET_WERROR "Treat compiler warnings as errors" ${PROJECT_IS_TOP_LEVEL})
set_property(CACHE OCTET_OPENMP PROPERTY STRINGS AUTO ON OFF)

foreach(name OCTET_CUDA OCTET_NCCL OCTET_MPI OCTET_OPENMP)
  if(NOT "${${name}}" MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "${name}=\"${${name}}\": must be AUTO, ON or OFF")
  endif()
endforeach()

if(PROJECT_IS_TOP_LEVEL)
  if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release, RelWithDebInfo or MinSizeRel" FORCE)
  endif()
  set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
endif()

# --- OpenMP and threads ---
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
set(OCTET_HAS_OPENMP OFF)
if(NOT OCTET_OPENMP STREQUAL OFF)
  find_package(OpenMP COMPONENTS CXX QUIET)
  if(OpenMP_CXX_FOUND)
    set(OCTET_HAS_OPENMP ON)
  elseif(OCTET_OPENMP STREQUAL ON)
    message(FATAL_ERROR "OCTET_OPENMP=ON, but the C++ compiler ${CMAKE_CXX_COMPILER} has no OpenMP")
  endif()
endif()

# --- JSON ---
# Headers alone, for files of weights; what uses the library never needs them.
find_package(nlohmann_json 3.9 REQUIRED)

# --- CUDA ---
# Sets `path` to nvcc and `problem` to the reason why it cannot be used, if there is one.
function(octet_find_nvcc path problem)
  set(${problem} "" PARENT_SCOPE)
  if(CMAKE_CUDA_COMPILER)
    find_program(OCTET_NVCC ${CMAKE_CUDA_COMPILER} NO_CACHE)
  elseif(DEFINED ENV{CUDACXX})
    find_program(OCTET_NVCC $ENV{CUDACXX} NO_CACHE)
  else()
    find_program(OCTET_NVCC nvcc NO_CACHE
      HINTS ${CUDAToolkit_ROOT} ENV CUDAToolkit_ROOT ENV CUDA_PATH ENV CUDA_HOME
      PATHS /usr/local/cuda PATH_SUFFIXES bin)
  endif()
  if(NOT OCTET_NVCC)
    set(${problem} "no nvcc found" PARENT_SCOPE)
    return()
  endif()
  set(${path} ${OCTET_NVCC} PARENT_SCOPE)
  execute_process(COMMAND ${OCTET_NVCC} --version OUTPUT_VARIABLE text ERROR_QUIET)
  if(NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${problem} "${OCTET_NVCC} does not tell its version" PARENT_SCOPE)
  elseif(CMAKE_MATCH_1 VERSION_LESS OCTET_MINIMUM_CUDA)
    set(${problem} "${OCTET_NVCC} is CUDA ${CMAKE_MATCH_1}, needed is ${OCTET_MINIMUM_CUDA} or newer"
      PARENT_SCOPE)
  endif()
endfunction()

set(OCTET_HAS_CUDA OFF)
set(OCTET_CUDA_REASON "switched off")
if(NOT OCTET_CUDA STREQUAL OFF)
  octet_find_nvcc(octet_nvcc OCTET_CUDA_REASON)
  if(OCTET_CUDA_REASON STREQUAL "")
    set(OCTET_HAS_CUDA ON)
  elseif(OCTET_CUDA STREQUAL ON)
    message(FATAL_ERROR "OCTET_CUDA=ON: ${OCTET_CUDA_REASON}. Install the CUDA toolkit, name its "
      "compiler with -DCMAKE_CUDA_COMPILER=..., or build with -DOCTET_CUDA=OFF.")
  endif()
endif()
if(OCTET_HAS_CUDA)
  set(CMAKE_CUDA_COMPILER ${octet_nvcc} CACHE FILEPATH "CUDA compiler")
  set(CMAKE_CUDA_ARCHITECTURES ${OCTET_DEFAULT_CUDA_ARCHITECTURES} CACHE STRING
    "CUDA architectures to compile for")
  # One CUDA runtime per process: the one that the library links, also in what links the library.
  set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
  enable_language(CUDA)
  if(CMAKE_VERSION VERSION_LESS 3.25.2)
    # These versions do not know that nvcc has C++20.
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  find_package(CUDAToolkit ${OCTET_MINIMUM_CUDA} REQUIRED)
endif()

# --- NCCL ---
set(OCTET_HAS_NCCL OFF)
set(OCTET_NCCL_REASON "switched off")
if(NOT OCTET_NCCL STREQUAL OFF)
  set(OCTET_NCCL_REASON "needs the CUDA backend, which is off (${OCTET_CUDA_REASON})")
  if(OCTET_HAS_CUDA)
    find_package(NCCL QUIET)
    set(OCTET_NCCL_REASON "nccl.h or libnccl not found")
    if(NCCL_FOUND)
      set(OCTET_HAS_NCCL ON)
    endif()
  endif()
  if(OCTET_NCCL STREQUAL ON AND NOT OCTET_HAS_NCCL)
    message(FATAL_ERROR "OCTET_NCCL=ON: ${OCTET_NCCL_REASON}. Set NCCL_ROOT to where it is "
      "installed, or build with -DOCTET_NCCL=OFF.")
  endif()
endif()

# --- MPI ---
set(OCTET_HAS_MPI OFF)
set(OCTET_MPI_REASON "switched off")
if(NOT OCTET_MPI STREQUAL OFF)
  set(MPI_CXX_SKIP_MPICXX ON)  # the C interface is all that is used
  find_package(MPI 3.0 COMPONENTS CXX QUIET)
  set(OCTET_MPI_REASON "not found, or older than MPI 3.0")
  if(MPI_CXX_FOUND)
    set(OCTET_HAS_MPI ON)
  elseif(OCTET_MPI STREQUAL ON)
    message(FATAL_ERROR "OCTET_MPI=ON: ${OCTET_MPI_REASON}. Install one (Debian: libopenmpi-dev), "
      "set MPI_HOME to where it is installed, or build with -DOCTET_MPI=OFF.")
  endif()
endif()

# --- how everything is compiled ---
# Private to each target: nothing of this reaches a project that uses the library.
function(octet_compile_options target)
  target_compile_features(${target} PRIVATE cxx_std_20)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF)
  # The numerics contract: no multiply-add that the source does not ask for.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off -Wall -Wextra -Wconversion -Wshadow>)
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # GCC 12 sees an overlap in std::string's operator+ that is not there (its bug 105651).
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
  endif()
  if(OCTET_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
  if(OCTET_HAS_CUDA)
    set_target_properties(${target} PROPERTIES
      CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF)
    target_compile_options(${target} PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;--expt-relaxed-constexpr;-Xcompiler=-ffp-contract=off,-Wall,-Wextra>")
    if(OCTET_WERROR)
      target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>")
    endif()
  endif()
endfunction()

function(octet_configure_library target)
  octet_compile_options(${target})
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_include_directories(${target}
    PUBLIC
      $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
      $<INSTALL_INTERFACE:include>
    PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/src)
  set_target_properties(${target} PROPERTIES
    POSITION_INDEPENDENT_CODE ON
    VERSION ${PROJECT_VERSION}
    SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
  target_link_libraries(${target} PRIVATE
    Threads::Threads $<BUILD_INTERFACE:nlohmann_json::nlohmann_json>)
  if(OCTET_HAS_OPENMP)
    target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  else()
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-unknown-pragmas>)
  endif()
  if(OCTET_HAS_CUDA)
    target_link_libraries(${target} PRIVATE CUDA::cudart CUDA::cublasLt)
  endif()
  if(OCTET_HAS_NCCL)
    target_link_libraries(${target} PRIVATE NCCL::NCCL)
  endif()
  if(OCTET_HAS_MPI)
    target_link_libraries(${target} PRIVATE MPI::MPI_CXX)
  endif()
endfunction()

function(octet_configure_program target)
  octet_compile_options(${target})
  target_link_libraries(${target} PRIVATE octet::octet)
  if(OCTET_HAS_OPENMP)
    target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  else()
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-unknown-pragmas>)
  endif()
endfunction()

function(octet_print_summary)
  set(cuda "no (${OCTET_CUDA_REASON})")
  if(OCTET_HAS_CUDA)
    set(cuda "${CUDAToolkit_VERSION}, for ${CMAKE_CUDA_ARCHITECTURES}")
  endif()
  set(nccl "no (${OCTET_NCCL_REASON})")
  if(OCTET_HAS_NCCL)
    set(nccl "${NCCL_VERSION}")
  endif()
  set(mpi "no (${OCTET_MPI_REASON})")
  if(OCTET_HAS_MPI)
    set(mpi "MPI ${MPI_CXX_VERSION}")
  endif()
  set(kind "static")
  if(BUILD_SHARED_LIBS)
    set(kind "shared")
  endif()
  message(STATUS "octet ${PROJECT_VERSION}, ${kind}, ${CMAKE_BUILD_TYPE}")
  message(STATUS "  compiler    ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
  message(STATUS "  CUDA        ${cuda}")
  message(STATUS "  NCCL        ${nccl}")
  message(STATUS "  MPI         ${mpi}")
  message(STATUS "  OpenMP      ${OCTET_HAS_OPENMP}")
  message(STATUS "  tests       ${OCTET_TESTS}")
  message(STATUS "  benchmarks  ${OCTET_BENCHMARKS}")
  message(STATUS "  examples    ${OCTET_EXAMPLES}")
  message(STATUS "  tools       ${OCTET_TOOLS}")
endfunction()
