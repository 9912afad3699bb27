# SPDX-License-Identifier: Apache-2.0
# octet_build_info: an interface target with the header build_info.hpp, which says from what a
# program was built. The commit is looked up at every build, so it is never that of an earlier one.
if(CMAKE_SCRIPT_MODE_FILE)
  set(OCTET_COMMIT "$ENV{OCTET_COMMIT}")  # whoever copied the sources knows best
  if(GIT AND OCTET_COMMIT STREQUAL "")
    execute_process(COMMAND ${GIT} -C ${SOURCE_DIR} describe --always --dirty --abbrev=12 --exclude=*
      OUTPUT_VARIABLE OCTET_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(OCTET_COMMIT STREQUAL "")
    set(OCTET_COMMIT unknown)
  endif()
  configure_file(${TEMPLATE} ${HEADER} @ONLY)  # touches the header only when the text changes
  return()
endif()

include_guard(GLOBAL)
find_package(Git QUIET)
set(octet_cuda none)
if(OCTET_HAS_CUDA)
  set(octet_cuda ${CUDAToolkit_VERSION})
endif()
set(octet_header ${PROJECT_BINARY_DIR}/generated/build_info.hpp)
add_custom_target(octet_write_build_info
  COMMAND ${CMAKE_COMMAND} -DGIT=${GIT_EXECUTABLE} -DSOURCE_DIR=${PROJECT_SOURCE_DIR}
    "-DOCTET_COMPILER=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    -DOCTET_CUDA_VERSION=${octet_cuda}
    -DTEMPLATE=${CMAKE_CURRENT_LIST_DIR}/build_info.hpp.in -DHEADER=${octet_header}
    -P ${CMAKE_CURRENT_LIST_FILE}
  BYPRODUCTS ${octet_header} COMMENT "Looking up the commit" VERBATIM)
add_library(octet_build_info INTERFACE)
target_include_directories(octet_build_info INTERFACE ${PROJECT_BINARY_DIR}/generated)
add_dependencies(octet_build_info octet_write_build_info)
