# SPDX-License-Identifier: Apache-2.0
# Install rules and the package that find_package(octet) finds.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(octet_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/octet)

install(TARGETS octet EXPORT octetTargets)
install(DIRECTORY include/octet DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.hpp")
install(EXPORT octetTargets NAMESPACE octet:: DESTINATION ${octet_package_dir})

configure_package_config_file(cmake/octetConfig.cmake.in ${PROJECT_BINARY_DIR}/octetConfig.cmake
  INSTALL_DESTINATION ${octet_package_dir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/octetConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/octetConfig.cmake
  ${PROJECT_BINARY_DIR}/octetConfigVersion.cmake
  DESTINATION ${octet_package_dir})
if(OCTET_HAS_NCCL)
  install(FILES cmake/FindNCCL.cmake DESTINATION ${octet_package_dir})
endif()
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
