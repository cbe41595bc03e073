//! What the fuzz targets do with their bytes, as ordinary functions: `tests/fuzz_smoke.rs` runs them on mutations of good
//! input, `fuzz/` under libFuzzer.

mod virtio;

pub use virtio::virtio;

use ferry_migration::codec::Decoder;
use ferry_migration::codec::marks::Marks;
use ferry_migration::destination::{Destination, State, Step, Timeouts, greet};
use ferry_migration::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use ferry_migration::port::{BlockSink, Clock, Host, Link, PageSink, PortError, blocks_in};
use ferry_migration::wire::{
    Encoding, FLAG_CRC, Features, HEADER_BYTES, Header, Hello, Limits, PREAMBLE_BYTES, Preamble,
    decode_runs, encode_runs,
};
use ferry_vmm::machine::MachineState;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The largest piece that a destination may ask its link for at once: what it allocates before a byte has arrived.
const PIECE: usize = 1 << 20;
/// Pages of RAM that the fuzzed destination agrees to build.
const MOST_PAGES: u64 = 1 << 16;

/// Headers, run tables and preambles: whatever is accepted is within its limits and encodes to the same bytes.
pub fn frame(bytes: &[u8]) {
    let limits = Limits { end: 1000 };
    if let Some(head) = bytes.first_chunk::<HEADER_BYTES>() {
        let mut fixed = *head;
        let crc = crc32c::crc32c(&fixed[..28]);
        fixed[28..].copy_from_slice(&crc.to_le_bytes());
        for bytes in [head, &fixed] {
            if let Ok(header) = Header::decode(bytes, limits) {
                assert!(header.length <= header.kind.max_payload());
                assert!(header.body_pages() * PAGE_SIZE as u64 <= u64::from(header.length));
                assert_eq!(Header::decode(&header.encode(), limits), Ok(header));
            }
        }
    }
    let mut runs = Vec::new();
    let pages = decode_runs(bytes, &mut runs);
    assert_eq!(pages, runs.iter().map(|r| r.count).sum::<u64>());
    let mut again = Vec::new();
    encode_runs(&runs, &mut again);
    assert_eq!(again, bytes[..bytes.len() / 8 * 8]);
    if let Some(head) = bytes.first_chunk::<PREAMBLE_BYTES>() {
        let mut fixed = *head;
        let crc = crc32c::crc32c(&fixed[..60]);
        fixed[60..].copy_from_slice(&crc.to_le_bytes());
        for bytes in [head, &fixed] {
            if let Ok(preamble) = Preamble::decode(bytes) {
                let again = Preamble::decode(&preamble.encode()).unwrap();
                assert_eq!(
                    (again.role, again.channel, again.session),
                    (preamble.role, preamble.channel, preamble.session)
                );
            }
        }
    }
}

/// A greeting, and a destination that is given these bytes by its source: it ends with an error or with the guest
/// running, never by a panic, and never asks for much more than what arrives.
///
/// Checksums are mended on the way, so that what lies behind them is reached: in the headers always, in payloads where
/// the first byte is odd.
///
/// Returns where the destination stood in the end, if the bytes began as a source does.
pub fn handshake(bytes: &[u8]) -> Option<State> {
    if let Ok(hello) = Hello::decode(bytes) {
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
    }
    let (&mode, stream) = bytes.split_first()?;
    let stream = mend(stream, mode & 1 == 1);
    let length = stream.len();
    let link = MemoryLink {
        input: stream,
        at: 0,
        asked: 0,
    };
    let (channel, preamble) = greet(link, Duration::ZERO).ok()?;
    let mut destination = Destination::new(
        channel,
        &preamble,
        FuzzHost::default(),
        Timeouts::default(),
        Arc::new(NoTime),
    );
    let mut steps = 0;
    while let Ok(Step::Continue | Step::Running) = destination.step() {
        steps += 1;
        assert!(steps * HEADER_BYTES <= length, "more frames than bytes");
    }
    let state = destination.state();
    let host = destination.into_host();
    assert_eq!(
        host.ran,
        matches!(state, State::Running | State::Interrupted | State::Complete),
        "{state:?}"
    );
    assert!(!host.ran || host.restored, "a guest ran without its state");
    Some(state)
}

/// Coded pages: decoded or refused, the same each time, and never more than what was announced. The first bytes choose
/// the encoding, the pages, and whether they were sent before.
pub fn codec(bytes: &[u8]) {
    let Some(([encoding, count, known], body)) = bytes.split_first_chunk::<3>() else {
        return;
    };
    let encoding = [Encoding::Zstd, Encoding::Patch][usize::from(encoding % 2)];
    let runs = [Run::new(5, 1 + u64::from(*count)), Run::new(400, 1)];
    let copies = Arc::new(Marks::new(1000));
    let known = Run::new(5, u64::from(*known));
    copies.set_run(known, true);
    let mut decoder = Decoder::new(Features::SUPPORTED, copies);
    let mut decode = || {
        let base = &mut |gfn: Gfn, page: &mut [u8; PAGE_SIZE]| {
            assert!(
                (known.first..known.end()).contains(&gfn),
                "page {gfn} was read, which never came"
            );
            page.fill(gfn.to_le_bytes()[0]);
            Ok(())
        };
        decoder
            .decode(encoding, &runs, body, base)
            .map(<[u8]>::to_vec)
            .map_err(|error| error.to_string())
    };
    let first = decode();
    if let Ok(pages) = &first {
        assert_eq!(pages.len() as u64, runs.iter().map(Run::bytes).sum::<u64>());
    }
    assert_eq!(decode(), first, "the decoder remembers");
}

/// A machine's state: read or refused; what is read is written to the same meaning.
pub fn machine_state(bytes: &[u8]) {
    let mut fixed = bytes.to_vec();
    if let Some((header, body)) = fixed.split_at_mut_checked(24) {
        header[16..20].copy_from_slice(&u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
        header[20..24].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
    }
    for bytes in [bytes, &fixed] {
        if let Ok(state) = MachineState::from_bytes(bytes) {
            let again = MachineState::from_bytes(&state.to_bytes().unwrap()).unwrap();
            assert_eq!(again.cpus(), state.cpus());
        }
    }
}

/// Makes the checksums right as far as the stream can be followed.
pub fn mend(stream: &[u8], payloads: bool) -> Vec<u8> {
    let mut bytes = stream.to_vec();
    let put = |bytes: &mut [u8], at: usize, crc: u32| {
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes())
    };
    if bytes.len() < PREAMBLE_BYTES {
        return bytes;
    }
    let crc = crc32c::crc32c(&bytes[..60]);
    put(&mut bytes, 60, crc);
    let mut at = PREAMBLE_BYTES;
    while at + HEADER_BYTES <= bytes.len() {
        let mut field = [0; 4];
        field.copy_from_slice(&bytes[at + 4..at + 8]);
        let length = usize::try_from(u32::from_le_bytes(field)).unwrap_or(usize::MAX);
        let body = at + HEADER_BYTES;
        let end = body.saturating_add(length).min(bytes.len());
        if payloads && length > 0 {
            bytes[at + 1] |= FLAG_CRC;
            let crc = crc32c::crc32c(&bytes[body..end]);
            put(&mut bytes, at + 24, crc);
        }
        let crc = crc32c::crc32c(&bytes[at..at + 28]);
        put(&mut bytes, at + 28, crc);
        at = end;
    }
    bytes
}

/// All happens at once.
struct NoTime;

impl Clock for NoTime {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn sleep(&self, _: Duration) {}
}

/// A link whose peer has said all that it will ever say.
#[derive(Debug)]
struct MemoryLink {
    input: Vec<u8>,
    at: usize,
    asked: usize,
}

impl Link for MemoryLink {
    fn send(&mut self, _: &[u8], _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.asked = self.asked.max(buf.len());
        assert!(
            buf.len() <= PIECE,
            "{} bytes were allocated on a peer's word",
            buf.len()
        );
        let rest = self
            .input
            .get(self.at..self.at + buf.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(rest);
        self.at += buf.len();
        Ok(())
    }

    fn wait_readable(&mut self, _: Duration) -> io::Result<bool> {
        Ok(true)
    }

    fn set_timeout(&mut self, _: Option<Duration>) {}
}

/// Memory that checks that it is only asked for what it has.
#[derive(Debug)]
struct FuzzSink {
    layout: RamLayout,
    /// Pages that were written; the others are zero.
    written: Mutex<HashMap<Gfn, [u8; PAGE_SIZE]>>,
    missing: Arc<Mutex<Option<PageSet>>>,
}

impl PageSink<MemoryLink> for FuzzSink {
    fn receive(&self, link: &mut MemoryLink, runs: &[Run]) -> io::Result<()> {
        let mut page = [0; PAGE_SIZE];
        for run in runs {
            assert!(self.layout.contains(*run), "{run:?} is not RAM");
            for gfn in run.first..run.end() {
                link.recv(&mut page)?;
                self.written.lock().unwrap().insert(gfn, page);
            }
        }
        Ok(())
    }

    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        assert!(self.layout.contains(run), "{run:?} is not RAM");
        assert_eq!(bytes.len() as u64, run.bytes());
        let pages = bytes.as_chunks::<PAGE_SIZE>().0;
        let pages = (run.first..).zip(pages.iter().copied());
        self.written.lock().unwrap().extend(pages);
        Ok(())
    }

    fn zero(&self, run: Run) -> Result<(), PortError> {
        assert!(self.layout.contains(run), "{run:?} is not RAM");
        let mut written = self.written.lock().unwrap();
        written.retain(|gfn, _| *gfn < run.first || *gfn >= run.end());
        Ok(())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        if !self.layout.contains(Run::new(gfn, 1)) {
            return Err("not RAM".into());
        }
        let written = self.written.lock().unwrap();
        *into = written.get(&gfn).copied().unwrap_or([0; PAGE_SIZE]);
        Ok(())
    }

    fn place(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        assert_eq!(run.bytes(), bytes.len() as u64);
        self.place_zero(run)
    }

    fn place_zero(&self, run: Run) -> Result<(), PortError> {
        assert!(self.layout.contains(run), "{run:?} is not RAM");
        let mut missing = self.missing.lock().unwrap();
        for gfn in run.first..run.end() {
            assert!(missing.as_mut().unwrap().remove(gfn), "placed twice");
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct FuzzHost {
    restored: bool,
    ran: bool,
    missing: Arc<Mutex<Option<PageSet>>>,
}

/// A disk that checks that it is only asked for what it has.
#[derive(Debug)]
struct FuzzDisk(Mutex<Vec<u8>>);

impl FuzzDisk {
    /// Blocks of all disks that are worth having here.
    const MOST: u64 = 8;

    fn with(&self, offset: u64, len: usize, then: impl FnOnce(&mut [u8])) -> Result<(), PortError> {
        let at = usize::try_from(offset).unwrap();
        then(&mut self.0.lock().unwrap()[at..at + len]);
        Ok(())
    }
}

impl BlockSink for FuzzDisk {
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), PortError> {
        self.with(offset, bytes.len(), |disk| disk.copy_from_slice(bytes))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), PortError> {
        let len = usize::try_from(len).unwrap();
        self.with(offset, len, |disk| disk.fill(0))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        self.with(offset, into.len(), |disk| into.copy_from_slice(disk))
    }

    fn flush(&self) -> Result<(), PortError> {
        Ok(())
    }
}

impl Host<MemoryLink> for FuzzHost {
    type Sink = FuzzSink;

    fn take_stores(&mut self, bytes: &[u64]) -> Result<Vec<Arc<dyn BlockSink>>, PortError> {
        if bytes.iter().map(|bytes| blocks_in(*bytes)).sum::<u64>() > FuzzDisk::MOST {
            return Err("too large".into());
        }
        let make = |bytes: &u64| {
            let disk = vec![0; usize::try_from(*bytes).unwrap()];
            Arc::new(FuzzDisk(Mutex::new(disk))) as _
        };
        Ok(bytes.iter().map(make).collect())
    }

    fn prepare(&mut self, layout: &RamLayout, _: &[u8]) -> Result<Arc<FuzzSink>, PortError> {
        if layout.pages() > MOST_PAGES {
            return Err("too large".into());
        }
        Ok(Arc::new(FuzzSink {
            layout: layout.clone(),
            written: Mutex::default(),
            missing: Arc::clone(&self.missing),
        }))
    }

    fn check_post_copy(&self) -> Result<(), PortError> {
        Ok(())
    }

    fn drop_stale(&mut self, _: &PageSet) -> Result<(), PortError> {
        Ok(())
    }

    fn begin_post_copy(&mut self, missing: &PageSet) -> Result<(), PortError> {
        assert!(!self.restored && !self.ran);
        *self.missing.lock().unwrap() = Some(missing.clone());
        Ok(())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        if state.is_empty() {
            return Err("the state is empty".into());
        }
        self.restored = true;
        Ok(())
    }

    fn run(&mut self) -> Result<Duration, PortError> {
        self.ran = true;
        Ok(Duration::ZERO)
    }

    fn discard(&mut self) {
        assert!(!self.ran, "a running guest was discarded");
    }
}
