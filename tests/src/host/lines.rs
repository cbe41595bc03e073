//! What a process prints.

use std::io::{BufRead, BufReader, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// The lines of an output so far, and whether that is all.
#[derive(Clone, Debug, Default)]
pub(super) struct Lines {
    lines: Arc<Mutex<Vec<String>>>,
    ended: Arc<AtomicBool>,
}

impl Lines {
    pub(super) fn follow(output: impl Read + Send + 'static) -> Self {
        let lines = Self::default();
        let kept = lines.clone();
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut bytes = Vec::new();
            while output.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
                let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                kept.lines.lock().unwrap().push(line);
                bytes.clear();
            }
            kept.ended.store(true, Ordering::SeqCst);
        });
        lines
    }

    pub(super) fn all(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    pub(super) fn ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}
