//! See `ferry_tests::fuzz_bodies::snapshot`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_tests::fuzz_bodies::snapshot(bytes));
