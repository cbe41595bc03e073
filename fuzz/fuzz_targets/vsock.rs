//! See `ferry_tests::fuzz_bodies::vsock`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop(ferry_tests::fuzz_bodies::vsock(bytes)));
