//! Writing a trace, frame by frame.

use super::{HEAD, Header, Kind, MAGIC, VERSION, code};
use crate::page::PageSet;
use std::io::{self, Write};
use std::time::Duration;

/// Writes a trace as it is recorded. What was written is whole after each call.
#[derive(Debug)]
pub struct Writer<W: Write> {
    to: W,
    payload: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins a trace.
    ///
    /// # Errors
    /// What `to` says; or [`io::ErrorKind::InvalidInput`] for a header that cannot be written.
    pub fn new(mut to: W, header: &Header) -> io::Result<Self> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let json = serde_json::to_vec(header).map_err(|e| invalid(e.to_string()))?;
        let length = u32::try_from(json.len())
            .ok()
            .filter(|&length| length <= super::MAX_HEADER)
            .ok_or_else(|| invalid("the header of a trace is too long".to_owned()))?;
        if header.layout.end() > super::MAX_GFN {
            return Err(invalid(
                "a guest of more than 1 TiB cannot be traced".to_owned(),
            ));
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&json);
        let sum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        to.write_all(&bytes)?;
        Ok(Self {
            to,
            payload: Vec::new(),
        })
    }

    /// The pages that were dirtied since the frame before; `at` is the time since the recording
    /// began.
    ///
    /// # Errors
    /// What the output says.
    pub fn frame(&mut self, at: Duration, pages: &PageSet) -> io::Result<()> {
        let kind = code::encode(pages, &mut self.payload);
        self.write(kind, at)
    }

    /// Ends the trace: it is whole.
    ///
    /// # Errors
    /// What the output says.
    pub fn finish(mut self, at: Duration) -> io::Result<W> {
        self.payload.clear();
        self.write(Kind::End, at)?;
        self.to.flush()?;
        Ok(self.to)
    }

    /// Where it is written to.
    pub const fn get_mut(&mut self) -> &mut W {
        &mut self.to
    }

    fn write(&mut self, kind: Kind, at: Duration) -> io::Result<()> {
        let time = u64::try_from(at.as_micros()).unwrap_or(u64::MAX);
        // At most the bitmap of a guest of 1 TiB.
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        let mut head = [0; HEAD];
        head[0] = kind as u8;
        head[4..12].copy_from_slice(&time.to_le_bytes());
        head[12..16].copy_from_slice(&length.to_le_bytes());
        head[16..20].copy_from_slice(&crc32c::crc32c(&self.payload).to_le_bytes());
        let sum = crc32c::crc32c(&head[..20]);
        head[20..].copy_from_slice(&sum.to_le_bytes());
        self.to.write_all(&head)?;
        self.to.write_all(&self.payload)
    }
}
