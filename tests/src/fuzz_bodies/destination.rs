//! A destination that is told anything at all.

use super::link::{channels, mend};
use ferry_migration::destination::{
    Destination, FaultChannel, State, Step, Timeouts, exchange_preamble,
};
use ferry_migration::net::MonotonicClock;
use ferry_migration::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use ferry_migration::port::{
    BlockSink, DestinationDisks, DestinationVm, Link, PageFault, PageSink, PortError, PostCopySink,
    PostCopyVm, blocks_in,
};
use ferry_migration::testing::{Gate, RecordedPeer, Seen, TestClock};
use ferry_migration::wire::{
    Channel, FLAG_CRC, Features, FrameType, HEADER_BYTES, Header, Hello, Preamble, Role, SessionId,
};
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SESSION: SessionId = SessionId([7; 16]);
/// Pages of RAM that the fuzzed destination agrees to build.
const MOST_PAGES: u64 = 1 << 16;

/// A handshake, and a destination that is given these bytes by its source: it ends with an error or
/// with the guest running, never by a panic, and never asks for much more than what arrives.
///
/// Checksums are mended on the way, so that what lies behind them is reached: in the headers
/// always, in payloads where the first byte is odd.
///
/// Returns where the destination stood in the end, if the bytes began as a source does.
pub fn handshake(bytes: &[u8]) -> Option<State> {
    if let Ok(hello) = Hello::decode(bytes) {
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
    }
    let (&mode, stream) = bytes.split_first()?;
    let stream = mend(stream, mode & 1 == 1);
    let length = stream.len();
    let link = RecordedPeer::new(stream, Seen::AtOnce);
    let (channel, preamble) = exchange_preamble(link, Duration::ZERO).ok()?;
    let mut destination = Destination::new(
        channel,
        &preamble,
        FuzzHost::default(),
        // Data channels that were announced do not come.
        Timeouts {
            transfer: Duration::ZERO,
            ..Timeouts::default()
        },
        Arc::new(TestClock::still()),
    );
    let mut steps = 0;
    while let Ok(Step::Continue | Step::Running) = destination.step() {
        steps += 1;
        assert!(steps * HEADER_BYTES <= length, "more frames than bytes");
    }
    Some(stands(destination))
}

/// Where a destination stands in the end; its host has heard the same.
fn stands(destination: Destination<RecordedPeer, FuzzHost>) -> State {
    let state = destination.state();
    let host = destination.into_host();
    assert_eq!(
        host.ran,
        matches!(state, State::Running | State::Interrupted | State::Complete),
        "{state:?}"
    );
    assert!(!host.ran || host.restored, "a guest ran without its state");
    state
}

/// A destination whose source says these bytes on several channels: what is said on the control
/// channel after a handshake that asks for two data channels (and, by the first byte, for post-copy
/// and hashes), on each data channel until the guest runs and from then on, on the fault channel,
/// and on the control and the fault channel of a second connection, if the first is lost.
///
/// Besides what [`handshake`] looks at: no page is placed twice, whatever comes on which channel.
/// `timeout` is how long a channel is waited for. Returns where the destination stood in the end,
/// if there was input.
pub fn data_channels(bytes: &[u8], timeout: Duration) -> Option<State> {
    let (&mode, said) = bytes.split_first()?;
    let mut said = channels(said, mode & 1 == 1).into_iter();
    let mut next = || said.next().unwrap_or_default();
    let post_copy = mode & 2 > 0;
    let mut required = Features::CHANNELS;
    if post_copy {
        required = required.or(Features::POST_COPY);
    }
    if mode & 4 > 0 {
        required = required.or(Features::VERIFY);
    }
    let hello = Hello {
        offered: Features::SUPPORTED,
        required,
        layout: RamLayout::new(vec![Run::new(0, 32), Run::new(64, 32)]).unwrap(),
        channels: 2,
        faults: u16::from(post_copy),
        disks: Vec::new(),
        policy: "precopy".into(),
        machine: b"a machine".to_vec(),
    };
    let mut stream = Preamble::new(Role::Control, 0, SESSION).encode().to_vec();
    let payload = hello.encode();
    let header = Header {
        length: u32::try_from(payload.len()).unwrap(),
        flags: FLAG_CRC,
        payload_crc: crc32c::crc32c(&payload),
        ..Header::bare(FrameType::Hello, 0)
    };
    stream.extend(header.encode());
    stream.extend(payload);
    stream.extend(next());
    let link = RecordedPeer::new(stream, Seen::AtOnce);
    let (channel, preamble) = exchange_preamble(link, Duration::ZERO).unwrap();
    let timeouts = Timeouts {
        transfer: timeout,
        ..Timeouts::default()
    };
    let host = FuzzHost::default();
    let clock = Arc::new(MonotonicClock::new());
    let mut destination = Destination::new(channel, &preamble, host, timeouts, clock);
    assert_eq!(destination.step().unwrap(), Step::Continue);
    let sink = destination.host().sink.clone().unwrap();
    let [runs, over] = [Arc::<Gate>::default(), Arc::default()];
    let data: Vec<_> = (0..2)
        .map(|index| {
            let mut link = RecordedPeer::new(next(), Seen::AtOnce);
            if mode & 8 == 0 {
                link = link.then(&runs, next()).then(&over, Vec::new());
            }
            let data_channels = destination.data_channels().unwrap();
            data_channels.attach(Channel::new(link), index).unwrap()
        })
        .collect();
    let missing_pages = destination.missing_pages().cloned();
    let asks = |said| {
        let channel = Channel::new(RecordedPeer::new(said, Seen::AtOnce));
        let data_channel = missing_pages.as_ref().map(|missing_pages| {
            Destination::<_, FuzzHost>::fault_channel(missing_pages, channel, 0, timeouts)
        });
        data_channel.transpose().unwrap()
    };
    let play = |destination: &mut Destination<_, _>, fault: Option<FaultChannel<_, _>>| {
        let mut fault = fault;
        while let Ok(step @ (Step::Continue | Step::Running)) = destination.step() {
            if step == Step::Running {
                runs.open();
            }
            let failed = fault
                .as_mut()
                .and_then(|fault| fault.step(sink.as_ref(), Duration::ZERO).err());
            if let (Some(error), Some(missing_pages)) = (failed, &missing_pages) {
                missing_pages.lose(&error.to_string());
                fault = None;
            }
        }
    };
    std::thread::scope(|scope| {
        data.into_iter().for_each(|data_channel| {
            scope.spawn(move || data_channel.run());
        });
        play(&mut destination, asks(next()));
        // As when their connections end.
        runs.open();
        over.open();
    });
    if matches!(destination.state(), State::InDoubt | State::Interrupted) {
        let mut stream = Preamble::new(Role::Recover, 0, SESSION).encode().to_vec();
        stream.extend(next());
        let link = RecordedPeer::new(stream, Seen::AtOnce);
        let (channel, preamble) = exchange_preamble(link, Duration::ZERO).unwrap();
        destination.reattach(channel, &preamble);
        play(&mut destination, asks(next()));
    }
    Some(stands(destination))
}

/// Memory that checks that it is only asked for what it has.
#[derive(Debug)]
struct FuzzSink {
    layout: RamLayout,
    /// Pages that were written; the others are zero.
    written: Mutex<HashMap<Gfn, [u8; PAGE_SIZE]>>,
    missing: Arc<Mutex<Option<PageSet>>>,
    /// The guest is complete: only what is missing may come.
    complete: Arc<AtomicBool>,
    /// Where the guest looks next.
    asked: Mutex<u64>,
}

impl FuzzSink {
    fn not_complete(&self) {
        let complete = self.complete.load(Ordering::SeqCst);
        assert!(!complete, "a complete guest was written into");
    }
}

impl PageSink<RecordedPeer> for FuzzSink {
    fn receive(&self, link: &mut RecordedPeer, runs: &[Run]) -> io::Result<()> {
        self.not_complete();
        let mut page = [0; PAGE_SIZE];
        for run in runs {
            assert!(self.layout.contains(*run), "{run:?} is not RAM");
            for gfn in run.first..run.end() {
                link.recv(&mut page)?;
                self.not_complete();
                self.written.lock().unwrap().insert(gfn, page);
            }
        }
        Ok(())
    }

    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        self.not_complete();
        assert!(self.layout.contains(run), "{run:?} is not RAM");
        assert_eq!(bytes.len() as u64, run.bytes());
        let pages = bytes.as_chunks::<PAGE_SIZE>().0;
        let pages = (run.first..).zip(pages.iter().copied());
        self.written.lock().unwrap().extend(pages);
        Ok(())
    }

    fn zero(&self, run: Run) -> Result<(), PortError> {
        self.not_complete();
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

    fn post_copy(&self) -> Option<&dyn PostCopySink> {
        Some(self)
    }
}

impl PostCopySink for FuzzSink {
    fn place(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        assert_eq!(run.bytes(), bytes.len() as u64);
        assert!(self.layout.contains(run), "{run:?} is not RAM");
        let mut missing = self.missing.lock().unwrap();
        for gfn in run.first..run.end() {
            assert!(missing.as_mut().unwrap().remove(gfn), "placed twice");
        }
        Ok(())
    }

    fn place_zero(&self, run: Run) -> Result<(), PortError> {
        assert!(self.layout.contains(run), "{run:?} is not RAM");
        let mut missing = self.missing.lock().unwrap();
        // What is in place stays as it is.
        missing.as_mut().unwrap().remove_run(run);
        Ok(())
    }

    fn next_fault(&self, _: Duration) -> Result<Option<PageFault>, PortError> {
        let mut asked = self.asked.lock().unwrap();
        let missing = self.missing.lock().unwrap();
        *asked += 29;
        let fault = |missing: &PageSet| {
            let gfn = missing.next(*asked % missing.end())?;
            Some(PageFault {
                gfn,
                waiter: u32::from(*asked % 2 == 1),
            })
        };
        Ok(missing.as_ref().and_then(fault))
    }
}

#[derive(Debug, Default)]
struct FuzzHost {
    restored: bool,
    ran: bool,
    complete: Arc<AtomicBool>,
    missing: Arc<Mutex<Option<PageSet>>>,
    sink: Option<Arc<FuzzSink>>,
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

impl DestinationVm<RecordedPeer> for FuzzHost {
    type Sink = FuzzSink;

    fn prepare(&mut self, layout: &RamLayout, _: &[u8]) -> Result<Arc<FuzzSink>, PortError> {
        if layout.pages() > MOST_PAGES {
            return Err("too large".into());
        }
        let sink = Arc::new(FuzzSink {
            layout: layout.clone(),
            written: Mutex::default(),
            missing: Arc::clone(&self.missing),
            complete: Arc::clone(&self.complete),
            asked: Mutex::default(),
        });
        self.sink = Some(Arc::clone(&sink));
        Ok(sink)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        if state.is_empty() {
            return Err("the state is empty".into());
        }
        self.restored = true;
        self.complete.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn run(&mut self) -> Result<Option<Duration>, PortError> {
        self.ran = true;
        Ok(Some(Duration::ZERO))
    }

    fn discard(&mut self) {
        assert!(!self.ran, "a running guest was discarded");
    }

    fn disks(&mut self) -> Option<&mut dyn DestinationDisks> {
        Some(self)
    }

    fn post_copy(&mut self) -> Option<&mut dyn PostCopyVm> {
        Some(self)
    }
}

impl DestinationDisks for FuzzHost {
    fn take_disks(&mut self, bytes: &[u64]) -> Result<Vec<Arc<dyn BlockSink>>, PortError> {
        if bytes.iter().map(|bytes| blocks_in(*bytes)).sum::<u64>() > FuzzDisk::MOST {
            return Err("too large".into());
        }
        let make = |bytes: &u64| {
            let disk = vec![0; usize::try_from(*bytes).unwrap()];
            Arc::new(FuzzDisk(Mutex::new(disk))) as _
        };
        Ok(bytes.iter().map(make).collect())
    }
}

impl PostCopyVm for FuzzHost {
    fn check(&self) -> Result<(), PortError> {
        Ok(())
    }

    fn drop_stale(&mut self, _: &PageSet) -> Result<(), PortError> {
        Ok(())
    }

    fn begin(&mut self, missing: &PageSet) -> Result<(), PortError> {
        assert!(!self.restored && !self.ran);
        *self.missing.lock().unwrap() = Some(missing.clone());
        Ok(())
    }

    fn end(&mut self) {}
}
