//! A reader of random numbers that looks for what must not be: numbers that it has had before, as
//! from a buffer of the device that was given to the guest twice.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::time::Duration;

/// Bytes at a time: by chance two of them are never alike.
const BLOCK: usize = 16;
/// Blocks between two lines of output.
const LINE_EVERY: u64 = 64;
/// Blocks that are remembered: after that many they are forgotten, or memory would fill.
const REMEMBERED: usize = 1 << 16;
/// Between two readings: the device is to be busy, not the processor.
const PAUSE: Duration = Duration::from_millis(10);

/// `init rng PATH`: reads and compares for ever; ends only when the device fails or repeats itself.
pub fn run(path: &str) -> Result<(), String> {
    let mut file = File::open(path).map_err(|e| format!("{path} cannot be opened ({e})"))?;
    let mut seen = HashSet::new();
    for read in 1u64.. {
        let mut block = [0; BLOCK];
        file.read_exact(&mut block)
            .map_err(|e| format!("{path} cannot be read ({e})"))?;
        if !seen.insert(block) {
            return Err(format!("CORRUPT: {path} gave {block:02x?} twice"));
        }
        if seen.len() >= REMEMBERED {
            seen.clear();
        }
        if read % LINE_EVERY == 0 {
            println!("ferry-rng: blocks={read} repeated=0");
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_repeated_block_is_found() {
        let path = std::env::temp_dir().join(format!("ferry-rng-{}", std::process::id()));
        std::fs::write(&path, [[1u8; 16], [2; 16], [1; 16]].concat()).unwrap();
        let sentence = super::run(path.to_str().unwrap()).unwrap_err();
        assert!(sentence.contains("twice"), "{sentence}");
        std::fs::write(&path, [[1u8; 16], [2; 16]].concat()).unwrap();
        let sentence = super::run(path.to_str().unwrap()).unwrap_err();
        assert!(sentence.contains("cannot be read"), "{sentence}");
        std::fs::remove_file(&path).unwrap();
    }
}
