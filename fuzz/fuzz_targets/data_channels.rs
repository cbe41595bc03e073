//! See `ferry_tests::fuzz_bodies::data channels`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = ferry_tests::fuzz_bodies::data_channels(bytes, std::time::Duration::from_millis(5));
});
