// The one main() of the tests: every tests/test_*.cpp is linked with it into one binary.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
