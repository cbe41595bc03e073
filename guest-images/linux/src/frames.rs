//! The protocol between a nested host's agent and its starter: one connection for each
//! command.
//!
//! ```text
//!   agent                                   starter
//!     │ ── connects; Hello(token) ─────────▶ │      the agent always keeps one idle connection
//!     │ ◀──────────── Run(argument\0…) ───── │      and makes the next one when this is used
//!     │ ◀── Input(bytes)*  InputEnd ──────── │
//!     │ ── Output(bytes)*  Errors(bytes)* ─▶ │
//!     │ ── Exit(code) or Failed(sentence) ─▶ │
//! ```
//!
//! A starter that closes the connection kills the command. A frame is a byte for its kind, the
//! length of its payload as four little-endian bytes, and the payload.

use std::io::{self, Read, Write};

/// The longest payload that is believed, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The first of a connection: the token.
    Hello,
    /// The command: its arguments, each ended by a NUL.
    Run,
    /// Bytes for its standard input.
    Input,
    /// Its standard input ends.
    InputEnd,
    /// Bytes from its standard output.
    Output,
    /// Bytes from its standard error.
    Errors,
    /// It has ended: its exit status as four bytes, 128 and the signal's number where one ended it.
    Exit,
    /// It could not be started: a sentence.
    Failed,
}

const KINDS: [Kind; 8] = [
    Kind::Hello,
    Kind::Run,
    Kind::Input,
    Kind::InputEnd,
    Kind::Output,
    Kind::Errors,
    Kind::Exit,
    Kind::Failed,
];

/// Writes one frame.
///
/// # Errors
/// The connection's; a payload of more than [`MAX_PAYLOAD`] bytes.
pub fn write(mut to: impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= MAX_PAYLOAD);
    let length = length.ok_or_else(|| io::Error::other("a frame of more than 1 MiB"))?;
    let number = KINDS
        .iter()
        .position(|k| *k == kind)
        .and_then(|n| u8::try_from(n).ok());
    let mut frame = vec![number.unwrap_or(u8::MAX)];
    frame.extend(length.to_le_bytes());
    frame.extend(payload);
    to.write_all(&frame)
}

/// Reads one frame; `None` where the connection ends between two.
///
/// # Errors
/// The connection's; bytes that are no frame.
pub fn read(mut from: impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut kind = [0];
    if from.read(&mut kind)? == 0 {
        return Ok(None);
    }
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let kind = *KINDS
        .get(usize::from(kind[0]))
        .ok_or_else(|| invalid("a frame of an unknown kind"))?;
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > MAX_PAYLOAD {
        return Err(invalid("a frame of more than 1 MiB"));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok(Some((kind, payload)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_were_written() {
        let mut bytes = Vec::new();
        for (n, kind) in KINDS.into_iter().enumerate() {
            write(&mut bytes, kind, &vec![7; n * 1000]).unwrap();
        }
        let mut rest = bytes.as_slice();
        for (n, kind) in KINDS.into_iter().enumerate() {
            assert_eq!(read(&mut rest).unwrap(), Some((kind, vec![7; n * 1000])));
        }
        assert_eq!(read(&mut rest).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_a_frame_is_refused() {
        assert!(read([99, 0, 0, 0, 0].as_slice()).is_err());
        assert!(read([0, 255, 255, 255, 255].as_slice()).is_err());
        assert!(read([0, 5, 0, 0, 0, 1].as_slice()).is_err());
        assert!(write(io::sink(), Kind::Input, &vec![0; MAX_PAYLOAD + 1]).is_err());
    }
}
