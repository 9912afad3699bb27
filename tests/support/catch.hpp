// SPDX-License-Identifier: Apache-2.0
// Catch2 3.x or 2.13, whichever is installed. The main function comes from Catch2WithMain.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
