//! See `ferry_tests::fuzz_bodies::machine_state`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_tests::fuzz_bodies::machine_state(bytes));
