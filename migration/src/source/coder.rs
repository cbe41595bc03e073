//! Whether compressing a disk's blocks pays, and doing it.

use crate::codec::ZSTD_LEVEL;
use crate::options::{Compress, Options};
use crate::wire::Features;
use std::time::Duration;
use zstd::bulk::Compressor;

/// Compresses blocks, where that pays.
///
/// `--compress auto` compares what a byte costs on the link (as measured, or by the user's cap)
/// with what coding it costs and leaves of it: the slow link between two sites is where it pays.
#[derive(Default)]
pub(super) struct Coder {
    always: bool,
    zstd: Option<Compressor<'static>>,
    coded: Vec<u8>,
    /// Seconds per byte: by the cap, on the link, in the coder; and what is left of a byte.
    floor: f64,
    link: f64,
    coding: f64,
    ratio: f64,
    /// Frames since the last that was coded.
    uncoded: u32,
}

impl Coder {
    /// One in so many frames is coded to see whether it pays.
    const SAMPLE: u32 = 32;
    /// The newest measurement's part in the average.
    const NEWEST: f64 = 0.2;
    /// What must be saved of a frame for the destination to decode it.
    const WORTH: f64 = 0.9;

    pub(super) fn new(options: &Options, agreed: Features) -> Self {
        let wanted = match options.compress {
            Compress::Zstd | Compress::Adaptive => Some(true),
            Compress::Auto => Some(false),
            Compress::None | Compress::Delta => None,
        };
        let zstd = wanted
            .filter(|_| agreed.has(Features::ZSTD))
            // Without memory for a compressor the blocks go as they are.
            .and_then(|_| Compressor::new(ZSTD_LEVEL).ok());
        Self {
            always: wanted == Some(true),
            zstd,
            floor: options.bandwidth.map_or(0.0, |cap| 1.0 / cap as f64),
            ratio: 1.0,
            // The first frame is a sample.
            uncoded: Self::SAMPLE,
            ..Self::default()
        }
    }

    fn pays(&self) -> bool {
        let link = self.link.max(self.floor);
        self.coding + self.ratio * link < link
    }

    /// The coded bytes, where they are to be sent instead.
    pub(super) fn code(&mut self, bytes: &[u8], now: &dyn Fn() -> Duration) -> Option<&[u8]> {
        let sample = self.uncoded >= Self::SAMPLE;
        let wanted = self.always || sample || self.pays();
        let zstd = self.zstd.as_mut().filter(|_| wanted)?;
        let began = now();
        self.coded.resize(bytes.len(), 0);
        // Longer than it was is an error here, and no reason to send it.
        let length = zstd
            .compress_to_buffer(bytes, &mut self.coded[..])
            .unwrap_or(bytes.len());
        let of = |new: f64, old: f64| old + Self::NEWEST * (new - old);
        let len = bytes.len().max(1) as f64;
        let took = now().saturating_sub(began).as_secs_f64() / len;
        self.coding = of(took, self.coding);
        self.ratio = of(length as f64 / len, self.ratio);
        if sample {
            self.uncoded = 0;
        }
        let worth = (length as f64) < len * Self::WORTH;
        worth.then(|| self.coded.get(..length)).flatten()
    }

    pub(super) fn sent(&mut self, bytes: usize, took: Duration) {
        self.uncoded = self.uncoded.saturating_add(1);
        let cost = took.as_secs_f64() / bytes.max(1) as f64;
        self.link += Self::NEWEST * (cost - self.link);
    }
}
