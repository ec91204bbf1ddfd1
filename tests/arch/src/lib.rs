//! tests-arch
