//! See `ferry_tests::fuzz_bodies::pairing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = ferry_tests::fuzz_bodies::pairing(bytes);
});
