//! See `ferry_tests::fuzz_bodies::console`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_tests::fuzz_bodies::console(bytes));
