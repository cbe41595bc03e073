//! Writes the fuzz targets' seeds into a directory, in one for each target:
//! `cargo run -p ferry-tests --example fuzz_seeds DIRECTORY`. `fuzz/run` does it.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::PathBuf;

fn main() {
    let into: PathBuf = std::env::args_os()
        .nth(1)
        .expect("a directory to write into")
        .into();
    for (target, seeds) in ferry_tests::fuzz_seeds::TARGETS {
        let corpus = into.join(target);
        fs::create_dir_all(&corpus).unwrap();
        for (n, seed) in seeds().iter().enumerate() {
            fs::write(corpus.join(format!("seed-{n:03}")), seed).unwrap();
        }
        println!("{target}");
    }
}
