//! Reading a trace.

use super::{HEAD, Header, Kind, MAGIC, MAX_GFN, MAX_HEADER, TraceError, VERSION, code};
use crate::page::PageSet;
use std::io::{self, Read};
use std::time::Duration;

/// A recorded trace.
#[derive(Clone, Debug)]
pub struct Trace {
    header: Header,
    frames: Vec<Frame>,
    whole: bool,
}

/// What was dirtied in an interval of the recording.
#[derive(Clone, Debug)]
pub struct Frame {
    from: Duration,
    to: Duration,
    kind: Kind,
    bytes: Vec<u8>,
    pages: u64,
}

impl Frame {
    /// When the interval began, since the recording's begin.
    #[must_use]
    pub const fn from(&self) -> Duration {
        self.from
    }

    /// When it ended.
    #[must_use]
    pub const fn to(&self) -> Duration {
        self.to
    }

    /// How many pages were dirtied in it.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }
}

/// Fills the buffer; `false` at a clean or ragged end of the file.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match from.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

fn number32(bytes: &[u8]) -> u32 {
    bytes
        .try_into()
        .map_or(0, |bytes: [u8; 4]| u32::from_le_bytes(bytes))
}

impl Trace {
    /// Reads a whole trace. Each frame is checked here, so that replaying cannot fail.
    ///
    /// # Errors
    /// [`TraceError`]. A trace that ends in the middle of a frame is none: see [`Trace::is_whole`].
    pub fn read(mut from: impl Read) -> Result<Self, TraceError> {
        let header = read_header(&mut from)?;
        let mut trace = Self {
            header,
            frames: Vec::new(),
            whole: false,
        };
        let mut offset = 0;
        let mut last = Duration::ZERO;
        let mut head = [0; HEAD];
        while fill(&mut from, &mut head)? {
            let frame = trace.frames.len();
            let wrong = |what| TraceError::Frame {
                frame,
                offset,
                what,
            };
            if crc32c::crc32c(&head[..20]) != number32(&head[20..]) {
                return Err(wrong("has a damaged head"));
            }
            let kind = match head[0] {
                1 => Kind::Runs,
                2 => Kind::Bitmap,
                3 => Kind::End,
                _ => return Err(wrong("is of an unknown kind")),
            };
            let (low, high) = (number32(&head[4..8]), number32(&head[8..12]));
            let to = Duration::from_micros(u64::from(high) << 32 | u64::from(low));
            let length = number32(&head[12..16]);
            if u64::from(length) > code::longest(&trace.header.layout) {
                return Err(wrong("is longer than a bitmap of the guest's memory"));
            }
            if to < last {
                return Err(wrong("is older than the one before"));
            }
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
            if !fill(&mut from, &mut bytes)? {
                return Ok(trace);
            }
            if crc32c::crc32c(&bytes) != number32(&head[16..20]) {
                return Err(wrong("has damaged contents"));
            }
            let pages = code::check(kind, &bytes, &trace.header.layout).map_err(wrong)?;
            if kind == Kind::End {
                trace.whole = true;
                return Ok(trace);
            }
            offset += HEAD as u64 + u64::from(length);
            trace.frames.push(Frame {
                from: last,
                to,
                kind,
                bytes,
                pages,
            });
            last = to;
        }
        Ok(trace)
    }

    /// What was recorded.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The frames in the order of time.
    #[must_use]
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Adds a frame's pages to a set over the header's layout.
    pub fn pages_of(&self, frame: &Frame, into: &mut PageSet) {
        // Every frame was decoded once when it was read.
        let _ = code::decode(frame.kind, &frame.bytes, &self.header.layout, into);
    }

    /// The pages that held nothing when the recording began, as far as can be told: so many of
    /// those that were not written meanwhile, the last ones first, as kernels hand memory out.
    #[must_use]
    pub fn empty_pages(&self) -> PageSet {
        let layout = &self.header.layout;
        let empty = self.header.empty_pages.unwrap_or(0);
        if empty == 0 {
            return PageSet::new(layout.end());
        }
        let mut untouched = layout.all();
        let mut written = PageSet::new(layout.end());
        for frame in &self.frames {
            self.pages_of(frame, &mut written);
        }
        untouched.subtract(&written);
        let mut surplus = untouched.len().saturating_sub(empty);
        let mut at = 0;
        while surplus > 0
            && let Some(run) = untouched.next_run(at, surplus)
        {
            untouched.remove_run(run);
            surplus -= run.count;
            at = run.end();
        }
        untouched
    }

    /// Whether the recording was ended rather than broken off.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.whole
    }

    /// Pages that were dirtied, one as often as intervals found it.
    #[must_use]
    pub fn dirtied_pages(&self) -> u64 {
        self.frames.iter().map(Frame::pages).sum()
    }

    /// Pages that were dirtied per second.
    #[must_use]
    pub fn dirty_rate(&self) -> f64 {
        self.dirtied_pages() as f64 / self.duration().as_secs_f64().max(1e-6)
    }

    /// How long was recorded.
    #[must_use]
    pub fn duration(&self) -> Duration {
        self.frames.last().map_or(Duration::ZERO, Frame::to)
    }
}

fn read_header(from: &mut impl Read) -> Result<Header, TraceError> {
    let short = || TraceError::header("ends too early");
    let mut start = [0; MAGIC.len() + 6];
    if !fill(from, &mut start)? || !start.starts_with(MAGIC) {
        return Err(TraceError::Foreign);
    }
    let version = u16::from_le_bytes([start[8], start[9]]);
    if version != VERSION {
        return Err(TraceError::Version { found: version });
    }
    let length = number32(&start[10..]);
    if length > MAX_HEADER {
        let what = format!("claims {length} bytes, at most {MAX_HEADER} are possible");
        return Err(TraceError::header(what));
    }
    let mut json = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    let mut sum = [0; 4];
    if !fill(from, &mut json)? || !fill(from, &mut sum)? {
        return Err(short());
    }
    if crc32c::crc32c_append(crc32c::crc32c(&start), &json) != u32::from_le_bytes(sum) {
        return Err(TraceError::header("is damaged"));
    }
    let header: Header = serde_json::from_slice(&json)
        .map_err(|e| TraceError::header(format!("cannot be understood ({e})")))?;
    if header.layout.end() > MAX_GFN {
        return Err(TraceError::header("is of a guest of more than 1 TiB"));
    }
    Ok(header)
}
