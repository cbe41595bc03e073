//! See `ferry_tests::fuzz_bodies::lanes`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = ferry_tests::fuzz_bodies::lanes(bytes, std::time::Duration::from_millis(5));
});
