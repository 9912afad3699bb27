# SPDX-License-Identifier: Apache-2.0
# octet_header_check: compiles every public header alone, with nothing but include/ to look in, so
# that each can be included first and none needs the CUDA toolkit, NCCL or a private header.
file(GLOB_RECURSE octet_headers RELATIVE ${PROJECT_SOURCE_DIR}/include CONFIGURE_DEPENDS
  ${PROJECT_SOURCE_DIR}/include/octet/*.hpp)
set(octet_header_units "")
foreach(header IN LISTS octet_headers)
  string(REPLACE "/" "_" unit ${header})
  set(unit ${PROJECT_BINARY_DIR}/generated/header_check/${unit}.cpp)
  file(CONFIGURE OUTPUT ${unit} CONTENT "#include \"${header}\"\n" @ONLY)
  list(APPEND octet_header_units ${unit})
endforeach()
add_library(octet_header_check OBJECT ${octet_header_units})
octet_compile_options(octet_header_check)
target_include_directories(octet_header_check PRIVATE ${PROJECT_SOURCE_DIR}/include)
